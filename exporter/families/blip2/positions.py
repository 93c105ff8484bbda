"""Position embeddings for another image size than the checkpoint's, as LAVIS interpolates them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qpert.graphs.families.blip2.config import Blip2Config, VisionConfig
from qpert.runtime.errors import InputError

ALIGN_CORNERS = {"eva": False, "clip": True}
"""How LAVIS interpolates: eva_vit.py `interpolate_pos_embed`, clip_vit.py `interpolate_pos_embed`."""

POSITIONS = {"eva": "visual_encoder.pos_embed", "clip": "visual_encoder.positional_embedding"}


def positions_for(config: Blip2Config, image_size: int) -> Callable[[str, Tensor], Tensor]:
    """The `LazyTensors.adapt` of a checkpoint of `config` that is exported at `image_size`."""
    vision = config.vision

    def adapt(name: str, tensor: Tensor) -> Tensor:
        if name == POSITIONS[vision.family] and image_size != vision.image_size:
            return interpolate_positions(tensor, vision, image_size)
        return tensor

    return adapt


def interpolate_positions(positions: Tensor, vision: VisionConfig, image_size: int) -> Tensor:
    """Position embeddings [1, N, C] (EVA) or [N, C] (CLIP) for another image size, as LAVIS does: float32, bicubic.

    CLS (the first row) is kept; the patches are a square image of C channels. Corners are aligned for CLIP only.
    """
    rows = positions.float().reshape(-1, vision.width)  # [N, C]
    size = image_size // vision.patch_size
    image = rows[1:].reshape(1, vision.grid, vision.grid, vision.width).permute(0, 3, 1, 2)  # [1, C, g, g]
    resized = torch.nn.functional.interpolate(
        image, size=(size, size), mode="bicubic", align_corners=ALIGN_CORNERS[vision.family]
    )
    patches = resized.permute(0, 2, 3, 1).reshape(size * size, vision.width)
    return torch.cat([rows[:1], patches]).reshape(*positions.shape[:-2], -1, vision.width)


def at_image_size(config: Blip2Config, image_size: int) -> Blip2Config:
    """`config` at `image_size`; raises `InputError` unless that is a positive multiple of the patch size."""
    patch = config.vision.patch_size
    if image_size < patch:
        raise InputError(
            f"image size {image_size} is not a positive multiple of the patch size {patch}", code="export-image-size"
        )
    try:
        return config.with_image_size(image_size)
    except ValueError as error:
        raise InputError(str(error), code="export-image-size") from error


def size_note(config: Blip2Config, image_size: int) -> tuple[str, ...]:
    own = config.vision.image_size
    if image_size == own:
        return ()
    patch = config.vision.patch_size
    return (
        f"position embeddings interpolated from {own} px ({own // patch}×{own // patch} patches) to {image_size} px "
        f"({image_size // patch}×{image_size // patch}), bicubic, as LAVIS does",
    )
