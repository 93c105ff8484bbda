"""From pictures to a detector's input: stretched or letterboxed, in the channel order and scale that it was trained on.

Sources: transformers `image_processing_pil_rt_detr.py` (stretch); YOLOX `yolox/data/data_augment.py`, `preproc`
(letterbox: the picture keeps its proportion and lies at the top left, the rest is filled with 114).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError
from qpert.runtime.inputs.images import resize
from qpert.runtime.inputs.preprocessing import RESAMPLES

if TYPE_CHECKING:
    from PIL.Image import Image

DETECTOR_FITS = ("stretch", "letterbox")
CHANNEL_ORDERS = ("rgb", "bgr")


@dataclass(frozen=True)
class DetectorGeometry:
    """From an RGB picture to one row [3, height, width] of the detector's input.

    fit: `stretch` resizes both sides; `letterbox` keeps the proportion and fills below and to the right with
    `pad_value` (0–255). channels: order of the three planes. A byte x of plane c becomes
    (x · scale − mean[c]) / std[c]; `mean` and `std` are in the order of `channels`.

    Raises:
        InputError: a value that cannot be used.
    """

    width: int
    height: int
    fit: str
    channels: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str = "bilinear"
    pad_value: int = 114

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        sizes_ok = all(type(side) is int and 1 <= side <= 1 << 14 for side in (self.width, self.height))
        choices_ok = self.fit in DETECTOR_FITS and self.channels in CHANNEL_ORDERS and self.resample in RESAMPLES
        numbers = (self.scale, *self.mean, *self.std)
        numbers_ok = len(numbers) == 7 and bool(np.isfinite(numbers).all()) and min(self.scale, *self.std) > 0
        if not (sizes_ok and choices_ok and numbers_ok and type(self.pad_value) is int and 0 <= self.pad_value <= 255):
            raise InputError(
                f"the detector's preprocessing is {asdict(self)}; expected whole sides, a fit of "
                f"{' or '.join(DETECTOR_FITS)}, channels {' or '.join(CHANNEL_ORDERS)}, a resample of "
                f"{', '.join(RESAMPLES)}, a scale and std above 0, and a pad value from 0 to 255",
                code="detector-geometry",
            )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectorGeometry:
        """The inverse of `to_dict`. Raises InputError or TypeError for anything else."""
        if unknown := values.keys() ^ {field.name for field in fields(cls)}:
            raise InputError(
                f"the detector's preprocessing lacks or does not know: {', '.join(sorted(unknown))}",
                code="detector-geometry",
            )
        return cls(**values)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture of these pixels has inside the input."""
        if self.fit == "stretch":
            return self.width, self.height
        ratio = min(self.width / width, self.height / height)
        return max(1, int(width * ratio)), max(1, int(height * ratio))

    def pixel_values(self, images: Sequence[Image]) -> npt.NDArray[np.float32]:
        """float32 [B,3,height,width] of B RGB pictures."""
        table = self._bytes()  # [3, 256]
        values = np.empty((len(images), 3, self.height, self.width), np.float32)
        for row, image in enumerate(images):
            width, height = self.resized(*image.size)
            pixels = np.asarray(resize(image, (width, height), self.resample))  # [height, width, 3], RGB
            for plane, channel in enumerate("rgb".index(name) for name in self.channels):
                values[row, plane] = table[plane, self.pad_value]
                values[row, plane, :height, :width] = table[plane][pixels[:, :, channel]]
        return values

    def _bytes(self) -> npt.NDArray[np.float32]:
        """What each byte becomes in each plane, float32 [3,256], in the order of operations of the stock processors."""
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return np.asarray((scaled - mean) / std, np.float32)


def image_sizes(images: Sequence[Image]) -> npt.NDArray[np.float32]:
    """float32 [B,2]: width and height of each picture in pixels."""
    return np.array([image.size for image in images], np.float32).reshape(-1, 2)
