"""One graph of a bundle as the manifest describes it: role, file, tensors with their slots, and ranges of axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from qpert.runtime.bundle.roles import OBJECT_MASKS, ROLES

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape` holds numbers, and the names of axes whose length varies.

    `slot` is what the tensor means (see `roles`); the name is the graph's own. `shared`: an input's first axis may also
    have length 1; that row then serves all rows of the other inputs, and what depends on it alone is computed once.
    """

    name: str
    slot: str
    dtype: str
    shape: tuple[int | str, ...]
    shared: bool = False

    @property
    def file_shape(self) -> tuple[int | str, ...]:
        """The shape as the ONNX file gives it: a shared axis has a name of its own there."""
        return (either_length(self.shape[0]), *self.shape[1:]) if self.shared else self.shape

    def to_dict(self) -> dict[str, Any]:
        values = {"name": self.name, "slot": self.slot, "dtype": self.dtype, "shape": list(self.shape)}
        return values | ({"shared": True} if self.shared else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TensorSpec:
        np.dtype(values["dtype"])  # TypeError for what is none
        shared = values.get("shared", False)
        return cls(values["name"], values["slot"], values["dtype"], tuple(values["shape"]), shared is True)


def either_length(axis: int | str) -> str:
    """The name, in an ONNX file, of an axis of that length or 1."""
    return f"{axis}_or_1"


@dataclass(frozen=True)
class AxisRange:
    """Lengths that a named axis may have: `min` to `max`, both inclusive."""

    min: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ValueError(f"a range goes from {self.min} to {self.max}")


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph: its role, its file, what goes in and out, and how long its named axes may be.

    `flops`: floating-point operations of a call's matrix products, two for a multiplication with addition, as a sum of
    products of axis lengths: `{"T*L": 5, "T*L*L": 2}` is 5·T·L + 2·T·L². Empty where nobody counted.
    """

    name: str
    role: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[str, AxisRange]
    flops: dict[str, int] = field(default_factory=dict)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    @property
    def takes_boxes(self) -> bool:
        return self.takes(OBJECT_MASKS)

    def takes(self, slot: str) -> bool:
        return any(spec.slot == slot for spec in self.inputs)

    def input(self, slot: str) -> TensorSpec:
        """The input of a slot. Raises KeyError where there is none."""
        return _of_slot(self.inputs, slot, self.name)

    def output(self, slot: str) -> TensorSpec:
        """The output of a slot. Raises KeyError where there is none."""
        return _of_slot(self.outputs, slot, self.name)

    def bind(self, slots: Mapping[str, T]) -> dict[str, T]:
        """Inputs by the graph's own names, of those slots that it takes and that are given."""
        return {spec.name: slots[spec.slot] for spec in self.inputs if spec.slot in slots}

    def by_slot(self, outputs: Mapping[str, T]) -> dict[str, T]:
        """Outputs by slot."""
        return {spec.slot: outputs[spec.name] for spec in self.outputs}

    def count_flops(self, lengths: dict[str, int]) -> int:
        """`flops` for a call with these axis lengths; 0 where nobody counted."""
        return sum(
            factor * math.prod(lengths[axis] for axis in product.split("*")) for product, factor in self.flops.items()
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "file": self.file,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
            "ranges": {axis: asdict(length) for axis, length in self.ranges.items()},
            "flops": self.flops,
        }

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> GraphSpec:
        """Raises KeyError, TypeError or ValueError where `values` describes no graph of its role."""
        graph = cls(
            name,
            values["role"],
            values["file"],
            tuple(TensorSpec.from_dict(spec) for spec in values["inputs"]),
            tuple(TensorSpec.from_dict(spec) for spec in values["outputs"]),
            {axis: AxisRange(int(length["min"]), int(length["max"])) for axis, length in values["ranges"].items()},
            {product: int(factor) for product, factor in values.get("flops", {}).items()},
        )
        graph.check()
        return graph

    def check(self) -> None:
        """Raises ValueError where an axis has no range, or a slot of the role is missing or given twice."""
        axes = {axis for spec in self.inputs for axis in spec.shape if isinstance(axis, str)}
        counted = {axis for product in self.flops for axis in product.split("*")}
        if unknown := sorted((axes | counted) - self.ranges.keys()):
            raise ValueError(f"graph {self.name!r} gives no range for the axes {', '.join(unknown)}")
        role = ROLES.get(self.role)
        if role is None:
            return
        slots_in, slots_out = [t.slot for t in self.inputs], [t.slot for t in self.outputs]
        missing = [slot for slot in role.inputs if slot not in slots_in]
        missing += [slot for slot in role.outputs if slot not in slots_out]
        if missing or len({*slots_in}) < len(slots_in) or len({*slots_out}) < len(slots_out):
            raise ValueError(
                f"graph {self.name!r} of role {self.role!r} has the slots {slots_in} and {slots_out}; expected "
                f"{list(role.inputs)} and {list(role.outputs)}, none twice"
            )


def _of_slot(specs: tuple[TensorSpec, ...], slot: str, graph: str) -> TensorSpec:
    for spec in specs:
        if spec.slot == slot:
            return spec
    raise KeyError(f"graph {graph!r} has no tensor of slot {slot!r}")
