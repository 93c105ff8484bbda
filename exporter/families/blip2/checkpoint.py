"""Opens `--checkpoint` in any supported form as a `Checkpoint` with LAVIS's names, checked tensor by tensor.

source → files → TensorStore → format, dimensions → strict names → LazyTensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qpert.exporter import demo
from qpert.exporter.checkpoints import files as sources
from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress, no_progress
from qpert.exporter.checkpoints.download import download
from qpert.exporter.checkpoints.files import TensorInfo, TensorStore, extra_notes
from qpert.exporter.checkpoints.hub_folder import UNKNOWN_LICENSE, license_of, vocabulary_in
from qpert.exporter.checkpoints.image_processor import read_preprocessing
from qpert.exporter.checkpoints.locate import Located, locate
from qpert.exporter.checkpoints.parameters import LazyTensors, Origin
from qpert.exporter.checkpoints.state_dicts import without_prefixes
from qpert.exporter.families.blip2 import architecture
from qpert.exporter.families.blip2.architecture import ArchitectureOptions
from qpert.exporter.families.blip2.demonstration import open_demo
from qpert.exporter.families.blip2.hub_config import (
    HubConfig,
    check_agreement,
    read_hub_config,
)
from qpert.exporter.families.blip2.infer_missing import infer_missing
from qpert.exporter.families.blip2.names import check_names, foreign_extras, lavis_origins, unused_in_vision_file
from qpert.exporter.families.blip2.positions import at_image_size, positions_for, size_note
from qpert.graphs.families.blip2.config import CONFIGS, Blip2Config
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.errors import CheckpointError
from qpert.runtime.files import cache_folder
from qpert.runtime.inputs.preprocessing import ImagePreprocessing

LAVIS_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
VISION_PREFIX = "visual_encoder."


@dataclass(frozen=True)
class NamedCheckpoint:
    """A published checkpoint. `vision_file`: the backbone, if LAVIS saved the rest without it."""

    file: str
    config: Blip2Config
    vision_file: str | None = None
    license: str = "BSD-3-Clause (LAVIS)"


NAMED: dict[str, NamedCheckpoint] = {
    "coco": NamedCheckpoint("blip2_finetune_coco.pth", CONFIGS["coco"]),
    "pretrain": NamedCheckpoint("blip2_pretrained.pth", CONFIGS["pretrain"], "eva_vit_g.pth"),
    "pretrain_vitL": NamedCheckpoint("blip2_pretrained_vitL.pth", CONFIGS["pretrain_vitL"], "clip_vit_L.pth"),
}

IMAGE_PROCESSOR = "BlipImageProcessor"
"""The image processor of a folder that names none. LAVIS's `BlipImageEvalProcessor` is the same function."""

EXPECTED = "a LAVIS FILE.pth, a Hugging Face folder or id (organisation/name)"


@dataclass(frozen=True)
class Opened:
    """Opened files, before their architecture is known."""

    name: str
    source: str
    store: TensorStore
    hub: HubConfig | None = None
    known: Blip2Config | None = None
    license: str = UNKNOWN_LICENSE
    folder: Path | None = None
    parts: dict[str, str] | None = None


@dataclass(frozen=True)
class Plan:
    """What names and shapes alone decide: no number has been read."""

    format: str
    config: Blip2Config
    origins: dict[str, Origin]
    notes: tuple[str, ...]


def open_checkpoint(
    source: str,
    *,
    image_size: int | None = None,
    options: ArchitectureOptions = ArchitectureOptions(),  # noqa: B008 (frozen)
    progress: Progress = no_progress,
) -> Checkpoint:
    """Open what `--checkpoint` names: a published name, a file, a Hugging Face folder or id.

    Args:
        source: a name in `demo.NAMES` or `NAMED`, FILE.pth, FILE.safetensors (LAVIS names), a folder, or
            `organisation/name`.
        image_size: side in pixels to export for; None keeps the checkpoint's. Position embeddings are interpolated.
        options: facts that tensors do not show.
        progress: called during downloads and hashing.

    Raises:
        CheckpointError: missing, unreadable, another architecture, or tensors missing, unexpected or misshaped.
        InputError: `image_size` is not a multiple of the patch size.
        UnavailableError: it is not local and cannot be downloaded.
    """
    if source in demo.NAMES:
        return open_demo(image_size, source)
    opened = find(source, options, progress)
    try:
        plan = plan_checkpoint(opened.store.entries, opened.source, options, hub=opened.hub, known=opened.known)
        size = plan.config.vision.image_size if image_size is None else image_size
        config = at_image_size(replace(plan.config, name=opened.name), size)
        prepared = read_preprocessing(
            opened.folder,
            default_type=IMAGE_PROCESSOR,
            tower_size=plan.config.vision.image_size,
            image_size=image_size,
            usual=ImagePreprocessing(size),
        )
        digest = sources.hash_files(opened.store.files, progress)
    except BaseException:
        opened.store.close()
        raise
    tensors = LazyTensors(opened.store, plan.origins, positions_for(plan.config, size))
    record = CheckpointRecord(opened.name, opened.source, plan.format, digest, opened.license, opened.parts)
    notes = (*opened.store.notes, *plan.notes, *prepared.notes, *size_note(plan.config, size))
    vocabulary = vocabulary_in(opened.folder)
    return Checkpoint(config, record, tensors, vocabulary, notes, prepared.preprocessing, opened.folder)


