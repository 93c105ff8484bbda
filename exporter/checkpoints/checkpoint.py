"""An open checkpoint of any family."""

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
    """A network's parameters under its own names, each computed on request."""

    @property
    def store(self) -> TensorStore: ...

    def names(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. A context manager.

    `config`: the family's own, at the image size to export. `tensors`: under the names of the family's network.
    `tokenizer`: the vocabulary in the checkpoint's folder, if there is one. `notes`: what was assumed rather than read.
    `preprocessing`: how the checkpoint, or else its family, prepares images.
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

    float32 tensors stay mapped to the file, so memory is used only for what is read.
    """
    return {name: checkpoint.tensors.get(name).float() for name in checkpoint.tensors.names()}


Progress = Callable[[str, int, int | None], None]
"""Called during downloads and hashing: progress(what, bytes done, total bytes or None)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """The default callback: does nothing."""
