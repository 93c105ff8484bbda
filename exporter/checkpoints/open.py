"""`--checkpoint`: whatever a user has, as one `Checkpoint` with LAVIS's names, checked tensor by tensor.

source → files → TensorStore → family, dimensions → strict names → LazyTensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from torch import Tensor

from qpert.exporter.checkpoints import files as sources
from qpert.exporter.checkpoints.download import Progress, download, download_snapshot
from qpert.exporter.checkpoints.files import TensorInfo, TensorStore
from qpert.exporter.checkpoints.parameters import LazyTensors
from qpert.exporter.families.blip2 import architecture
from qpert.exporter.families.blip2.architecture import ArchitectureOptions
from qpert.exporter.families.blip2.hub_config import (
    UNKNOWN_LICENSE,
    HubConfig,
    check_agreement,
    license_of,
    read_hub_config,
    vocabulary_in,
)
from qpert.exporter.families.blip2.infer_missing import complete
from qpert.exporter.families.blip2.names import Origin, check_names, lavis_origins, unused_in_vision_file
from qpert.graphs.families.blip2.config import CONFIGS, Blip2Config
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.errors import CheckpointError, InputError
from qpert.runtime.files import cache_folder

LAVIS_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
VISION_PREFIX = "visual_encoder."


@dataclass(frozen=True)
class NamedCheckpoint:
    """A published checkpoint. `vision_file` holds the backbone where LAVIS saved the rest without it."""

    file: str
    config: Blip2Config
    vision_file: str | None = None
    license: str = "BSD-3-Clause (LAVIS)"


NAMED: dict[str, NamedCheckpoint] = {
    "coco": NamedCheckpoint("blip2_finetune_coco.pth", CONFIGS["coco"]),
    "pretrain": NamedCheckpoint("blip2_pretrained.pth", CONFIGS["pretrain"], "eva_vit_g.pth"),
    "pretrain_vitL": NamedCheckpoint("blip2_pretrained_vitL.pth", CONFIGS["pretrain_vitL"], "clip_vit_L.pth"),
}

DEMO = "demo"
FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. `config` is at the image size to be exported; `notes` say what was assumed, not read."""

    config: Blip2Config
    record: CheckpointRecord
    tensors: LazyTensors
    tokenizer: Path | None
    notes: tuple[str, ...]

    def close(self) -> None:
        self.tensors.store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Opened:
    """Files found and opened, not yet understood."""

    name: str
    source: str
    store: TensorStore
    hub: HubConfig | None = None
    known: Blip2Config | None = None
    license: str = UNKNOWN_LICENSE
    folder: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What names and shapes alone decide: no number has been read."""

    family: str
    config: Blip2Config
    origins: dict[str, Origin]
    notes: tuple[str, ...]


def no_progress(what: str, done: int, total: int | None) -> None:
    """The default listener."""


def open_checkpoint(
    source: str,
    *,
    image_size: int | None = None,
    options: ArchitectureOptions = ArchitectureOptions(),  # noqa: B008 (frozen)
    progress: Progress = no_progress,
) -> Checkpoint:
    """Open what `--checkpoint` names: a published name, a file, a Hugging Face folder or id.

    Args:
        source: `demo`, a name in `NAMED`, FILE.pth, FILE.safetensors (LAVIS names), a folder, or `organisation/name`.
        image_size: side in pixels to export for; None keeps the checkpoint's. Position embeddings are interpolated.
        options: what tensors do not tell.
        progress: hears of downloads and hashing.

    Raises:
        CheckpointError: nothing there, unreadable, another architecture, or tensors missing, extra, misshaped.
        InputError: `image_size` is no multiple of the patch.
        UnavailableError: it has to be downloaded and cannot be.
    """
    if source == DEMO:
        from qpert.exporter.demo import open_demo

        return open_demo(image_size)
    opened = find(source, options, progress)
    try:
        plan = plan_checkpoint(opened.store.entries, opened.source, options, hub=opened.hub, known=opened.known)
        size = plan.config.vision.image_size if image_size is None else image_size
        config = at_image_size(replace(plan.config, name=opened.name), size)
        digest = sources.hash_files(opened.store.files, progress)
    except BaseException:
        opened.store.close()
        raise
    tensors = LazyTensors(opened.store, plan.origins, plan.config, size)
    record = CheckpointRecord(opened.name, opened.source, plan.family, digest, opened.license)
    notes = (*opened.store.notes, *plan.notes, *size_note(plan.config, size))
    return Checkpoint(config, record, tensors, vocabulary_in(opened.folder), notes)


def load_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All parameters as float32, for `Blip2Retrieval.load_state_dict(…, strict=True, assign=True)`.

    Where the file holds float32 the result stays mapped to it, so that memory is taken only as it is used.
    """
    return {name: checkpoint.tensors.get(name).float() for name in checkpoint.tensors.names()}


