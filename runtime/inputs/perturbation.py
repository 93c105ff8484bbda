"""What the object-aware query perturbation means on the host: token masks and box weights.

The graphs take finished numbers: `object_masks`, which image tokens a box covers, and `box_weights`, how strongly it
acts. All choices between readings of the method are made here and nowhere else.

Source: Sogi, Shibata, Terao, "Object-Aware Query Perturbation for Cross-Modal Image-Text Retrieval", ECCV 2024,
sections 4.2–4.4, and the authors' release where it departs from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import InputError, LimitError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.token_grid import TokenGrid

Semantics = Literal["paper", "release"]
Coverage = Literal["exact", "binary", "dilated"]
Reduction = Literal["sum", "mean", "each"]
Stages = Literal["itc", "both", "none"]
FloatArray: TypeAlias = npt.NDArray[np.float64]

WEIGHT_FUNCTIONS: Mapping[str, tuple[float, float]] = {
    "constant": (1.0, 0.0),
    "S": (0.0, 1.0),
    "S-0.5": (-0.5, 1.0),
    "1-S": (1.0, -1.0),
    "0.5-S": (0.5, -1.0),
}
"""(β, γ) of the paper's five weight functions β + γS, S = box area / image area (section 4.4)."""

FIXED_IN_GRAPHS = ("threshold", "stages", "preserve_norm", "centre_keys")
"""Fields of `Perturbation` that an export fixes in its graphs; the host decides the others."""
ADDED_LATER = frozenset({"keep_stock", "centre_keys"})
"""Fields that older bundles and galleries lack; their defaults are what those were made with."""


