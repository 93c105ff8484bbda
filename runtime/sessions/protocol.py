"""What every session is, whatever runs it, and the checks of its inputs.

`check_inputs` is driven by the graph's declared inputs: names, then dtypes, then shapes, then ranges. A backend is only
what differs: `onnx` for ONNX Runtime, `tensorrt.session` for engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.errors import InputError, LimitError
from qpert.runtime.sessions.device import DeviceArray

Array = np.ndarray | DeviceArray
Arrays = Mapping[str, Array]

AXIS_MEANING = {
    "B": ("images", "--max-batch"),
    "I": ("images", "--max-batch"),
    "O": ("boxes an image", "--max-boxes"),
    "T": ("texts", "--max-text"),
    "L": ("tokens a text", "--max-length"),
}


class Session(Protocol):
    """Runs one graph. A context manager; after `close` it cannot run.

    Inputs may also be what `run_on_device` of another session of the same provider left in GPU memory.
    """

    spec: GraphSpec

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Inputs and outputs by name, as `spec` declares them. Raises InputError or LimitError where they differ."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class DeviceSession(Protocol):
    """A session on a GPU, which can leave its outputs there."""

    def run_on_device(self, inputs: Arrays) -> dict[str, DeviceArray]: ...


def run_on_device(session: Session, inputs: Arrays) -> Mapping[str, Array]:
    """Run a graph and leave its outputs where it ran: in GPU memory, or on the host where the session is no GPU's."""
    return session.run_on_device(inputs) if isinstance(session, DeviceSession) else session.run(inputs)


def check_inputs(spec: GraphSpec, inputs: Arrays) -> None:
    """Names, dtypes, shapes and ranges of `inputs` against `spec`; axes of one name must have one length, but
    for a single row of a `shared` input.

    Raises:
        InputError: a name, dtype or shape differs.
        LimitError: an axis is longer or shorter than the bundle was exported for.
    """
    if set(inputs) != set(spec.input_names):
        raise InputError(
            f"graph {spec.name!r} got inputs {sorted(inputs)}, expected {sorted(spec.input_names)}", code="graph-inputs"
        )
    lengths: dict[str, int] = {}
    for tensor in spec.inputs:
        array = inputs[tensor.name]
        got, expected = f"{array.dtype} {list(array.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        message = f"input {tensor.name!r} of graph {spec.name!r} is {got}, expected {expected}"
        if array.dtype != np.dtype(tensor.dtype) or array.ndim != len(tensor.shape):
            raise InputError(message, code="graph-input-shape")
        serves_all = tensor.shared and array.shape[0] == 1
        for length, axis in list(zip(array.shape, tensor.shape, strict=True))[serves_all:]:
            wanted = lengths.setdefault(axis, length) if isinstance(axis, str) else axis
            if length != wanted:
                raise InputError(
                    f"{message} with {axis} = {wanted}" if isinstance(axis, str) else message, code="graph-input-shape"
                )
    for axis, length in lengths.items():
        check_range(spec, axis, length)


def check_range(spec: GraphSpec, axis: str, length: int) -> None:
    allowed = spec.ranges[axis]
    if allowed.min <= length <= allowed.max:
        return
    what, option = AXIS_MEANING.get(axis, (axis, "the profile's upper end"))
    raise LimitError(
        f"graph {spec.name!r} got {length} {what}, expected {allowed.min} to {allowed.max}; "
        f"pass fewer, or export again with a larger {option}",
        code="limit-axis",
    )


def closed_error(spec: GraphSpec) -> InputError:
    return InputError(f"the session of graph {spec.name!r} is closed; open the bundle again", code="session-closed")
