"""`preprocessor_config.json` of CLIP and SigLIP folders: what stock image processors do, as facts, every field of them.

Source: transformers `image_processing_utils.py`, `image_processing_backends.py` (the PIL backend),
`image_transforms.py`, `image_processing_pil_clip.py`, `image_processing_pil_siglip.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qpert.exporter.hub.json_files import positive_number, read_json_object, whole_number
from qpert.runtime.errors import CheckpointError

Fit = Literal["squash", "crop"]
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
}
CLIP_DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
SIGLIP_DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSORS: dict[str, dict[str, Any]] = {
    name: defaults
    for family, defaults in (("CLIP", CLIP_DEFAULTS), ("Siglip", SIGLIP_DEFAULTS))
    for name in (f"{family}ImageProcessor", f"{family}ImageProcessorFast", f"{family}ImageProcessorPil")
} | {"CLIPFeatureExtractor": CLIP_DEFAULTS, "SiglipFeatureExtractor": SIGLIP_DEFAULTS}
"""transformers' defaults by `image_processor_type`; the feature extractors are the old names."""

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers."""
SUPPORTED_FILTERS = ("bicubic", "bilinear", "lanczos")

HONOURED = frozenset(CLIP_DEFAULTS)
WITHOUT_EFFECT = frozenset(
    {
        *("image_processor_type", "feature_extractor_type", "processor_class", "model_input_names"),
        *("_valid_processor_keys", "return_tensors", "device", "disable_grouping", "image_seq_length"),
        *("data_format", "input_data_format", "transformers_version"),
    }
)
"""Fields that change no pixel of an RGB picture."""
OFF_ONLY = frozenset({"do_pad", "pad_size", "use_square_size"})
"""Fields of other processors, that these files sometimes carry switched off."""


@dataclass(frozen=True)
class StockPreprocessing:
    """From an RGB picture of 8 bits to one row of `pixel_values`, S×S.

    `squash`: resize to S×S. `crop`: resize the shortest side to `shortest`, the other to ⌊shortest · long / short⌋,
    then cut S×S at ⌊(side − S) / 2⌋ from the left and the top. Then value · `rescale`, minus `mean`, over `std`.
    """

    fit: Fit
    size: int
    shortest: int
    resample: str
    rescale: float
    mean: Triple
    std: Triple

    def with_size(self, size: int) -> StockPreprocessing:
        """For another S; the share of the picture that a crop keeps stays the same, to the nearest pixel."""
        return replace(self, size=size, shortest=max(size, round(self.shortest * size / self.size)))

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, before the crop (`get_resize_output_image_size`)."""
        if self.fit == "squash":
            return self.size, self.size
        long = self.shortest * max(width, height) // min(width, height)
        return (self.shortest, long) if width <= height else (long, self.shortest)

    def offsets(self, width: int, height: int) -> tuple[int, int]:
        """Where the crop begins, left and top, in pixels of the resized picture (`center_crop`)."""
        resized = self.resized(width, height)
        return (resized[0] - self.size) // 2, (resized[1] - self.size) // 2


def read_preprocessing(folder: Path, *, image_size: int, default_type: str) -> StockPreprocessing:
    """The image processor of a Hugging Face folder.

    Args:
        folder: with `preprocessor_config.json`, or a `processor_config.json` that has an `image_processor` (as
            transformers 5 writes it; it wins).
        image_size: S of the vision tower.
        default_type: the processor that a file without `image_processor_type` means.

    Raises:
        CheckpointError: neither file is there, a field is unknown, or asks for something not supported, by name; or the
            pictures come out in another size than `image_size`.
    """
    path, values = _read(folder)
    found = read_fields(path, values, default_type)
    if found.size != image_size:
        raise CheckpointError(
            f"{path} makes pictures of {found.size}×{found.size} pixels and the vision tower takes {image_size}×"
            f"{image_size}; the two belong to different models, download the folder again",
            code="preprocessing-size",
        )
    return found


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    combined = folder / "processor_config.json"
    if combined.is_file() and "image_processor" in (values := read_json_object(combined)):
        nested = values["image_processor"]
        if not isinstance(nested, dict):
            raise CheckpointError(
                f"{combined} has image_processor {nested!r}, expected an object; download it again",
                code="preprocessing-value",
            )
        return combined, nested
    path = folder / "preprocessor_config.json"
    return path, read_json_object(path)


def read_fields(path: Path, values: Mapping[str, Any], default_type: str) -> StockPreprocessing:
    """The facts in the fields of a processor file; `path` is for messages. Errors as in `read_preprocessing`."""
    stated = {key: value for key, value in values.items() if value is not None}  # null means the class's default
    kind = stated.get("image_processor_type") or stated.get("feature_extractor_type") or default_type
    if kind not in PROCESSORS:
        raise _unsupported(path, "image_processor_type", kind, f"supported are {', '.join(PROCESSORS)}")
    _check_fields(path, stated)
    fields = PROCESSORS[kind] | stated
    fit, size, shortest = _geometry(path, fields)
    mean, std = _normalisation(path, fields)
    return StockPreprocessing(fit, size, shortest, _filter(path, fields["resample"]), _rescale(path, fields), mean, std)