@dataclass(frozen=True)
class Perturbation:
    """One reading of the method with its hyper-parameters; the manifest's `perturbation` block.

    `alpha`, `beta`, `gamma`: the weight of a box is α(β + γS). `threshold`: τ, the contribution ratio that the kept key
    subspace stays below, in (0, 1). `coverage`: see `object_masks`. `reduction`: the boxes of an image perturb one set
    of queries together, as a `sum` (the paper) or a `mean` (the release); or `each` box perturbs a set of its own and
    ITC takes the maximum over all sets (ours, beyond the paper; ITC only). `keep_stock` adds the stock set to these.
    `stages`: whether the image branch of ITC is perturbed, ITM too (`both`), or neither. `preserve_norm`: each query
    keeps its norm. `centre_keys`: key subspaces are those of the keys less their mean over the image's tokens (ours,
    beyond the paper). `semantics` records which reading the rest started from.

    Raises `InputError` for values that cannot be used.
    """

    semantics: Semantics = "paper"
    alpha: float = 8.0
    beta: float = 1.0
    gamma: float = 0.0
    threshold: float = 0.95
    coverage: Coverage = "exact"
    reduction: Reduction = "sum"
    stages: Stages = "itc"
    preserve_norm: bool = False
    keep_stock: bool = False
    centre_keys: bool = False

    def __post_init__(self) -> None:
        choices = {"semantics": Semantics, "coverage": Coverage, "reduction": Reduction, "stages": Stages}
        for name, choice in choices.items():
            _check_choice(name, getattr(self, name), get_args(choice))
        for name in ("alpha", "beta", "gamma", "threshold"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        if not 0 < self.threshold < 1:
            raise InputError(
                f"threshold is {self.threshold}; expected a contribution ratio between 0 and 1, as 0.95",
                code="perturbation-threshold",
            )
        for name in ("preserve_norm", "keep_stock", "centre_keys"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected true or false", code="perturbation-switch"
                )
        if self.keep_stock and self.reduction != "each":
            raise InputError(
                f"keep_stock is set with reduction {self.reduction!r}; it belongs to reduction 'each', whose "
                "query sets the stock set joins",
                code="perturbation-keep-stock",
            )
        if self.reduction == "each" and self.stages == "both":
            raise InputError(
                "reduction is 'each' and stages 'both'; a query set for each box is for ITC alone: use stages 'itc' "
                "(--perturb itc), or reduction 'sum' or 'mean'",
                code="perturbation-each-itm",
            )

    @property
    def splits_boxes(self) -> bool:
        """Whether each box perturbs a query set of its own."""
        return self.reduction == "each" and self.stages != "none"

    @classmethod
    def paper(cls, **overrides: Any) -> Perturbation:
        """As the paper defines it: sum over boxes, exact coverage, ITC only."""
        return cls(**_known({"semantics": "paper", **overrides}))

    @classmethod
    def release(cls, **overrides: Any) -> Perturbation:
        """As the authors' release computes it: mean over boxes, dilated coverage, ITM perturbed too, 1−S read as −S.

        The projector stays the paper's: the released one depends on the signs of eigenvectors, which are arbitrary.
        """
        values = {"semantics": "release", "reduction": "mean", "coverage": "dilated", "stages": "both", **overrides}
        perturbation = cls(**_known(values))
        if (perturbation.beta, perturbation.gamma) == WEIGHT_FUNCTIONS["1-S"]:
            return cls(**{**perturbation.to_dict(), "beta": 0.0})
        return perturbation

    def to_dict(self) -> dict[str, Any]:
        """The manifest's form. β and γ are those in effect, so a release's 1−S appears as (0, −1)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Perturbation:
        """The inverse of `to_dict`. Raises `InputError` for missing, unknown or unusable entries."""
        expected = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or {*values, *ADDED_LATER} != expected:
            got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise InputError(f"perturbation has {got}; expected exactly {sorted(expected)}", code="perturbation-fields")
        return cls(**values)


def object_masks(
    boxes: Sequence[Boxes | None], *, grid: TokenGrid, coverage: Coverage, pad_to: int | None = None
) -> npt.NDArray[np.float32]:
    """`object_masks` float32 [B,O,N]: how much of each image token every box covers, in [0, 1].

    B images; O = `pad_to`, or the largest number of boxes in the batch (0 is fine; None is an image without boxes);
    N = `grid.tokens`: the prefix (CLS), which no box covers, then the patches row by row. Rows of padding are 0. Where
    the picture is cropped, boxes are moved with it, and what is outside the crop covers nothing. `coverage` is

    - `exact`: the fraction of the patch's area inside the box;
    - `binary`: 1 for any overlap, else 0;
    - `dilated`, the release: corners are truncated to whole pixels of the original image, the 0/1 pixel mask is resized
      to S×S, every pixel above 0 becomes 1, and these are averaged over the patch. That the resize is bilinear with
      half-pixel centres and without antialiasing (`torch.nn.functional.interpolate`, align_corners=False) is our
      reading. A box that truncation leaves empty covers nothing.

    All three are products of a horizontal and a vertical profile, so the cost is O(N) a box, whatever its size.

    Raises `LimitError` for more boxes than `pad_to`, `InputError` for the rest.
    """
    _check_choice("coverage", coverage, get_args(Coverage))
    cells = np.zeros((len(boxes), _rows(boxes, pad_to), grid.rows, grid.columns))
    for image, item in enumerate(boxes):
        if item is None or not len(item):
            continue
        x1, y1, x2, y2 = item.xyxy.T  # [O] each
        across, down = _sides(item.size, grid)
        columns = _profile(x1, x2, across, coverage)  # [O, columns]
        rows = _profile(y1, y2, down, coverage)  # [O, rows]
        cells[image, : len(item)] = rows[:, :, None] * columns[:, None, :]
    return grid.flatten(cells)


def box_weights(
    boxes: Sequence[Boxes | None], perturbation: Perturbation, *, pad_to: int | None = None
) -> npt.NDArray[np.float32]:
    """`box_weights` float32 [B,O]: α(β + γS_b), S_b = box area / image area (section 4.3).

    With reduction `mean` each is divided by its own image's number of boxes; with `each` the weights are those of the
    box alone, as in `sum`. B, O and `pad_to` are as in
    `object_masks`; rows of padding weigh 0, and so does every box with stages `none`: zero weights are stock BLIP-2.
    """
    weights = np.zeros((len(boxes), _rows(boxes, pad_to)), np.float32)
    if perturbation.stages == "none":
        return weights
    for image, item in enumerate(boxes):
        if item is None or not len(item):
            continue
        each = perturbation.alpha * (perturbation.beta + perturbation.gamma * item.areas)
        weights[image, : len(item)] = each / len(item) if perturbation.reduction == "mean" else each
    return weights


def box_inputs(
    boxes: Sequence[Boxes | None], perturbation: Perturbation, grid: TokenGrid
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """`object_masks` [B,O,N] and `box_weights` [B,O] of a batch, as the graphs that take boxes want them."""
    return object_masks(boxes, grid=grid, coverage=perturbation.coverage), box_weights(boxes, perturbation)


def _rows(boxes: Sequence[Boxes | None], pad_to: int | None) -> int:
    if isinstance(boxes, Boxes):
        raise InputError(
            "boxes is one Boxes; expected a sequence with one entry for each image: put it in a list", code="boxes-kind"
        )
    counts = [0 if item is None else len(item) for item in boxes]
    largest = max(counts, default=0)
    if pad_to is not None and largest > pad_to:
        where = counts.index(largest)
        raise LimitError(
            f"image {where} has {largest} boxes; at most {pad_to} fit: keep the ones that matter most",
            code="too-many-boxes",
        )
    return largest if pad_to is None else pad_to


@dataclass(frozen=True)
class _Side:
    """One side of a picture: `length` pixels, resized to `resized`; `cells` patches from `offset` on are seen."""

    length: int
    resized: int
    offset: int
    cells: int
    patch: int

    @property
    def seen(self) -> int:
        """Resized pixels that patches cover."""
        return self.cells * self.patch


def _sides(size: tuple[int, int], grid: TokenGrid) -> tuple[_Side, _Side]:
    """The horizontal and the vertical side of a picture of `size` (width, height)."""
    resized = grid.image.resized(*size)
    left, top = grid.image.crop_offset(*resized)
    across = _Side(size[0], resized[0], left, grid.columns, grid.patch)
    return across, _Side(size[1], resized[1], top, grid.rows, grid.patch)


def _profile(low: FloatArray, high: FloatArray, side: _Side, coverage: Coverage) -> FloatArray:
    """[O,cells]: the share of each patch along one side that [low, high) covers."""
    if coverage == "dilated":
        return _dilated_profile(low, high, side)
    pixel = side.length / side.resized  # original pixels a resized one
    start = side.offset * pixel
    window = side.length if side.seen == side.resized else side.seen * pixel
    begin = ((low - start) * side.cells / window)[:, None]  # in cells; multiplied first: whole results are exact
    end = ((high - start) * side.cells / window)[:, None]
    places = np.arange(side.cells)
    overlap = np.clip(np.minimum(end, places + 1) - np.maximum(begin, places), 0, 1)
    return np.asarray(overlap if coverage == "exact" else overlap > 0, np.float64)


def _dilated_profile(low: FloatArray, high: FloatArray, side: _Side) -> FloatArray:
    """The release's mask along one side. A product of two profiles is above 0 exactly where both are.

    The position (p + 1/2) length / resized - 1/2 is computed as a fraction of whole numbers. In floating point, one
    that falls on a pixel's centre may be slightly off, and a neighbour without a share would count.
    """
    pixels = np.arange(side.seen, dtype=np.int64) + side.offset
    numerator = np.maximum((2 * pixels + 1) * side.length - side.resized, 0)
    left, rest = np.divmod(numerator, 2 * side.resized)  # in original pixels
    left = np.minimum(left, side.length - 1)
    right = np.minimum(left + 1, side.length - 1)
    start, end = np.trunc(low)[:, None], np.trunc(high)[:, None]
    touches_left = (start <= left) & (left < end)  # [O, S]; the left neighbour always has a positive share
    touches_right = (start <= right) & (right < end) & (rest > 0)
    return np.asarray((touches_left | touches_right).reshape(len(low), side.cells, -1).mean(axis=2))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(choices)}", code="perturbation-choice")


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}; expected a finite number", code="perturbation-number")
    return float(value)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    expected = [field.name for field in fields(Perturbation)]
    if unknown := sorted(set(values) - set(expected)):
        raise InputError(
            f"perturbation has no {', '.join(unknown)}; expected one or more of {', '.join(expected)}",
            code="perturbation-unknown",
        )
    return values
