"""Opens an open_clip CoCa: a published name, a file, a folder or a hub id.

source → files → configuration → strict names and shapes → LazyTensors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpert.exporter.checkpoints.checkpoint import Checkpoint, Progress
from qpert.exporter.checkpoints.download import download_snapshot
from qpert.exporter.checkpoints.files import TensorInfo, TensorStore, hash_files, open_tensors, shorten
from qpert.exporter.checkpoints.hub_folder import UNKNOWN_LICENSE, license_of
from qpert.exporter.checkpoints.image_processor import with_size
from qpert.exporter.checkpoints.locate import HUB_URL, Located, locate
from qpert.exporter.checkpoints.parameters import LazyTensors
from qpert.exporter.checkpoints.state_dicts import without_prefixes
from qpert.exporter.families.coca import model_config, names
from qpert.exporter.families.coca.model_config import CONFIG_NAME, ModelConfig
from qpert.exporter.hub.opening import at_image_size
from qpert.exporter.hub.towers import check_tensors
from qpert.graphs.families.coca.config import CONFIGS, CocaConfig
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.errors import CheckpointError

EXPECTED = "an open_clip file (.bin, .pt, .safetensors), a folder with open_clip_config.json, or a hub id"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Weight files of a folder; the first that exists is used, as open_clip does."""
HUB_FILES = (*WEIGHTS, CONFIG_NAME, "README.md")
REPOSITORIES = {
    "coca_ViT-L-14": "laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
    "coca_ViT-B-32": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
}
"""Published name → hub repository. Source: open_clip 3.3.0 `pretrained.py`."""
FINE_TUNED = "mscoco_finetuned"
NOT_FOR_RETRIEVAL = (
    "WARNING: mscoco_finetuned checkpoints were trained to write captions alone (contrastive weight 0) and are not "
    "meant for retrieval: of coca_ViT-B-32, open_clip reports a Flickr30K text-to-image R@1 of 0.74 %, against 63.36 % "
    "before that training; export the laion2B checkpoint to search"
)


@dataclass(frozen=True)
class OpenClipCheckpoint(Checkpoint):
    """An open CoCa. `model`, `preprocess`: open_clip's own configuration, for the stock reference."""

    model: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CocaOptions:
    """`model_config`: a published name, a file of open_clip, or a configuration. `resize`: shortest or squash."""

    model_config: str | Path | CocaConfig | None = None
    resize: str | None = None


def open_checkpoint(source: str, *, image_size: int | None, options: CocaOptions, progress: Progress) -> Checkpoint:
    """Open what `--checkpoint` names.

    Raises:
        CheckpointError: missing, unreadable, another model, an unsupported field, or tensors that do not fit.
        InputError: `image_size` is smaller than a patch.
        UnavailableError: it is not local and cannot be downloaded.
    """
    located = located_files(source)
    store = open_weights(located)
    try:
        names.check_kind(store.entries, located.source)
        found, notes = find_config(located, store.entries, options)
        notes += check_all(store, found.config, located.source)
        size = found.config.vision.image_size if image_size is None else image_size
        config = replace(at_image_size(found.config, size), name=located.name, resize=options.resize)
        digest = hash_files(store.files, progress)
    except BaseException:
        store.close()
        raise
    tensors = LazyTensors(store, names.origins(config), adapting(config))
    licence = license_of(located.folder) if located.folder else UNKNOWN_LICENSE
    record = CheckpointRecord(located.name, located.source, "open_clip", digest, licence)
    if FINE_TUNED in f"{located.source} {store.files[0]}".lower():
        notes = (NOT_FOR_RETRIEVAL, *notes)
    notes = (*store.notes, *notes, *size_note(found.config, size), *resize_note(options))
    prepared = with_size(found.preprocessing, size)
    model, preprocess = found.model, dict(found.preprocess)
    if options.resize:
        preprocess["resize_mode"] = options.resize
    return OpenClipCheckpoint(config, record, tensors, None, notes, prepared, located.folder, model, preprocess)


def located_files(source: str) -> Located:
    """What `source` names; a published name is its hub repository."""
    located = locate(source, REPOSITORIES, EXPECTED, files=HUB_FILES)
    if located.published is None:
        return located
    repository = REPOSITORIES[source]
    return Located(source, HUB_URL + repository, folder=download_snapshot(repository, HUB_FILES))


def open_weights(located: Located) -> TensorStore:
    if located.file is not None:
        return without_prefixes(open_tensors(located.file))
    folder = located.folder
    assert folder is not None
    paths = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if paths:
        store = without_prefixes(open_tensors(paths[0]))
        left = tuple(f"the weights come from {paths[0].name}; not used: {path.name}" for path in paths[1:])
        return replace(store, notes=(*store.notes, *left))
    found = shorten(sorted(path.name for path in folder.iterdir())) or "nothing"
    other = (folder / "config.json").is_file()
    advice = (
        "; it looks like Hugging Face's form, which `qpert export clip`, `siglip` and `blip2` take" if other else ""
    )
    raise CheckpointError(
        f"the folder {folder} has neither {' nor '.join(WEIGHTS)} (it has {found}); expected {EXPECTED}{advice}",
        code="coca-weights-missing",
    )