def _check_fields(path: Path, stated: Mapping[str, Any]) -> None:
    unknown = sorted(stated.keys() - HONOURED - WITHOUT_EFFECT - OFF_ONLY)
    if unknown:
        raise CheckpointError(
            f"{path} has fields that qpert does not know and so cannot honour: {', '.join(unknown)}; expected what "
            "CLIP's and SigLIP's image processors write",
            code="preprocessing-unsupported",
        )
    for name in sorted(OFF_ONLY & stated.keys()):
        if stated[name]:
            raise _unsupported(path, name, stated[name], "only false is supported")
    switches = [name for name in (*HONOURED, "use_square_size") if name.startswith(("do_", "default_"))]
    for name in switches:
        if name in stated and not isinstance(stated[name], bool):
            raise _wrong(path, name, stated[name], "true or false")


def _geometry(path: Path, fields: Mapping[str, Any]) -> tuple[Fit, int, int]:
    """How pictures fit, S, and the shortest side of a crop."""
    if not fields["do_resize"]:
        raise _unsupported(path, "do_resize", False, "pictures must be resized to the size of the vision tower")
    size = _size(path, "size", fields["size"], square=fields["default_to_square"])
    crop = _square(path, "crop_size", _size(path, "crop_size", fields["crop_size"])) if fields["do_center_crop"] else 0
    if "shortest_edge" in size:
        shortest = whole_number(f"{path}, size", size, "shortest_edge")
        if not crop:
            raise _unsupported(path, "size", fields["size"], "without do_center_crop the pictures differ in size")
        if shortest < crop:
            raise _unsupported(path, "crop_size", crop, f"it is above the shortest side {shortest} and would be padded")
        return "crop", crop, shortest
    squashed = _square(path, "size", size)
    if crop and crop != squashed:
        raise _unsupported(path, "crop_size", crop, f"expected {squashed}, the size that pictures are squashed to")
    return "squash", squashed, squashed


def _size(path: Path, name: str, value: Any, *, square: bool = True) -> Mapping[str, Any]:
    """transformers' forms of a size: an object, [height, width], or one number (`get_size_dict`)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    if isinstance(value, dict) and set(value) in ({"height", "width"}, {"shortest_edge"}):
        return value
    raise _unsupported(path, name, value, "supported are a number, [height, width], height and width, shortest_edge")


def _square(path: Path, name: str, size: Mapping[str, Any]) -> int:
    if set(size) != {"height", "width"}:
        raise _unsupported(path, name, dict(size), "expected height and width")
    height, width = (whole_number(f"{path}, {name}", size, side) for side in ("height", "width"))
    if height != width:
        raise _unsupported(path, name, dict(size), "only squares are supported")
    return height


def _filter(path: Path, value: Any) -> str:
    name = FILTERS.get(value) if isinstance(value, int) and not isinstance(value, bool) else None
    if name not in SUPPORTED_FILTERS:
        known = ", ".join(f"{number} ({FILTERS[number]})" for number in (3, 2, 1))
        raise _unsupported(path, "resample", value, f"supported are {known}")
    return name


def _rescale(path: Path, fields: Mapping[str, Any]) -> float:
    if not fields["do_rescale"]:
        raise _unsupported(path, "do_rescale", False, "values must be scaled by rescale_factor")
    return positive_number(str(path), fields, "rescale_factor")


def _normalisation(path: Path, fields: Mapping[str, Any]) -> tuple[Triple, Triple]:
    if not fields["do_normalize"]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    std = _triple(path, "image_std", fields["image_std"])
    if min(std) <= 0:
        raise _wrong(path, "image_std", fields["image_std"], "numbers above 0")
    return _triple(path, "image_mean", fields["image_mean"]), std


def _triple(path: Path, name: str, value: Any) -> Triple:
    """One number for all channels, or three."""
    numbers = value if isinstance(value, list) else [value] * 3
    usable = [v for v in numbers if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < float("inf")]
    if len(numbers) != 3 or len(usable) != 3:
        raise _wrong(path, name, value, "three finite numbers, one for each of R, G, B")
    red, green, blue = map(float, usable)
    return red, green, blue


def _unsupported(path: Path, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(f"{path} has {name} {value!r}: {why}", code="preprocessing-unsupported")


def _wrong(path: Path, name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {name} {value!r}, expected {expected}; correct or download it again", code="preprocessing-value"
    )