def plan_checkpoint(
    entries: Mapping[str, TensorInfo],
    source: str,
    options: ArchitectureOptions = ArchitectureOptions(),  # noqa: B008 (frozen)
    *,
    hub: HubConfig | None = None,
    known: Blip2Config | None = None,
) -> Plan:
    """Format, dimensions and the location of every parameter, from names, shapes and dtypes.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    form = architecture.format_of(entries, source)
    if form == "lavis" and not architecture.has_vision(entries):
        raise CheckpointError(
            f"{source} holds no visual_encoder tensors: LAVIS saves checkpoints of a frozen vision transformer without "
            "it. Also pass the backbone's file, --vision-checkpoint eva_vit_g.pth (or clip_vit_L.pth), from "
            f"{LAVIS_URL}",
            code="vision-tensors-missing",
        )
    measured = architecture.measure(architecture.lavis_shapes(lavis_origins(form, entries), entries), name="checkpoint")
    origins = check_names(source, form, entries, architecture.parameter_shapes(measured))
    if options.vision_layers not in (None, measured.vision.layers):
        raise CheckpointError(
            f"--vision-layers is {options.vision_layers}, but {source} has {measured.vision.layers} vision layers; "
            "remove the option: it only selects blocks of a --vision-checkpoint",
            code="vision-layers-differ",
        )
    if hub is not None:
        check_agreement(hub, measured)
    config, notes = infer_missing(measured, options, hub, known)
    if known is not None and replace(config, name=known.name) != known:
        raise CheckpointError(
            f"{source} is not the published {known.name!r}: got {config}, expected {known}; delete it, so that it "
            "is downloaded again, or pass its path to use it anyway",
            code="checkpoint-not-published",
        )
    stored = [entries[origin.name].dtype for origin in origins.values()]
    read = (*(hub.notes if hub else ()), *dtype_notes(stored, hub), *extra_notes(foreign_extras(form, entries)))
    return Plan(form, config, origins, (*read, *notes))


def dtype_notes(stored: list[str], hub: HubConfig | None) -> tuple[str, ...]:
    """Notes on weights that are rounded, and on a stated dtype that differs from the stored one."""
    notes = []
    if wide := stored.count("float64"):
        notes.append(f"{wide} float64 tensors are rounded to float32")
    if hub and hub.dtype and hub.dtype not in ("auto", *stored):
        notes.append(f"config.json states dtype {hub.dtype}, but the weights are stored and read as {stored[0]}")
    return tuple(notes)


def find(source: str, options: ArchitectureOptions, progress: Progress) -> Opened:
    """Open the files of `source`, downloading them if necessary."""
    located = locate(source, NAMED, EXPECTED)
    if located.published is not None:
        return open_named(source, options, progress)
    if located.file is not None:
        return open_file(located.file, options)
    assert located.folder is not None
    return open_hub_folder(located, located.folder, options)


def open_named(name: str, options: ArchitectureOptions, progress: Progress) -> Opened:
    spec = NAMED[name]
    refuse_vision_file(options, f"the named checkpoint {name!r} comes with its own")
    store, parts = open_cached(spec.file, progress), None
    if spec.vision_file is not None:
        vision = open_cached(spec.vision_file, progress)
        store = sources.merge(store, vision_tensors(vision, spec.config.vision.layers))
        parts = {"vision": LAVIS_URL + spec.vision_file}
    return Opened(name, LAVIS_URL + spec.file, store, known=spec.config, license=spec.license, parts=parts)


def open_cached(file: str, progress: Progress) -> TensorStore:
    """The LAVIS file from the cache folder, downloaded if it is missing."""
    path = cache_folder() / "checkpoints" / file
    if not path.is_file():
        download(LAVIS_URL + file, path, progress=progress)
    try:
        return sources.open_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Delete {path} to download it again", code=error.code) from error


def open_file(path: Path, options: ArchitectureOptions) -> Opened:
    store = without_prefixes(sources.open_tensors(path))
    if architecture.format_of(store.entries, str(path)) == "huggingface":
        raise CheckpointError(
            f"{path} has Hugging Face names and needs the head counts of config.json; pass the folder "
            f"{path.parent} instead of the file",
            code="hub-folder-expected",
        )
    parts = None
    if options.vision_checkpoint is not None:
        if architecture.has_vision(store.entries):
            refuse_vision_file(options, f"{path} holds the vision transformer itself")
        vision = without_prefixes(sources.open_tensors(options.vision_checkpoint))
        store = sources.merge(store, vision_tensors(vision, options.vision_layers))
        parts = {"vision": str(options.vision_checkpoint)}
    return Opened(path.stem, str(path), store, parts=parts)


def open_hub_folder(located: Located, folder: Path, options: ArchitectureOptions) -> Opened:
    refuse_vision_file(options, "a Hugging Face folder holds the vision transformer itself")
    hub = read_hub_config(folder)
    store = without_prefixes(sources.open_folder(folder))
    return Opened(located.name, located.source, store, hub=hub, license=license_of(folder), folder=folder)


def refuse_vision_file(options: ArchitectureOptions, why: str) -> None:
    if options.vision_checkpoint is not None:
        raise CheckpointError(
            f"--vision-checkpoint {options.vision_checkpoint} cannot be used: {why}; remove it",
            code="vision-checkpoint-unused",
        )


def vision_tensors(store: TensorStore, layers: int | None) -> TensorStore:
    """A vision backbone's file as the `visual_encoder.` part of a checkpoint, without tensors that LAVIS leaves out."""
    layers, notes = architecture.backbone_layers(store.entries, layers, str(store.files[0]))
    unused = unused_in_vision_file(store.entries, layers)
    kept = {name: info for name, info in store.entries.items() if name not in unused}
    return sources.with_prefix(replace(store, entries=kept, notes=(*store.notes, *notes)), VISION_PREFIX)
