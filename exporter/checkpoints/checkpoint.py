"""An open checkpoint, whatever family it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from qpert.exporter.checkpoints.files import TensorStore
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.inputs.preprocessing import ImagePreprocessing


class ParameterSource(Protocol):
    """A network's parameters by its own names, each made when it is asked for."""

    @property
    def store(self) -> TensorStore: ...

    def names(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. A context manager.

    `config` is the family's own, at the image size to be exported. `tensors` go by the names of the family's network.
    `tokenizer`: the vocabulary beside the weights, where there is one. `notes` say what was assumed, not read.
    `preprocessing`: what the checkpoint, or its family, does with pictures.
    """

    config: Any
    record: CheckpointRecord
    tensors: ParameterSource
    tokenizer: Path | None
    notes: tuple[str, ...]
    preprocessing: ImagePreprocessing
    folder: Path | None = None

    def close(self) -> None:
        self.tensors.store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All parameters as float32, for `network.load_state_dict(…, strict=True, assign=True)`.

    Where the file holds float32 the result stays mapped to it, so that memory is taken only as it is used.
    """
    return {name: checkpoint.tensors.get(name).float() for name in checkpoint.tensors.names()}


Progress = Callable[[str, int, int | None], None]
"""Hears of downloads and hashing: what, bytes done, bytes in all."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """The default listener."""
