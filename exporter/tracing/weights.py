"""Weights as recipes: tracing records how each weight is computed, and writing computes it from the checkpoint.

A traced graph holds no values. Each of its weights is a parameter of the checkpoint, or a parameter that was
transposed, concatenated or cast by an operator whose inputs are all weights. `fold_weights` turns such operators into
recipes; `write_weights` evaluates the distinct recipes one after another, straight into an external data file. So
memory use is bounded by the largest tensor, and weights that several graphs share are stored once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from qpert.exporter.checkpoints.parameters import narrowed

if TYPE_CHECKING:
    from typing import BinaryIO

ALIGNMENT = 4096
"""Offsets in the data file are multiples of a page, so that runtimes can map tensors straight from the file."""

TORCH_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}


class TensorSource(Protocol):
    """A source of parameters, read one at a time."""

    def get(self, name: str) -> Tensor:
        """The parameter of that name, in any floating-point dtype."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A weight as an operator on weights. `kind` is `parameter` (of `name`), `constant`, or an ONNX operator."""

    kind: str
    name: str
    dtype: int
    shape: tuple[int, ...]
    parts: tuple[Recipe, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    values: bytes = field(default=b"", repr=False)

    @property
    def key(self) -> str:
        """Equal for recipes with the same result."""
        return json.dumps(self._description())

    def _description(self) -> list[Any]:
        leaf = self.name if self.kind == "parameter" else self.values.hex()
        return [self.kind, leaf, self.dtype, self.shape, self.attributes, [part._description() for part in self.parts]]

    def parameters(self) -> set[str]:
        own = {self.name} if self.kind == "parameter" else set()
        return own.union(*(part.parameters() for part in self.parts))

    def evaluate(self, source: TensorSource) -> Tensor:
        """The tensor, in this recipe's dtype. Raises CheckpointError if a value is outside that dtype's range."""
        dtype = TORCH_DTYPES[self.dtype]
        if self.kind == "parameter":
            return narrowed(source.get(self.name), dtype, self.name).reshape(self.shape)
        if self.kind == "constant":
            return torch.frombuffer(bytearray(self.values), dtype=dtype).reshape(self.shape)
        return OPERATORS[self.kind].evaluate(self, [part.evaluate(source) for part in self.parts]).to(dtype)


@dataclass(frozen=True)
class FoldableOperator:
    """An ONNX operator that `fold_weights` supports: how its result's name, shape and values follow from its inputs."""

    name: Callable[[list[Recipe]], str]
    shape: Callable[[list[Recipe], dict[str, Any]], tuple[int, ...]]
    evaluate: Callable[[Recipe, list[Tensor]], Tensor]


def _concatenated_shape(parts: list[Recipe], attributes: dict[str, Any]) -> tuple[int, ...]:
    shape = list(parts[0].shape)
    shape[attributes["axis"]] = sum(part.shape[attributes["axis"]] for part in parts)
    return tuple(shape)


OPERATORS: dict[str, FoldableOperator] = {
    "Transpose": FoldableOperator(
        lambda parts: f"{parts[0].name}.transposed",
        lambda parts, attributes: tuple(parts[0].shape[axis] for axis in attributes["perm"]),
        lambda recipe, parts: parts[0].permute(dict(recipe.attributes)["perm"]),
    ),
    "Reshape": FoldableOperator(
        lambda parts: f"{parts[0].name}.reshaped",
        lambda parts, attributes: tuple(attributes["shape"]),
        lambda recipe, parts: parts[0].reshape(dict(recipe.attributes)["shape"]),
    ),
    "Concat": FoldableOperator(
        lambda parts: f"{parts[0].name}.and_{len(parts) - 1}_more",
        _concatenated_shape,
        lambda recipe, parts: torch.cat(parts, dim=dict(recipe.attributes)["axis"]),
    ),
}


@dataclass
class WeightedGraph:
    """A graph whose weights are placeholders (external data that does not exist yet), with their recipes."""

    graph: gs.Graph
    recipes: dict[str, Recipe]


def placeholder(name: str, recipe: Recipe) -> gs.Constant:
    """A constant with its recipe's name and no values; graph-surgeon passes it through unchanged."""
    proto = onnx.TensorProto(name=name, data_type=recipe.dtype, dims=recipe.shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    proto.external_data.add(key="location", value="not written yet")
    return gs.Constant(name, gs.ir.tensor.LazyValues(proto))


def weighted_graph(model: onnx.ModelProto, weights: Mapping[str, str]) -> WeightedGraph:
    """Convert the graph inputs that are parameters to placeholders.

    Args:
        model: a traced model whose parameters are inputs.
        weights: input name → parameter name.
    """
    graph = gs.import_onnx(model)
    recipes: dict[str, Recipe] = {}
    kept = []
    for tensor in graph.inputs:
        if tensor.name not in weights:
            kept.append(tensor)
            continue
        name = weights[tensor.name]
        dtype = (
            onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype) if not isinstance(tensor.dtype, int) else tensor.dtype
        )
        recipes[name] = Recipe("parameter", name, dtype, tuple(tensor.shape))
        replace_everywhere(tensor, placeholder(name, recipes[name]))
    graph.inputs = kept
    return WeightedGraph(graph.cleanup().toposort(), recipes)


def replace_everywhere(old: gs.Tensor, new: gs.Tensor) -> None:
    for node in list(old.outputs):
        node.inputs = [new if tensor is old else tensor for tensor in node.inputs]


def fold_weights(weighted: WeightedGraph) -> WeightedGraph:
    """Replace every Transpose, Reshape and Concat whose inputs are all weights (or constants) by a recipe."""
    graph, recipes = weighted.graph, dict(weighted.recipes)
    for node in graph.toposort().nodes:
        operator = OPERATORS.get(node.op)
        if operator is None:
            continue
        attributes, tensors = operands(node)
        parts = [recipe_of(tensor, recipes) for tensor in tensors]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not any(part.parameters() for part in known):
            continue
        recipe = Recipe(
            node.op,
            free_name(operator.name(known), recipes),
            known[0].dtype,
            operator.shape(known, attributes),
            tuple(known),
            tuple(sorted(attributes.items())),
        )
        recipes[recipe.name] = recipe
        replace_everywhere(node.outputs[0], placeholder(recipe.name, recipe))
    graph.cleanup()
    used = {name for name, tensor in graph.tensors().items() if isinstance(tensor, gs.Constant)}
    return WeightedGraph(graph, {name: recipe for name, recipe in recipes.items() if name in used})


def free_name(name: str, taken: Mapping[str, Recipe]) -> str:
    """`name`, with a number appended if another recipe has it."""
    numbered = (f"{name}.{number}" for number in itertools.count(2))
    return next(candidate for candidate in (name, *itertools.islice(numbered, len(taken))) if candidate not in taken)


def operands(node: gs.Node) -> tuple[dict[str, Any], list[gs.Tensor]]:
    """A node's attributes and data inputs. A Reshape's constant shape counts as an attribute."""
    if node.op != "Reshape":
        return dict(node.attrs), list(node.inputs)
    tensor, shape = node.inputs
    if not isinstance(shape, gs.Constant) or (shape.values < 1).any():
        return {}, list(node.inputs)
    return {"shape": tuple(int(length) for length in shape.values)}, [tensor]


def recipe_of(tensor: gs.Tensor, recipes: Mapping[str, Recipe]) -> Recipe | None:
    """The recipe of a tensor that is a weight or a float32 constant, else None."""
    if tensor.name in recipes:
        return recipes[tensor.name]
    if not isinstance(tensor, gs.Constant) or tensor.dtype != "float32":
        return None
    return Recipe("constant", tensor.name, onnx.TensorProto.FLOAT, tuple(tensor.shape), values=tensor.values.tobytes())


@dataclass(frozen=True)
class Stored:
    """Location of a weight: file, offset and length in bytes."""

    location: str
    offset: int
    length: int


def write_weights(
    stream: BinaryIO,
    location: str,
    recipes: Iterable[Recipe],
    source: TensorSource,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Stored]:
    """Evaluate each distinct recipe once into `stream`; returns their locations by `Recipe.key`."""
    stored: dict[str, Stored] = {}
    for recipe in recipes:
        key = recipe.key
        if key in stored:
            continue
        data = recipe.evaluate(source).contiguous().reshape(-1).view(torch.uint8).numpy()
        stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
        stored[key] = Stored(location, stream.tell(), data.nbytes)
        stream.write(data.data)
        if on_bytes is not None:
            on_bytes(data.nbytes)
    return stored


def point_to(model: onnx.ModelProto, recipes: Mapping[str, Recipe], stored: Mapping[str, Stored]) -> None:
    """Set the location in the data file of every placeholder initializer of `model`."""
    for tensor in model.graph.initializer:
        if tensor.name not in recipes:
            continue
        place = stored[recipes[tensor.name].key]
        del tensor.external_data[:]
        for name in ("location", "offset", "length"):
            tensor.external_data.add(key=name, value=str(getattr(place, name)))
