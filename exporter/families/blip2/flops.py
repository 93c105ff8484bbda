"""Useful work of each graph: floating-point operations of its matrix products, two per multiply-add.

Each is a sum of products of axis lengths, in the form of `GraphSpec.flops`. The perturbation is not counted: it is
overhead, and its amount depends on how the projectors are computed.
"""

from __future__ import annotations

from qpert.graphs.families.blip2.config import Blip2Config, QFormerConfig, VisionConfig

Flops = dict[str, int]


def vision_flops(vision: VisionConfig) -> Flops:
    """Images [B] through the vision tower."""
    width, patches, tokens = vision.width, vision.grid**2, vision.tokens
    projections = 2 * tokens * width * 4 * width  # queries, keys, values; output
    products = 2 * 2 * tokens * tokens * width  # scores; context
    feed_forward = 2 * 2 * tokens * width * vision.mlp_width
    patch_embedding = 2 * patches * 3 * vision.patch_size**2 * width
    return {"B": patch_embedding + vision.layers * (projections + products + feed_forward)}


def query_flops(config: Blip2Config) -> Flops:
    """Features [B] through the Q-Former's queries to embeddings."""
    qformer, queries = config.qformer, config.qformer.queries
    layers = qformer.layers * (a_token(qformer) * queries + a_token_pair(qformer) * queries**2)
    head = 2 * queries * qformer.width * config.embed_dim
    cross = len(qformer.cross_layers) * cross_attention(config)
    return {"B": keys_and_values(config) + layers + cross + head}


def text_flops(config: Blip2Config) -> Flops:
    """Texts [T, L] to embeddings."""
    qformer = config.qformer
    return {
        "T": 2 * qformer.width * config.embed_dim,
        "T*L": qformer.layers * a_token(qformer),
        "T*L*L": qformer.layers * a_token_pair(qformer),
    }


def itm_flops(config: Blip2Config) -> Flops:
    """Images [I] with texts [T, L] each; an image's keys and values are computed once.

    Self-attention runs over Q + L tokens; nothing reads the text of the last layer, so its feed-forward is left out.
    """
    qformer, queries, layers = config.qformer, config.qformer.queries, config.qformer.layers
    pair = a_token_pair(qformer)
    cross = len(qformer.cross_layers) * cross_attention(config)
    head = 2 * queries * qformer.width * 2
    attended = layers * projections(qformer) + (layers - 1) * feed_forward(qformer)
    return {
        "I": keys_and_values(config),
        "I*T": layers * (a_token(qformer) * queries + pair * queries**2) + cross + head,
        "I*T*L": attended + layers * pair * 2 * queries,
        "I*T*L*L": layers * pair,
    }


def a_token(qformer: QFormerConfig) -> int:
    """Operations per token in a layer: projections and feed-forward."""
    return projections(qformer) + feed_forward(qformer)


def projections(qformer: QFormerConfig) -> int:
    return 2 * qformer.width * 4 * qformer.width


def feed_forward(qformer: QFormerConfig) -> int:
    return 2 * 2 * qformer.width * qformer.mlp_width


def a_token_pair(qformer: QFormerConfig) -> int:
    """Operations per pair of tokens in a self-attention: its score and its part of the context."""
    return 2 * 2 * qformer.width


def keys_and_values(config: Blip2Config) -> int:
    qformer, vision = config.qformer, config.vision
    return len(qformer.cross_layers) * 2 * vision.tokens * vision.width * 2 * qformer.width


def cross_attention(config: Blip2Config) -> int:
    qformer = config.qformer
    ends = 2 * qformer.queries * qformer.width * 2 * qformer.width  # queries; output
    return ends + 2 * 2 * qformer.queries * config.vision.tokens * qformer.width
