"""Where the image tokens of a vision transformer lie in the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError
from qpert.runtime.inputs.preprocessing import ImagePreprocessing


@dataclass(frozen=True)
class TokenGrid:
    """Patches of `patch`×`patch` pixels in `rows` × `columns`, row by row, after `prefix` tokens that have no place.

    `prefix` counts CLS and registers: 1 in BLIP-2, 0 in SigLIP. `image` says which part of the picture the patches
    cover, and at which resolution; pixels that fill no whole patch at the right and bottom are seen by none (SigLIP
    so400m: 27 patches of 14 pixels in 384). Raises `InputError` where the patches do not fit into the image.
    """

    rows: int
    columns: int
    patch: int
    prefix: int
    image: ImagePreprocessing

    def __post_init__(self) -> None:
        size = self.image.size
        if min(self.rows, self.columns, self.patch) < 1 or self.prefix < 0:
            raise InputError(
                f"got {self.rows}×{self.columns} patches of {self.patch} pixels after {self.prefix} tokens; expected "
                "at least one patch, and no negative number",
                code="token-grid",
            )
        if max(self.rows, self.columns) * self.patch > size:
            raise InputError(
                f"{self.rows}×{self.columns} patches of {self.patch} pixels do not fit into {size}×{size} pixels; "
                "expected size // patch of them",
                code="token-grid",
            )

    @property
    def tokens(self) -> int:
        """Image tokens N."""
        return self.prefix + self.rows * self.columns

    def flatten(self, cells: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Numbers of patches [..., rows, columns] as numbers of tokens float32 [..., N]; 0 for the prefix."""
        tokens = np.zeros((*cells.shape[:-2], self.tokens), np.float32)
        tokens[..., self.prefix :] = cells.reshape(*cells.shape[:-2], self.rows * self.columns)
        return tokens
