"""Useful work of each graph: floating-point operations of its matrix products, two for a multiplication with addition.

The perturbation counts as none. It is work that one wants as little of as possible, and how much it takes depends on
how the projectors are computed.
"""

from __future__ import annotations

from typing import Any


def vision_flops(architecture: dict[str, Any]) -> int:
    """One image through the vision tower."""
    vision = architecture["vision"]
    width, patch = vision["width"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    tokens = patches + 1
    projections = 2 * tokens * width * 4 * width  # queries, keys, values; output
    products = 2 * 2 * tokens * tokens * width  # scores; context
    feed_forward = 2 * 2 * tokens * width * vision["mlp_width"]
    return 2 * patches * 3 * patch**2 * width + vision["layers"] * (projections + products + feed_forward)


def query_flops(architecture: dict[str, Any]) -> int:
    """One image's features through the Q-Former's queries to its embeddings."""
    qformer, queries = architecture["qformer"], architecture["qformer"]["queries"]
    layers = qformer["layers"] * (self_attention(qformer, queries) + feed_forward(qformer, queries))
    head = 2 * queries * qformer["width"] * architecture["embed_dim"]
    return keys_and_values(architecture) + layers + cross_layers(qformer) * cross_attention(architecture) + head


def text_flops(architecture: dict[str, Any], length: int) -> int:
    """One text of `length` tokens to its embedding."""
    qformer = architecture["qformer"]
    layers = qformer["layers"] * (self_attention(qformer, length) + feed_forward(qformer, length))
    return layers + 2 * qformer["width"] * architecture["embed_dim"]


def itm_flops(architecture: dict[str, Any], texts: int, length: int) -> int:
    """One image with `texts` texts of `length` tokens; its keys and values are computed once."""
    qformer, queries = architecture["qformer"], architecture["qformer"]["queries"]
    both = self_attention(qformer, queries + length) + feed_forward(qformer, queries)
    text = (qformer["layers"] - 1) * feed_forward(qformer, length)  # nothing reads the last layer's text
    head = 2 * queries * qformer["width"] * 2
    pair = qformer["layers"] * both + text + cross_layers(qformer) * cross_attention(architecture) + head
    return keys_and_values(architecture) + texts * pair


def keys_and_values(architecture: dict[str, Any]) -> int:
    qformer, vision = architecture["qformer"], architecture["vision"]
    return cross_layers(qformer) * 2 * image_tokens(vision) * vision["width"] * 2 * qformer["width"]


def self_attention(qformer: dict[str, Any], tokens: int) -> int:
    return 2 * tokens * qformer["width"] * 4 * qformer["width"] + 2 * 2 * tokens * tokens * qformer["width"]


def cross_attention(architecture: dict[str, Any]) -> int:
    qformer, queries = architecture["qformer"], architecture["qformer"]["queries"]
    projections = 2 * queries * qformer["width"] * 2 * qformer["width"]
    return projections + 2 * 2 * queries * image_tokens(architecture["vision"]) * qformer["width"]


def feed_forward(qformer: dict[str, Any], tokens: int) -> int:
    return 2 * 2 * tokens * qformer["width"] * qformer["mlp_width"]


def cross_layers(qformer: dict[str, Any]) -> int:
    return -(-qformer["layers"] // qformer["cross_attention_frequency"])


def image_tokens(vision: dict[str, Any]) -> int:
    return int((vision["image_size"] // vision["patch_size"]) ** 2 + 1)
