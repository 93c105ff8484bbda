"""A Hugging Face folder's image processor as one `ImagePreprocessing`: every field is honoured, or rejected by name.

Source: transformers `image_processing_base.py` (which file wins), `image_processing_backends.py` (the PIL backend),
`image_transforms.py`, and the classes of BLIP, CLIP and SigLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.json_files import positive_number, read_json_object, whole_number
from qpert.runtime.errors import CheckpointError
from qpert.runtime.inputs.preprocessing import RESAMPLES, ImagePreprocessing

Triple = tuple[float, float, float]

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

COMMON_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "default_to_square": False,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
CLIP_DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}
SIGLIP_DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
BLIP_DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {"size": {"height": 384, "width": 384}, "default_to_square": True}
"""No crop: transformers 4 ignores `do_center_crop` here and transformers 5 obeys it, so qpert rejects it."""

PROCESSORS: dict[str, dict[str, Any]] = {
    f"{family}{kind}": defaults
    for family, defaults in (("Blip", BLIP_DEFAULTS), ("CLIP", CLIP_DEFAULTS), ("Siglip", SIGLIP_DEFAULTS))
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
"""transformers' defaults by `image_processor_type`; the feature extractors are the old names."""

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers."""

HONOURED = frozenset(CLIP_DEFAULTS)
WITHOUT_EFFECT = frozenset(
    {
        *("image_processor_type", "feature_extractor_type", "processor_class", "model_input_names"),
        *("_valid_processor_keys", "return_tensors", "device", "disable_grouping", "image_seq_length", "backend"),
        *("data_format", "input_data_format", "transformers_version", "use_fast", "is_local", "local_files_only"),
        *("_commit_hash", "name_or_path", "_processor_class", "_auto_class"),
    }
)
"""Fields that change no pixel of an RGB image."""
OFF_ONLY = frozenset({"do_pad", "pad_size", "use_square_size", "do_reduce_labels", "do_flip_channel_order"})
"""Fields of other processors, which these files sometimes contain with value false."""

PROCESSOR_FIELDS = frozenset(
    {"image_processor", "processor_class", "num_query_tokens", "image_token", "tokenizer", "transformers_version"}
)
"""Other fields of `processor_config.json`: how tokens represent an image in a language model."""


@dataclass(frozen=True)
class Prepared:
    """How images are prepared, and notes on it."""

    preprocessing: ImagePreprocessing
    notes: tuple[str, ...]


def read_preprocessing(
    folder: Path | None,
    *,
    default_type: str,
    tower_size: int,
    image_size: int | None = None,
    usual: ImagePreprocessing | None = None,
) -> Prepared:
    """Read the image processor of a Hugging Face folder.

    Args:
        folder: with `preprocessor_config.json`, or a `processor_config.json` that has an `image_processor` (as
            transformers 5 writes it; it wins). None if the checkpoint is not a folder.
        default_type: the class of a file without `image_processor_type`, a key of `PROCESSORS`.
        tower_size: S of the vision tower, in pixels.
        image_size: `--image-size`, which replaces the file's size; None keeps it.
        usual: the family's preprocessing if no file states any; None if a file is required.

    Raises:
        CheckpointError: neither file exists and there is no `usual`; a field is unknown or has an unsupported value
            (named in the message); or the images' size is not the tower's.
    """
    files = processor_files(folder) if folder is not None else []
    if not files:
        return _without_files(folder, usual, tower_size if image_size is None else image_size)
    path, values, notes = files[0]
    found, more = read_fields(path, values, default_type)
    for other, contents, _ in files[1:]:
        if read_fields(other, contents, default_type)[0] != found:
            more = (*more, f"{other.name} differs from {path.name}, which wins, as in transformers 5")
    if image_size is not None and image_size != found.size:
        return Prepared(with_size(found, image_size), (*notes, *more, _size_note(path, found.size, image_size)))
    if image_size is None and found.size != tower_size:
        raise CheckpointError(
            f"{path} makes images of {found.size}×{found.size} pixels but the vision tower takes {tower_size}×"
            f"{tower_size}; pass the right one as --image-size",
            code="preprocessing-size",
        )
    return Prepared(found, (*notes, *more))


def with_size(preprocessing: ImagePreprocessing, size: int) -> ImagePreprocessing:
    """The same preprocessing for another S. A crop keeps the same share of the image, to the nearest pixel."""
    if preprocessing.fit == "squash":
        return replace(preprocessing, size=size)
    short = max(size, round(preprocessing.shortest_side * size / preprocessing.size))
    return replace(preprocessing, size=size, shortest_side=short)


def _size_note(path: Path, stated: int, size: int) -> str:
    return f"{path.name} states images of {stated} px; --image-size {size} replaces that"


def _without_files(folder: Path | None, usual: ImagePreprocessing | None, size: int) -> Prepared:
    if usual is None:
        raise CheckpointError(
            f"{folder} has neither preprocessor_config.json nor processor_config.json; download the whole folder",
            code="hub-file-missing",
        )
    kept = with_size(usual, size)
    if folder is None:
        return Prepared(kept, ())
    how = f"{kept.fit} to {size}×{size}, {kept.resample}, mean {list(kept.mean)}, std {list(kept.std)}"
    return Prepared(kept, (f"the folder has no preprocessor_config.json: the family's preprocessing is used ({how})",))


def processor_files(folder: Path) -> list[tuple[Path, dict[str, Any], tuple[str, ...]]]:
    """The files that describe an image processor, the winning one first, with notes."""
    found = []
    combined, plain = folder / "processor_config.json", folder / "preprocessor_config.json"
    if combined.is_file():
        values = read_json_object(combined)
        if "image_processor" in values:
            nested = values["image_processor"]
            if not isinstance(nested, dict):
                raise wrong_value(combined, "image_processor", nested, "an object")
            found.append((combined, nested, unknown_note(combined, values.keys() - PROCESSOR_FIELDS)))
    if plain.is_file():
        found.append((plain, read_json_object(plain), ()))
    return found


def unknown_note(path: Path, names: set[str]) -> tuple[str, ...]:
    """A note on unknown fields, which are not used; empty if there are none."""
    if not names:
        return ()
    return (f"{path.name} has unknown fields, which are not used: {', '.join(sorted(names))}",)


def read_fields(path: Path, values: Mapping[str, Any], default_type: str) -> tuple[ImagePreprocessing, tuple[str, ...]]:
    """A processor file's preprocessing, and notes. `path` is for messages. Errors: see `read_preprocessing`."""
    stated = {key: value for key, value in values.items() if value is not None}  # null means the class's default
    kind = stated.get("image_processor_type") or stated.get("feature_extractor_type") or default_type
    if kind not in PROCESSORS:
        raise unsupported(path, "image_processor_type", kind, f"supported are {', '.join(PROCESSORS)}")
    notes = _check_fields(path, stated, PROCESSORS[kind])
    fields = PROCESSORS[kind] | stated
    fit, size, shortest = _geometry(path, fields)
    mean, std, scale_notes = normalisation(path, fields)
    resample = filter_name(path, fields["resample"])
    found = ImagePreprocessing(size, mean, std, resample, fit, shortest if fit == "crop" else 0)
    return found, (*notes, *scale_notes)


