"""The inputs and outputs of BLIP-2's four graphs."""

from __future__ import annotations

from qpert.exporter.families.blip2.flops import itm_flops, query_flops, text_flops, vision_flops
from qpert.exporter.families.declare import FEATURE_DTYPES, Limits, box_tensors, graph, tensor, token_tensors
from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.bundle import roles
from qpert.runtime.bundle.graph_spec import GraphSpec, TensorSpec

MAX_LENGTH = 35
"""Tokens of a caption in LAVIS's retrieval evaluation (`blip2_qformer.py`, `max_txt_len` of its configurations)."""


def graph_specs(config: Blip2Config, *, precision: str, stages: str, limits: Limits) -> dict[str, GraphSpec]:
    """The four graphs of a bundle, by name.

    Args:
        config: the architecture.
        precision: `fp32`, `fp16` or `bf16`.
        stages: `itc`, `both` or `none`: the stages that take boxes.
        limits: upper limits of the dynamic axes.
    """
    vision, qformer = config.vision, config.qformer

    def tokens(axis: str, *, shared: bool = False) -> TensorSpec:
        shape = (axis, vision.tokens, vision.width)
        return tensor(roles.IMAGE_TOKENS, FEATURE_DTYPES[precision], *shape, shared=shared)

    def boxes(axis: str, *perturbed: str) -> tuple[TensorSpec, ...]:
        return box_tensors(axis, vision.tokens) if stages in perturbed else ()

    ranges = limits.ranges(limits.text_length(MAX_LENGTH, qformer.max_positions))
    declared = (
        graph(
            roles.IMAGE_TOWER,
            [tensor(roles.PIXELS, "float32", "B", 3, vision.image_size, vision.image_size)],
            tokens("B"),
            ranges,
            vision_flops(vision),
        ),
        graph(
            roles.QUERY_HEAD,
            [tokens("B", shared=stages != "none"), *boxes("B", "itc", "both")],
            tensor(roles.IMAGE_VECTORS, "float32", "B", qformer.queries, config.embed_dim),
            ranges,
            query_flops(config),
        ),
        graph(
            roles.TEXT_TOWER,
            token_tensors("T", "L"),
            tensor(roles.TEXT_VECTORS, "float32", "T", config.embed_dim),
            ranges,
            text_flops(config),
        ),
        graph(
            roles.PAIR_SCORER,
            [tokens("I"), *token_tensors("I", "T", "L"), *boxes("I", "both")],
            tensor(roles.PAIR_SCORES, "float32", "I", "T"),
            ranges,
            itm_flops(config),
        ),
    )
    return {spec.name: spec for spec in declared}
