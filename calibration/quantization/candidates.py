"""The parts of a graph that can be quantised: products of an activation and a constant matrix, by block.

Everything else stays in float: LayerNorm, softmax, GELU, products of two activations, and the perturbation's subgraph,
whose iteration needs the float32 in which it was verified.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

from qpert.graphs.perturbation.names import PREFIX

_LAYER = re.compile(r"^(?P<block>.*?\.(?:blocks|resblocks|layer)\.\d+)\.")


@dataclass(frozen=True)
class Candidate:
    """One product: its node, its activation and its constant matrix (tensor names), and its block."""

    node: str
    activation: str
    weight: str
    block: str


def find_candidates(model: onnx.ModelProto) -> tuple[Candidate, ...]:
    """The products of a traced graph that can be quantised, in the graph's order. Raises ValueError for equal names."""
    matrices = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
    constants = {tensor.name for tensor in model.graph.initializer}
    found = tuple(
        Candidate(node.name, node.input[0], node.input[1], block_of(node.input[1]))
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and node.input[1] in matrices
        and node.input[0] not in constants
        and not node.name.startswith(PREFIX)
    )
    if len({candidate.node for candidate in found}) < len(found):
        raise ValueError("two products of a graph have one name")
    return found


def block_of(weight: str) -> str:
    """The block of the network that a weight belongs to: a layer, or a head."""
    if match := _LAYER.match(weight):
        return match["block"]
    parts = weight.split(".weight")[0].split(".")
    return ".".join(parts[:2])


def blocks(candidates: tuple[Candidate, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(candidate.block for candidate in candidates))