def plan_checkpoint(
    entries: Mapping[str, TensorInfo],
    source: str,
    options: ArchitectureOptions = ArchitectureOptions(),  # noqa: B008 (frozen)
    *,
    hub: HubConfig | None = None,
    known: Blip2Config | None = None,
) -> Plan:
    """Family, dimensions and the place of every parameter, from names, shapes and dtypes.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    family = architecture.family_of(entries, source)
    if family == "lavis" and not architecture.has_vision(entries):
        raise CheckpointError(
            f"{source} holds no visual_encoder tensors: LAVIS saves checkpoints of a frozen vision transformer without "
            f"it. Pass the backbone's file too, --vision-checkpoint eva_vit_g.pth (or clip_vit_L.pth), from {LAVIS_URL}"
        )
    measured = architecture.measure(
        architecture.lavis_shapes(lavis_origins(family, entries), entries), name="checkpoint"
    )
    origins = check_names(source, family, entries, architecture.parameter_shapes(measured))
    if options.vision_layers not in (None, measured.vision.layers):
        raise CheckpointError(
            f"--vision-layers says {options.vision_layers}, {source} has {measured.vision.layers} vision layers; "
            "leave the option out: it chooses among the blocks of a --vision-checkpoint"
        )
    if hub is not None:
        check_agreement(hub, measured)
    config, notes = complete(measured, options, hub, known)
    if known is not None and replace(config, name=known.name) != known:
        raise CheckpointError(
            f"{source} is not the published {known.name!r}: got {config}, expected {known}; delete it, so that it "
            "is downloaded again, or pass it by its path if it is meant"
        )
    return Plan(family, config, origins, (*(hub.notes if hub else ()), *notes))


def find(source: str, options: ArchitectureOptions, progress: Progress) -> Opened:
    """Open the files of `source`, downloading what has to be."""
    if source in NAMED:
        return open_named(source, options, progress)
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a folder on the way that may not be entered, a name too long, ~nobody
        raise CheckpointError(f"{source} cannot be read ({error}); check its name and permissions") from error
    if is_folder:
        return open_hub_folder(path, path.resolve().name, str(path), options)
    if exists or path.suffix in FILE_SUFFIXES:
        return open_file(path, options)
    if HUB_ID.fullmatch(source):
        return open_hub_folder(download_snapshot(source), source, f"https://huggingface.co/{source}", options)
    raise CheckpointError(
        f"{source!r} is no checkpoint: neither a file nor a folder of that name is here; expected one of "
        f"{', '.join((DEMO, *NAMED))}, a LAVIS FILE.pth, a Hugging Face folder or id (organisation/name)"
    )


def open_named(name: str, options: ArchitectureOptions, progress: Progress) -> Opened:
    spec = NAMED[name]
    refuse_vision_file(options, f"the named checkpoint {name!r} comes with its own")
    store, source = open_cached(spec.file, progress), LAVIS_URL + spec.file
    if spec.vision_file is not None:
        vision = open_cached(spec.vision_file, progress)
        store = sources.merge(store, vision_tensors(vision, spec.config.vision.layers))
        source += f" and {LAVIS_URL}{spec.vision_file}"
    return Opened(name, source, store, known=spec.config, license=spec.license)


def open_cached(file: str, progress: Progress) -> TensorStore:
    """The LAVIS file from the cache folder, downloaded if it is not there."""
    path = cache_folder() / "checkpoints" / file
    if not path.is_file():
        download(LAVIS_URL + file, path, progress=progress)
    try:
        return sources.open_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Delete {path}, so that it is downloaded again") from error


def open_file(path: Path, options: ArchitectureOptions) -> Opened:
    store = sources.open_tensors(path)
    if architecture.family_of(store.entries, str(path)) == "huggingface":
        raise CheckpointError(
            f"{path} has Hugging Face names, whose head counts are in config.json beside it; pass the folder "
            f"{path.parent} instead of the file"
        )
    source = str(path)
    if options.vision_checkpoint is not None:
        if architecture.has_vision(store.entries):
            refuse_vision_file(options, f"{path} holds the vision transformer itself")
        vision = sources.open_tensors(options.vision_checkpoint)
        store = sources.merge(store, vision_tensors(vision, options.vision_layers))
        source += f" and {options.vision_checkpoint}"
    return Opened(path.stem, source, store)


def open_hub_folder(folder: Path, name: str, source: str, options: ArchitectureOptions) -> Opened:
    refuse_vision_file(options, "a Hugging Face folder holds the vision transformer itself")
    hub = read_hub_config(folder)
    return Opened(name, source, sources.open_folder(folder), hub=hub, license=license_of(folder), folder=folder)


def refuse_vision_file(options: ArchitectureOptions, why: str) -> None:
    if options.vision_checkpoint is not None:
        raise CheckpointError(f"--vision-checkpoint {options.vision_checkpoint} has no place here: {why}; leave it out")


def vision_tensors(store: TensorStore, layers: int | None) -> TensorStore:
    """A vision backbone's file as the `visual_encoder.` part of a checkpoint, without what LAVIS leaves out of it."""
    layers, notes = architecture.backbone_layers(store.entries, layers, str(store.files[0]))
    unused = unused_in_vision_file(store.entries, layers)
    kept = {name: info for name, info in store.entries.items() if name not in unused}
    return sources.with_prefix(replace(store, entries=kept, notes=(*store.notes, *notes)), VISION_PREFIX)


def at_image_size(config: Blip2Config, image_size: int) -> Blip2Config:
    """`config` at `image_size`; raises `InputError` where that is no positive multiple of the patch size."""
    patch = config.vision.patch_size
    if image_size < patch:
        raise InputError(f"image size {image_size} is not a positive multiple of the patch size {patch}")
    try:
        return config.with_image_size(image_size)
    except ValueError as error:
        raise InputError(str(error)) from error


def size_note(config: Blip2Config, image_size: int) -> tuple[str, ...]:
    own = config.vision.image_size
    if image_size == own:
        return ()
    patch = config.vision.patch_size
    return (
        f"position embeddings interpolated from {own} px ({own // patch}×{own // patch} patches) to {image_size} px "
        f"({image_size // patch}×{image_size // patch}), bicubic, as LAVIS does",
    )
