"""Reference preprocessing with only PIL and torch: the runtime's preprocessing is compared with it.

It shares no code with `qpert.runtime.inputs.images`; the arithmetic is that of LAVIS's `BlipImageEvalProcessor` (and of
the image processors of transformers): resize 8-bit pixels, crop the centre, divide by 255, subtract, divide. LAVIS's
results were made with Pillow up to 12, which resizes columns before rows. Pillow 13 starts with the rows of a tall
image, so each axis is resized in a separate call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from qpert.runtime.inputs.preprocessing import ImagePreprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


def reference_pixels(picture: Image, preprocessing: ImagePreprocessing) -> np.ndarray:
    """float32 [3, S, S] of an upright RGB image."""
    from PIL.Image import Resampling

    filters = {
        "bicubic": Resampling.BICUBIC,
        "bilinear": Resampling.BILINEAR,
        "lanczos": Resampling.LANCZOS,
    }
    size, short = preprocessing.size, preprocessing.shortest_side
    if preprocessing.fit == "squash":
        target = (size, size)
    else:
        long = int(short * max(picture.size) / min(picture.size))
        target = (short, long) if picture.width <= picture.height else (long, short)
    columns = picture.resize((target[0], picture.height), filters[preprocessing.resample])
    pixels = torch.from_numpy(np.array(columns.resize(target, filters[preprocessing.resample])))  # [H, W, 3]
    if preprocessing.fit == "crop":
        spare = (pixels.shape[0] - size, pixels.shape[1] - size)
        top, left = (s // 2 if preprocessing.rounding == "floor" else round(s / 2) for s in spare)
        pixels = pixels[top : top + size, left : left + size]
    scaled = pixels.permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    result: np.ndarray = ((scaled - mean) / std).numpy()
    return result


def picture_pixels(file: Path, preprocessing: ImagePreprocessing) -> np.ndarray:
    """float32 [3, S, S] of an image file, with EXIF orientation applied."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    return reference_pixels(upright, preprocessing)
