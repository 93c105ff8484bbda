"""Useful work of a two-tower model's graphs, in the form of `GraphSpec.flops`: matrix products, two operations each."""

from __future__ import annotations

from qpert.graphs.transformer import EncoderConfig, VisionConfig

Flops = dict[str, int]


def a_token(config: EncoderConfig) -> int:
    """Operations per token in a stack of layers: projections and feed-forward."""
    return config.layers * (2 * config.width * 4 * config.width + 2 * 2 * config.width * config.mlp_width)


def a_token_pair(config: EncoderConfig) -> int:
    """Operations per pair of tokens in a stack of layers: its score and its part of the context."""
    return config.layers * 2 * 2 * config.width


def vision_flops(vision: VisionConfig, tokens: int) -> Flops:
    """Images [B] through the vision tower, with `tokens` tokens each."""
    patch_embedding = 2 * vision.patches * 3 * vision.patch_size**2 * vision.width
    return {"B": patch_embedding + a_token(vision) * tokens + a_token_pair(vision) * tokens**2}


def text_flops(text: EncoderConfig, projection: int, length: int | None = None) -> Flops:
    """Texts [T, L] to vectors, or [T] of one `length`; `projection`: width of the vector."""
    head = 2 * text.width * projection
    if length is None:
        return {"T": head, "T*L": a_token(text), "T*L*L": a_token_pair(text)}
    return {"T": head + a_token(text) * length + a_token_pair(text) * length**2}
