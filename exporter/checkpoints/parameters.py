"""A checkpoint's parameters under LAVIS's names, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpert.exporter.checkpoints.files import TensorStore
from qpert.exporter.families.blip2.names import Origin
from qpert.graphs.families.blip2.config import Blip2Config, VisionConfig
from qpert.runtime.errors import CheckpointError

ALIGN_CORNERS = {"eva": False, "clip": True}
"""How LAVIS interpolates: eva_vit.py `interpolate_pos_embed`, clip_vit.py `interpolate_pos_embed`."""

POSITIONS = {"eva": "visual_encoder.pos_embed", "clip": "visual_encoder.positional_embedding"}


@dataclass(frozen=True)
class LazyTensors:
    """Parameters by LAVIS name. Nothing is read before `get`, nothing is kept after it.

    `config` is the checkpoint's own, `image_size` the size that position embeddings are made for.
    """

    store: TensorStore
    origins: Mapping[str, Origin]
    config: Blip2Config
    image_size: int

    def names(self) -> Iterable[str]:
        return self.origins.keys()

    def __iter__(self) -> Iterable[str]:
        return iter(self.origins)

    def __len__(self) -> int:
        return len(self.origins)

    def get(self, name: str) -> Tensor:
        """The parameter in the dtype it is stored in (float32 where it was interpolated).

        Raises:
            KeyError: no parameter has that name.
            CheckpointError: there is a NaN or an infinity in it, or it cannot be read.
        """
        origin = self.origins[name]
        tensor = self._read(origin.name)
        check_finite(tensor, origin.name)
        if origin.third is not None:
            tensor = tensor.chunk(3)[origin.third]
        vision = self.config.vision
        if name == POSITIONS[vision.family] and self.image_size != vision.image_size:
            return interpolate_positions(tensor, vision, self.image_size)
        return tensor

    __getitem__ = get

    def _read(self, name: str) -> Tensor:
        try:
            return self.store.read(name).detach()
        except (OSError, RuntimeError, KeyError) as error:
            files = ", ".join(str(path) for path in self.store.files)
            raise CheckpointError(
                f"{name} cannot be read from {files} ({error}); was the checkpoint closed, or changed meanwhile?"
            ) from error


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` where the tensor holds NaN or infinity; one pass, nothing allocated."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # NaN where there is one
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise CheckpointError(
        f"{name} holds NaN or infinity in {bad:,} of its {tensor.numel():,} values; expected finite weights: the "
        "checkpoint is corrupt, or training diverged"
    )


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
