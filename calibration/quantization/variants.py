"""Variants of a quantised graph: which products compute in 8 bits, and which take float numbers.

A variant is made by rewiring, so it does not matter which tool quantised the graph. A product that is not quantised
computes in float from the stored 8-bit weights (`weights`) or from the original ones (`float`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import onnx

from qpert.calibration.quantization.candidates import Candidate
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.sessions.open import open_session
from qpert.runtime.sessions.protocol import Session

Form = Literal["quantized", "weights", "float"]
QDQ = ("QuantizeLinear", "DequantizeLinear")
LARGEST_FILE = 1 << 30
"""Bytes above which weights get their own file: protobuf is limited to 2 GB."""


def variant(
    original: onnx.ModelProto | None,
    quantized: onnx.ModelProto,
    candidates: Sequence[Candidate],
    forms: Mapping[str, Form],
) -> onnx.ModelProto:
    """The quantised graph with each product in its form.

    Args:
        original: the float graph with its weights; None if no product has the form `float`.
        quantized: the same graph with every candidate quantised.
        candidates: the products.
        forms: by node name; a product that is not named stays quantised.
    """
    made = onnx.ModelProto()
    made.CopyFrom(quantized)
    nodes = {node.name: node for node in made.graph.node}
    wanted: list[str] = []
    for candidate in candidates:
        form = forms.get(candidate.node, "quantized")
        if form != "quantized":
            nodes[candidate.node].input[0] = candidate.activation
        if form == "float":
            nodes[candidate.node].input[1] = candidate.weight
            wanted.append(candidate.weight)
    if wanted:
        add_weights(made, original, set(wanted))
    prune(made)
    return made


def free_other_readers(model: onnx.ModelProto, candidates: Sequence[Candidate]) -> None:
    """Connect all other readers of a product's activation to the float activation again.

    ONNX Runtime's quantiser puts Q/DQ between an activation and all its readers. After a LayerNorm one of them is the
    residual sum (the Q-Former adds after the norm), which 8 bits would round for nothing.
    """
    products = {candidate.node for candidate in candidates}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in products or node.op_type in QDQ:
            continue
        for place, name in enumerate(node.input):
            after = makers.get(name)
            before = makers.get(after.input[0]) if after is not None and after.op_type == "DequantizeLinear" else None
            if before is not None and before.op_type == "QuantizeLinear":
                node.input[place] = before.input[0]
    prune(model)


def add_weights(made: onnx.ModelProto, original: onnx.ModelProto | None, wanted: set[str]) -> None:
    if original is None:
        raise ValueError("the form `float` needs the original weights")
    present = {tensor.name for tensor in made.graph.initializer}
    made.graph.initializer.extend(tensor for tensor in original.graph.initializer if tensor.name in wanted - present)


def prune(model: onnx.ModelProto) -> None:
    """Remove quantisation nodes that nothing reads, then constants that nothing reads."""
    graph = model.graph
    while True:
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        idle = [node for node in graph.node if node.op_type in QDQ and not read & set(node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)


def stored_bytes(model: onnx.ModelProto) -> int:
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


@contextmanager
def running(model: onnx.ModelProto, spec: GraphSpec, folder: Path, *, threads: int = 0) -> Iterator[Session]:
    """A session of a graph in memory; its file is in `folder` while the session is open."""
    with TemporaryDirectory(dir=folder, prefix="variant-") as name:
        path = Path(name) / "graph.onnx"
        save(model, path)
        session = open_session(path, spec, threads=threads)
        try:
            yield session
        finally:
            session.close()


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with weights in a second file if they are too large for one; the model is not changed."""
    if stored_bytes(model) < LARGEST_FILE:
        onnx.save_model(model, path)
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # saving with external data clears the weights in the model
    onnx.save_model(copy, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
