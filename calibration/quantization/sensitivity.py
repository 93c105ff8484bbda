"""The cost of each block: it alone is quantised, the rest of the network stays in float."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qpert.calibration.graph_files import load_graph
from qpert.calibration.quantization.candidates import blocks
from qpert.calibration.quantization.data import CalibrationData, Feed
from qpert.calibration.quantization.gate import changed_first
from qpert.calibration.quantization.quantized import QuantizedGraph
from qpert.calibration.quantization.variants import Form, running, variant
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_VECTORS, PAIR_SCORER, QUERY_HEAD
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.scores import itc_scores
from qpert.runtime.sessions.protocol import Session

Outputs = list[np.ndarray]


@dataclass(frozen=True)
class BlockCost:
    """One block of one graph, quantised alone.

    cosine_mean and cosine_worst: 1 − cosine between its graph's output and the float graph's, over rows; for the pair
    graph, whose output is a score, score_worst instead. agreement: percent of queries (images and texts of the
    calibration data, ITC; images, for the pair graph) that keep their first result.
    """

    graph: str
    block: str
    products: int
    cosine_mean: float | None
    cosine_worst: float | None
    score_worst: float | None
    agreement: float

    @property
    def order(self) -> tuple[float, float]:
        """Sorts blocks from the most sensitive: by agreement, then by angle or score."""
        distance = self.cosine_mean if self.cosine_mean is not None else self.score_worst
        return self.agreement, -(distance or 0.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class FloatOutputs:
    """The float graphs' outputs for the calibration data, call by call."""

    by_graph: dict[str, Outputs]


def float_outputs(encoder: Encoder, data: CalibrationData) -> FloatOutputs:
    return FloatOutputs({name: outputs(encoder.sessions[name], data.feeds[name]) for name in data.feeds})


def outputs(session: Session, feeds: Sequence[Feed]) -> Outputs:
    """The graph's only output, for each call."""
    return [session.run(feed)[session.spec.output_names[0]] for feed in feeds]


def block_costs(
    encoder: Encoder,
    graphs: dict[str, QuantizedGraph],
    data: CalibrationData,
    folder: Path,
    progress: Progress,
) -> list[BlockCost]:
    """Every block of every quantised graph, the most sensitive first."""
    reference = float_outputs(encoder, data)
    total = sum(len(blocks(graph.candidates)) for graph in graphs.values())
    costs = []
    with progress.stage("measuring each block's sensitivity", total) as advance:
        for name, graph in graphs.items():
            original = load_graph(graph.path)
            for block in blocks(graph.candidates):
                with running(alone(graph, original, block), encoder.manifest.graphs[name], folder) as session:
                    costs.append(cost_of(name, block, graph, session, encoder, data, reference))
                advance(1)
    return sorted(costs, key=lambda cost: cost.order)


def alone(graph: QuantizedGraph, original: onnx.ModelProto, block: str) -> onnx.ModelProto:
    """The graph with one block quantised."""
    forms: dict[str, Form] = {c.node: "float" for c in graph.candidates if c.block != block}
    return variant(original, graph.quantized, graph.candidates, forms)


def cost_of(
    name: str,
    block: str,
    graph: QuantizedGraph,
    session: Session,
    encoder: Encoder,
    data: CalibrationData,
    reference: FloatOutputs,
) -> BlockCost:
    got, expected = outputs(session, data.feeds[name]), reference.by_graph[name]
    products = sum(candidate.block == block for candidate in graph.candidates)
    cost = BlockCost(name, block, products, None, None, None, 0.0)
    if encoder.manifest.graphs[name].role == PAIR_SCORER:
        worst = max(float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True))
        changed = changed_first(np.concatenate(expected), np.concatenate(got))
        return replace(cost, score_worst=worst, agreement=100 - changed)
    distances = np.concatenate([cosine_distances(a, b) for a, b in zip(got, expected, strict=True)])
    before = itc(encoder, data, reference, name, expected)
    after = itc(encoder, data, reference, name, got)
    changed = 100 * float(np.mean([*(first(before) != first(after)), *(first(before.T) != first(after.T))]))
    return replace(
        cost,
        cosine_mean=float(distances.mean()),
        cosine_worst=float(distances.max()),
        agreement=100 - changed,
    )


def first(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores.argmax(axis=1))


def itc(encoder: Encoder, data: CalibrationData, reference: FloatOutputs, name: str, changed: Outputs) -> np.ndarray:
    """ITC scores [B, T] of the calibration data, without boxes, with the outputs of one graph replaced."""
    manifest = encoder.manifest
    made = reference.by_graph | {name: changed}
    count = len(data.feeds[manifest.image_tower.name])
    replaced = name == manifest.image_tower.name
    queries = list(requeried(encoder, data, changed)) if replaced else made[manifest.query_head.name][:count]
    return itc_scores(np.concatenate(queries), np.concatenate(made[manifest.text_tower.name]))


def requeried(encoder: Encoder, data: CalibrationData, image_tokens: Outputs) -> Iterator[np.ndarray]:
    """Image vectors of other image tokens, in float and without boxes (as in the query head's first calls)."""
    head = encoder.graph(QUERY_HEAD)
    name = head.spec.input(IMAGE_TOKENS).name
    for feed, array in zip(data.feeds[head.spec.name], image_tokens, strict=False):
        yield head.spec.by_slot(head.session.run(feed | {name: array}))[IMAGE_VECTORS]


def cosine_distances(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """1 − cosine of each row of the last axis, float64 [rows]."""
    a, b = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (got, expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(1 - (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny))
