"""Split a bundle's query head into three parts, so that a grid of settings shares as much as possible.

    image tokens ── keys ─┬── keys ── maps ── query maps ──┐
                          └── all else of the image ───────┴── queries ── image vectors

Keys and values depend on the image alone; the projectors inside the query maps on keys, boxes and threshold; only the
rest depends on the boxes' weights. The cuts follow from the dependencies between tensors and from the names that the
lowering gives to its nodes. Every operator of the parts comes from the bundle, and
`qpert.calibration.perturbation.split_encoder` compares them with the whole graph before using them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpert.graphs.perturbation.names import PREFIX, THRESHOLD
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.roles import BOX_SLOTS, IMAGE_TOKENS, IMAGE_VECTORS
from qpert.runtime.errors import BundleError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

_LOWERED = re.compile(rf"{PREFIX}(_\d+)?/")
_SIZE_OPERATORS = ("Shape", "Size")
"""They read the size of a tensor, not its values."""


@dataclass(frozen=True)
class GraphPart:
    """One part in its own file, with the names of its inputs and outputs."""

    file: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class SplitGraph:
    """The parts of one query head.

    keys: image tokens → what the others need from the image. maps: keys, object masks, box weights and `threshold`
    (float32 scalar) → query maps. queries: the rest of the image and query maps → image vectors; a graph input
    whose size alone is read is an input too.
    """

    keys: GraphPart
    maps: GraphPart
    queries: GraphPart


def split_query_head(path: Path, head: GraphSpec, folder: Path) -> SplitGraph:
    """Cut the query head in the file `path` and write the parts, each with its weights, into `folder`.

    Raises:
        BundleError: the graph has no query maps, no threshold that can be replaced, or cannot be read.
    """
    import onnx

    from qpert.calibration.graph_files import load_graph

    try:
        model = load_graph(path)
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise BundleError(f"onnx cannot read {path} with its weights: {error}", code="graph-unreadable") from error
    if not head.takes_boxes:
        raise _no_perturbation(path)
    flow, vectors = _Flow(model.graph, head), head.output(IMAGE_VECTORS).name
    maps_out = [name for name in flow.leaving_scope() if name in flow.of_boxes]
    maps_in, maps_sizes = flow.needed_by(maps_out, stop=flow.comes_from_image)
    queries_in, sizes = flow.needed_by([vectors], stop=lambda name: name in maps_out or flow.comes_from_image(name))
    if not maps_out or not maps_in or not set(maps_out) <= set(queries_in):
        raise _no_perturbation(path)
    thresholds = threshold_names(model.graph)
    if not thresholds:
        raise BundleError(
            f"{path} has no initializer named …/threshold; export the bundle again with this version",
            code="threshold-missing",
        )
    from_image = [name for name in dict.fromkeys([*maps_in, *queries_in]) if name not in maps_out]
    folder.mkdir(parents=True, exist_ok=True)
    return SplitGraph(
        keys=_write(folder / "keys.onnx", model, [head.input(IMAGE_TOKENS).name], from_image),
        maps=_write(folder / "maps.onnx", model, [*maps_in, *maps_sizes], maps_out, as_input=thresholds),
        queries=_write(folder / "queries.onnx", model, [*queries_in, *sizes], [vectors]),
    )


def _no_perturbation(path: Path) -> BundleError:
    return BundleError(
        f"{path} holds no query perturbation that can be cut out; export it with --perturb itc",
        code="graph-without-perturbation",
    )


def threshold_names(graph: GraphProto) -> list[str]:
    """The initializers that hold τ."""
    return [t.name for t in graph.initializer if _LOWERED.match(t.name) and t.name.rpartition("/")[2] == THRESHOLD]


class _Flow:
    """Dependencies between the tensors of a graph."""

    def __init__(self, graph: GraphProto, head: GraphSpec) -> None:
        self.graph = graph
        self.inputs = [value.name for value in graph.input]
        self.producer: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output}
        self.of_image = self._influenced({head.input(IMAGE_TOKENS).name})
        self.of_boxes = self._influenced({head.input(slot).name for slot in BOX_SLOTS})

    def _influenced(self, sources: set[str]) -> set[str]:
        """Tensors whose values depend on `sources`; nodes are in topological order."""
        found = {name for name in sources if name in self.inputs}
        for node in self.graph.node:
            if node.op_type not in _SIZE_OPERATORS and not found.isdisjoint(node.input):
                found.update(node.output)
        return found

    def comes_from_image(self, name: str) -> bool:
        """Whether a tensor depends on the image alone and was not added by the lowering."""
        if name not in self.of_image or name in self.of_boxes or name in self.inputs:
            return False
        return not _LOWERED.match(self.producer[name].name)

    def leaving_scope(self) -> list[str]:
        """Outputs of lowered nodes that other nodes read, or that are graph outputs."""
        readers = [name for node in self.graph.node if not _LOWERED.match(node.name) for name in node.input]
        outside = {*readers, *(value.name for value in self.graph.output)}
        lowered = [node for node in self.graph.node if _LOWERED.match(node.name)]
        return [name for node in lowered for name in node.output if name in outside]

    def needed_by(self, outputs: Iterable[str], *, stop: Callable[[str], bool]) -> tuple[list[str], list[str]]:
        """Walking back from `outputs`: the tensors at which `stop` is true, and the graph inputs reached otherwise."""
        stopped: dict[str, None] = {}
        reached: dict[str, None] = {}
        seen: set[str] = set()
        names = [name for output in outputs for name in self.producer[output].input]
        while names:
            name = names.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            if stop(name):
                stopped[name] = None
            elif name in self.inputs:
                reached[name] = None
            elif name in self.producer:
                names.extend(self.producer[name].input)
        return list(stopped), list(reached)


def _write(
    file: Path, model: ModelProto, inputs: list[str], outputs: list[str], *, as_input: Iterable[str] = ()
) -> GraphPart:
    """The nodes between `inputs` and `outputs` as a model of their own; `as_input`: initializers given as τ."""
    import onnx
    from onnx.helper import make_graph, make_node, make_tensor_value_info

    replaced = set(as_input)
    nodes = _between(model.graph, inputs, outputs)
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in used - replaced]
    values = {value.name: value for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]}
    given = [_without_shape(values[name]) for name in inputs]
    if replaced:
        given.append(make_tensor_value_info(THRESHOLD, onnx.TensorProto.FLOAT, []))
        nodes = [*(make_node("Identity", [THRESHOLD], [name]) for name in sorted(replaced)), *nodes]
    graph = make_graph(nodes, file.stem, given, [_without_shape(values[name]) for name in outputs], weights)
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    onnx.save_model(part, file)
    return GraphPart(file, tuple(value.name for value in given), tuple(outputs))


def _between(graph: GraphProto, inputs: list[str], outputs: list[str]) -> list[NodeProto]:
    """The nodes that `outputs` need, given `inputs`, in their order."""
    needed = set(outputs) - set(inputs)
    chosen: list[NodeProto] = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            chosen.append(node)
            needed.update(name for name in node.input if name not in inputs)
    return chosen[::-1]


def _without_shape(value: ValueInfoProto) -> ValueInfoProto:
    """The dtype alone: axes that were one length in the whole graph may differ in a part."""
    import onnx

    return onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, None)
