"""A checkpoint's parameters under the network's names, each computed on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpert.exporter.checkpoints.files import TensorInfo, TensorStore
from qpert.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """Location of a parameter in the checkpoint: a tensor, or a third of its rows."""

    name: str
    third: int | None = None

    def shape(self, entries: Mapping[str, TensorInfo]) -> tuple[int, ...]:
        shape = entries[self.name].shape
        if self.third is None or not shape or shape[0] % 3:
            return shape
        return (shape[0] // 3, *shape[1:])


def unchanged(name: str, tensor: Tensor) -> Tensor:
    """The default adaptation: none."""
    return tensor


@dataclass(frozen=True)
class LazyTensors:
    """Parameters under the network's names. `get` reads one and keeps nothing.

    `adapt(name, tensor)` converts a parameter, such as position embeddings for another image size.
    """

    store: TensorStore
    origins: Mapping[str, Origin]
    adapt: Callable[[str, Tensor], Tensor] = unchanged

    def names(self) -> Iterable[str]:
        return self.origins.keys()

    def get(self, name: str) -> Tensor:
        """The parameter in its stored dtype (float32 for float64, and where `adapt` recomputes it).

        Raises:
            KeyError: no parameter has that name.
            CheckpointError: it cannot be read, or holds NaN or infinity, also after conversion to float32.
        """
        origin = self.origins[name]
        tensor = self._read(origin.name)
        check_finite(tensor, origin.name)
        if tensor.dtype == torch.float64:
            tensor = narrowed(tensor, torch.float32, origin.name)
        if origin.third is not None:
            tensor = tensor.chunk(3)[origin.third]
        return self.adapt(name, tensor)

    def _read(self, name: str) -> Tensor:
        try:
            return self.store.read(name).detach()
        except (OSError, RuntimeError, KeyError) as error:
            files = ", ".join(str(path) for path in self.store.files)
            raise CheckpointError(
                f"{name} cannot be read from {files} ({error}); was the checkpoint closed or changed in the meantime?",
                code="tensor-unreadable",
            ) from error


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` if the tensor holds NaN or infinity. One pass, without allocation."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # NaN where there is one
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise CheckpointError(
        f"{name} holds NaN or infinity in {bad:,} of its {tensor.numel():,} values; expected finite weights: the "
        "checkpoint is corrupt, or training diverged",
        code="weights-not-finite",
    )


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A finite tensor in another floating dtype.

    Raises:
        CheckpointError: a value is outside the range of `dtype` and would become infinite.
    """
    most = torch.finfo(dtype).max
    if tensor.numel() and tensor.is_floating_point() and torch.finfo(tensor.dtype).max > most:
        largest = max(abs(float(value)) for value in torch.aminmax(tensor))
        if largest > most:
            raise CheckpointError(
                f"{name} has values up to {largest:g}, but the largest {str(dtype).removeprefix('torch.')} is "
                f"{most:g}; export with --precision fp32 or bf16",
                code="weights-overflow",
            )
    return tensor.to(dtype)
