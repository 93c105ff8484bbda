"""From a picture's size to what the network sees of it: resize, crop and normalisation, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from qpert.runtime.errors import InputError

RESAMPLES = ("bicubic", "bilinear", "lanczos")
"""The PIL filters that `ImagePreprocessing.resample` may name. BLIP-2 uses bicubic."""


FITS = ("squash", "crop")
"""How a picture becomes a square: `squash` resizes both sides; `crop` resizes the shorter side and cuts the middle."""

ROUNDINGS = ("floor", "half_even")
"""How a crop's odd pixel is placed: transformers rounds the offset down, torchvision (open_clip) half to even."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """From an RGB image to one `pixel_values` row of size×size: resize, (crop), /255, minus `mean`, over `std`.

    `mean` and `std` are per channel (R, G, B) on the 0–1 scale; the defaults are CLIP's, which BLIP-2 uses (LAVIS
    `blip_processors.py`). `fit`: see `FITS`. With `crop`, `shortest_side` is what the shorter side is resized to (at
    least `size`) and `rounding` places the crop. Raises `InputError` for values that cannot be used.
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: str = "bicubic"
    fit: str = "squash"
    shortest_side: int = 0
    rounding: str = "floor"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise InputError(
                f"image size is {self.size!r}; expected a whole number of pixels, at least 1", code="image-size"
            )
        object.__setattr__(self, "mean", _three_floats("mean", self.mean))
        object.__setattr__(self, "std", _three_floats("std", self.std))
        if min(self.std) <= 0:
            raise InputError(f"std is {self.std}; expected three numbers above 0", code="image-std")
        for name, choices in (("resample", RESAMPLES), ("fit", FITS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}", code=f"image-{name}"
                )
        if self.fit == "crop" and self.shortest_side < self.size:
            raise InputError(
                f"shortest_side is {self.shortest_side!r}; expected at least the image size {self.size}, which is cut "
                "from it",
                code="image-shortest-side",
            )

    def to_dict(self) -> dict[str, Any]:
        """The manifest's form: plain lists, numbers and strings; what a squash does not need is left out."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        return values if self.fit == "crop" else {key: values[key] for key in _SQUASH_KEYS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImagePreprocessing:
        """The inverse of `to_dict`. Raises `InputError` for missing, unknown or unusable entries."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or not {"size", "mean", "std", "resample"} <= set(values) <= known:
            got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise InputError(f"image preprocessing has {got}; expected {sorted(known)}", code="image-preprocessing")
        return cls(**values)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which a picture of these pixels is resized, before any crop.

        With `crop` the longer side keeps the proportion, rounded down (transformers `get_resize_output_image_size`;
        torchvision's `Resize` the same).
        """
        if self.fit == "squash":
            return self.size, self.size
        short = self.shortest_side
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short

    def crop_offset(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the square that is cut from a resized picture; (0, 0) for `squash`."""
        if self.fit == "squash":
            return 0, 0
        left, top = width - self.size, height - self.size
        return (left // 2, top // 2) if self.rounding == "floor" else (round(left / 2), round(top / 2))


_SQUASH_KEYS = ("size", "mean", "std", "resample", "fit")


def _three_floats(name: str, values: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(v) for v in values)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} is {values!r}; expected three numbers, one for each of R, G, B", code="preprocessing-values"
        ) from None
    if not np.isfinite([red, green, blue]).all():
        raise InputError(f"{name} is {values!r}; expected finite numbers", code="preprocessing-values")
    return red, green, blue
