"""Opens a Hugging Face folder of a two-tower model as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress
from qpert.exporter.checkpoints.files import extra_notes, foreign_extras, hash_files, open_folder
from qpert.exporter.checkpoints.hub_folder import license_of
from qpert.exporter.checkpoints.image_processor import read_preprocessing
from qpert.exporter.checkpoints.locate import locate
from qpert.exporter.checkpoints.parameters import LazyTensors, Origin
from qpert.exporter.checkpoints.state_dicts import without_prefixes
from qpert.exporter.hub.towers import Shape, check_tensors, parts_of
from qpert.graphs.transformer import VisionConfig, interpolate_positions
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.errors import CheckpointError, InputError


class TowerConfig(Protocol):
    """What the configurations of two-tower models have in common."""

    @property
    def vision(self) -> VisionConfig: ...

    def with_image_size(self, image_size: int) -> Any: ...


@dataclass(frozen=True)
class FolderFormat:
    """How a family's folder is read.

    `read_config(folder, name=…)` returns the configuration and notes; `expected_shapes` the required tensors; `unused`
    are tensors that may exist too. `positions`: the parameter to interpolate for another image size, which has
    `prefix_tokens` rows before the patches'. `processor`: the image processor of a file that names none.
    """

    expected: str
    read_config: Callable[..., tuple[Any, tuple[str, ...]]]
    expected_shapes: Callable[[Any], dict[str, Shape]]
    unused: frozenset[str]
    positions: str
    prefix_tokens: int
    processor: str


def open_checkpoint(source: str, form: FolderFormat, *, image_size: int | None, progress: Progress) -> Checkpoint:
    """Open the folder or hub id that `source` names.

    Raises:
        CheckpointError: missing, another model, or files that contradict each other.
        InputError: `image_size` is smaller than a patch.
        UnavailableError: it is not local and cannot be downloaded.
    """
    located = locate(source, (), form.expected)
    if located.folder is None:
        raise CheckpointError(
            f"{source} is a file; expected {form.expected}: config.json, the image processor and the tokenizer "
            "are separate files",
            code="checkpoint-not-folder",
        )
    folder = located.folder
    config, notes = form.read_config(folder, name=located.name)
    prepared = read_preprocessing(
        folder, default_type=form.processor, tower_size=config.vision.image_size, image_size=image_size
    )
    store = without_prefixes(open_folder(folder))
    expected = form.expected_shapes(config)
    try:
        check_tensors(store.entries, expected, form.unused, str(folder))
        size = config.vision.image_size if image_size is None else image_size
        resized = at_image_size(config, size)
        digest = hash_files(store.files, progress)
    except BaseException:
        store.close()
        raise
    origins = {name: Origin(name) for name in expected}
    extras = [name for name in foreign_extras(store.entries, parts_of(expected)) if name not in form.unused]
    tensors = LazyTensors(store, origins, positions_for(form, resized))
    record = CheckpointRecord(located.name, located.source, "huggingface", digest, license_of(folder))
    notes = (*store.notes, *extra_notes(extras), *notes, *prepared.notes, *size_note(config, size))
    return Checkpoint(resized, record, tensors, folder, notes, prepared.preprocessing, folder)


def at_image_size(config: TowerConfig, image_size: int) -> Any:
    """`config` at another image size; raises InputError if not even one patch fits."""
    try:
        return config.with_image_size(image_size)
    except ValueError as error:
        raise InputError(f"--image-size: {error}; expected at least one patch", code="image-size") from error


def positions_for(form: FolderFormat, config: TowerConfig) -> Callable[[str, Tensor], Tensor]:
    """A function that interpolates the position embeddings if the exported grid differs."""

    def adapt(name: str, tensor: Tensor) -> Tensor:
        rows = form.prefix_tokens + config.vision.patches
        if name != form.positions or len(tensor) == rows:
            return tensor
        return interpolate_positions(tensor, config.vision.grid, prefix_tokens=form.prefix_tokens)

    return adapt


def size_note(config: TowerConfig, image_size: int) -> tuple[str, ...]:
    own = config.vision
    if image_size == own.image_size:
        return ()
    grid = image_size // own.patch_size
    return (
        f"position embeddings interpolated from {own.image_size} px ({own.grid}×{own.grid} patches) to {image_size} px "
        f"({grid}×{grid}), bicubic, as transformers does",
    )