def find_config(
    located: Located, entries: Mapping[str, TensorInfo], options: CocaOptions
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The configuration and notes on where it comes from: the option, the file beside the weights, or the shapes.

    Raises:
        CheckpointError: head counts, which no tensor shows, are not known.
    """
    asked = options.model_config
    if isinstance(asked, CocaConfig):  # of a bundle, whose checkpoint is opened again
        asked = located_config(located) or asked
    if isinstance(asked, CocaConfig):
        prepared = model_config.image_preprocessing("", {}, asked.vision.image_size, options.resize)
        return ModelConfig(asked, prepared, model_config.model_cfg(asked)), ()
    path = located_config(located) if asked is None else Path(asked)
    if asked is not None and str(asked) in CONFIGS:
        return published(str(asked), options), ()
    if path is not None:
        return model_config.read_model_config(path, located.name, options.resize), ()
    for name, config in CONFIGS.items():
        if shapes_fit(config, entries):
            note = f"there is no {CONFIG_NAME}: head counts are those of {name}, which has the same shapes"
            return published(name, options), (note,)
    raise CheckpointError(
        f"{located.source} has no {CONFIG_NAME} beside it, and the shapes of no published model; head counts are not "
        "in the tensors: pass --model-config with open_clip's JSON file of the model",
        code="coca-config-missing",
    )


def located_config(located: Located) -> Path | None:
    folder = located.folder or (located.file.parent if located.file else None)
    path = folder / CONFIG_NAME if folder else None
    return path if path is not None and path.is_file() else None


def published(name: str, options: CocaOptions) -> ModelConfig:
    found = model_config.published(name)
    prepared = model_config.image_preprocessing("", {}, found.config.vision.image_size, options.resize)
    return replace(found, preprocessing=prepared)


def shapes_fit(config: CocaConfig, entries: Mapping[str, TensorInfo]) -> bool:
    expected = names.expected_shapes(config, entries[names.QUERY].shape[0])
    towers = {name for name in entries if name.partition(".")[0] in names.PARTS}
    return expected.keys() == towers and all(entries[name].shape == shape for name, shape in expected.items())


def check_all(store: TensorStore, config: CocaConfig, source: str) -> tuple[str, ...]:
    """Raise unless every tensor of the towers is there, and no unknown one; a note on those that are not used.

    Raises:
        CheckpointError: `coca-context-length`, `checkpoint-tensors` or `coca-tensors-unknown`.
    """
    entries = store.entries
    if unknown := names.unknown_names(entries):
        raise CheckpointError(
            f"{source} has {len(unknown)} tensors that no open_clip CoCa has: {shorten(unknown, 4)}; remove them if "
            "they are not part of the network",
            code="coca-tensors-unknown",
        )
    check_context(entries, config, source)
    shape = entries[names.QUERY].shape
    expected = names.expected_shapes(config, shape[0] if shape else 0)
    check_tensors(entries, expected, frozenset(), source, described=f"its {CONFIG_NAME}")
    decoder = sorted(name for name in entries if name.startswith("text_decoder."))
    if not decoder:
        return ()
    return (f"{len(decoder)} tensors of the caption decoder are not used in retrieval: {shorten(decoder, 3)}",)


def check_context(entries: Mapping[str, TensorInfo], config: CocaConfig, source: str) -> None:
    """A text's positions: its tokens and the class token."""
    name, length = "text.positional_embedding", config.text.max_positions
    rows = entries[name].shape[0] if name in entries and entries[name].shape else None
    if rows is not None and rows != length + 1:
        raise CheckpointError(
            f"{source} has {name} with {rows} rows, but text_cfg.context_length {length} needs {length + 1}, one more "
            f"for the class token; set context_length to {rows - 1} in {CONFIG_NAME}, or pass the right --model-config",
            code="coca-context-length",
        )


def adapting(config: CocaConfig) -> Callable[[str, Tensor], Tensor]:
    """Keeps the pooler's first query alone, and resizes position embeddings to the exported grid."""

    def adapt(name: str, tensor: Tensor) -> Tensor:
        if name == "pooler.query":
            return tensor[:1]
        if names.DIRECT.get(name) == names.POSITIONS and len(tensor) != config.tokens:
            return resized_positions(tensor, config.vision.grid)
        return tensor

    return adapt


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1 + g², C] for another grid, as `resize_pos_embed` of open_clip: bicubic, antialiased."""
    patches = positions.float()[1:]
    stored = round(len(patches) ** 0.5)
    image = patches.reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions.float()[:1], resized.permute(0, 2, 3, 1).reshape(grid * grid, -1)])


def size_note(config: CocaConfig, image_size: int) -> tuple[str, ...]:
    own = config.vision
    if image_size == own.image_size:
        return ()
    return (
        f"position embeddings resized from {own.image_size} px ({own.grid}×{own.grid} patches) to {image_size} px, "
        "bicubic with antialiasing, as open_clip does",
    )


def resize_note(options: CocaOptions) -> tuple[str, ...]:
    if options.resize is None:
        return ()
    return (f"--resize {options.resize} replaces the checkpoint's resize_mode (open_clip's default is shortest)",)