def _check_fields(path: Path, stated: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[str, ...]:
    """Raise for unsupported fields; returns a note on unknown fields whose value is false."""
    unknown = stated.keys() - HONOURED - WITHOUT_EFFECT - OFF_ONLY
    if acting := sorted(name for name in unknown if stated[name] is not False):
        raise CheckpointError(
            f"{path} has unknown fields, which qpert cannot honour: {', '.join(acting)}; expected the fields of "
            "the image processors of BLIP, CLIP and SigLIP",
            code="preprocessing-unsupported",
        )
    crop = frozenset({"do_center_crop"}) - defaults.keys()
    for name in sorted((OFF_ONLY | crop) & stated.keys()):
        if stated[name]:
            raise unsupported(path, name, stated[name], "only false is supported")
    for name in (*HONOURED, "use_square_size"):
        if name.startswith(("do_", "default_")) and name in stated and not isinstance(stated[name], bool):
            raise wrong_value(path, name, stated[name], "true or false")
    return unknown_note(path, set(unknown))


def _geometry(path: Path, fields: Mapping[str, Any]) -> tuple[str, int, int]:
    """How images fit, S, and the shortest side before a crop."""
    if not fields["do_resize"]:
        raise unsupported(path, "do_resize", False, "images must be resized to the size of the vision tower")
    size = stated_size(path, "size", fields["size"], square=fields["default_to_square"])
    crops = fields.get("do_center_crop", False)
    crop = _square(path, "crop_size", stated_size(path, "crop_size", fields.get("crop_size"))) if crops else 0
    if "shortest_edge" in size:
        shortest = whole_number(f"{path}, size", size, "shortest_edge")
        if not crop:
            raise unsupported(path, "size", fields["size"], "without do_center_crop the images differ in size")
        if shortest < crop:
            raise unsupported(
                path, "crop_size", crop, f"it exceeds the shortest side {shortest} and would need padding"
            )
        return "crop", crop, shortest
    squashed = _square(path, "size", size)
    if crop and crop != squashed:
        raise unsupported(path, "crop_size", crop, f"expected {squashed}, the size that images are resized to")
    return "squash", squashed, squashed


def stated_size(path: Path, name: str, value: Any, *, square: bool = True) -> Mapping[str, Any]:
    """A size in any of transformers' forms: an object, [height, width], or one number (`get_size_dict`)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    if isinstance(value, dict):
        stated = {side: length for side, length in value.items() if length is not None}  # transformers 5 may save nulls
        if set(stated) in ({"height", "width"}, {"shortest_edge"}):
            return stated
    raise unsupported(path, name, value, "supported are a number, [height, width], height and width, shortest_edge")


def _square(path: Path, name: str, size: Mapping[str, Any]) -> int:
    if set(size) != {"height", "width"}:
        raise unsupported(path, name, dict(size), "expected height and width")
    height, width = (whole_number(f"{path}, {name}", size, side) for side in ("height", "width"))
    if height != width:
        raise unsupported(path, name, dict(size), "only squares are supported")
    return height


def filter_name(path: Path, value: Any) -> str:
    """PIL's number, or its name in any case, with or without the enum's name (`PILImageResampling.BICUBIC`)."""
    name = value.rpartition(".")[2].lower() if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool):
        name = FILTERS.get(value)
    if name not in RESAMPLES:
        known = ", ".join(f"{number} ({FILTERS[number]})" for number in (3, 2, 1))
        raise unsupported(path, "resample", value, f"supported are {known}")
    return name


def normalisation(path: Path, fields: Mapping[str, Any]) -> tuple[Triple, Triple, tuple[str, ...]]:
    """Mean and std on the 0–1 scale, and notes.

    Any other scale s = 255·`rescale_factor` is absorbed by both: (s·x − m)/d = (x − m/s)/(d/s).
    """
    mean, std = _stated_normalisation(path, fields)
    factor = positive_number(str(path), fields, "rescale_factor") if fields["do_rescale"] else 1.0
    scale = 255 * factor
    if abs(scale - 1) < 1e-9:
        return mean, std, ()
    stated = f"rescale_factor {factor:g}" if fields["do_rescale"] else "do_rescale false"
    note = f"{path.name} has {stated}: mean and std are divided by {scale:g}, which gives the same pixels"
    return _divided(mean, scale), _divided(std, scale), (note,)


def _divided(values: Triple, scale: float) -> Triple:
    red, green, blue = values
    return red / scale, green / scale, blue / scale


def _stated_normalisation(path: Path, fields: Mapping[str, Any]) -> tuple[Triple, Triple]:
    if not fields["do_normalize"]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    std = _triple(path, "image_std", fields["image_std"])
    if min(std) <= 0:
        raise wrong_value(path, "image_std", fields["image_std"], "numbers above 0")
    return _triple(path, "image_mean", fields["image_mean"]), std


def _triple(path: Path, name: str, value: Any) -> Triple:
    """One number for all channels, or one per channel."""
    numbers = value if isinstance(value, list) else [value] * 3
    usable = [v for v in numbers if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < float("inf")]
    if len(numbers) != 3 or len(usable) != 3:
        raise wrong_value(path, name, value, "three finite numbers, one for each of R, G, B")
    red, green, blue = map(float, usable)
    return red, green, blue


def unsupported(path: Path, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"{path} has {name} {value!r}: {why}", code="preprocessing-unsupported")


def wrong_value(path: Path, name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {name} {value!r}, expected {expected}; correct or download it again", code="preprocessing-value"
    )
