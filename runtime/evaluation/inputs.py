"""What is evaluated: a split, the boxes that perturb, and the boxes that sort images into size bins."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qpert.runtime.errors import BoxError, InputError, QpertWarning
from qpert.runtime.evaluation.metrics import largest_area
from qpert.runtime.files import cache_folder
from qpert.runtime.inputs.box_files import XmlCoordinates, read_box_file
from qpert.runtime.inputs.box_table import TableOfImages
from qpert.runtime.inputs.boxes import Boxes, one_warning_a_kind
from qpert.runtime.inputs.datasets import RetrievalDataset, has_entities, read_dataset
from qpert.runtime.inputs.images import image_size
from qpert.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from qpert.runtime.scenes.writer import CaptionKind

DEMO = "demo"
DEMO_SETS: dict[str, CaptionKind] = {DEMO: "usual", "demo-small-objects": "smallest"}
"""Generated data sets: the same pictures, with captions of all sizes, or of each picture's smallest object alone."""
ENTITIES = "entities"
NO_BOXES = "none"
SEED = 0
"""Seed of the generated scenes: that of the splits on the model card."""

Size = tuple[int, int]
BoxesOf = Callable[[RetrievalDataset, int, Size], Boxes]


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """A split of B images and its boxes. `boxes` perturb, `bin_boxes` only decide the size bins and may come from
    another source.

    `boxes_from`, `bins_from`: phrases that name their sources. `title`: the name of the split in the report.
    """

    dataset: RetrievalDataset
    boxes: tuple[Boxes, ...] = field(repr=False)
    bin_boxes: tuple[Boxes, ...] = field(repr=False)
    boxes_from: str
    bins_from: str
    title: str = ""

    @property
    def largest_areas(self) -> npt.NDArray[np.float64]:
        """float64 [B], which decides each image's size bin; NaN without boxes."""
        return np.array([largest_area(boxes) for boxes in self.bin_boxes], np.float64)

    def dataset_digest(self) -> str:
        """SHA-256 of file names and sizes, captions and their images."""
        digest = hashlib.sha256()
        for name, file in zip(self.dataset.names, self.dataset.images, strict=True):
            digest.update(f"{name}\0{file.stat().st_size}\0".encode("utf-8", "surrogatepass"))
        for caption, owner in zip(self.dataset.captions, self.dataset.image_of_caption.tolist(), strict=True):
            digest.update(f"{owner}\0{caption}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def boxes_digest(self) -> str:
        """SHA-256 of the boxes that perturb, coordinate by coordinate."""
        digest = hashlib.sha256()
        for boxes in self.boxes:
            digest.update(f"{len(boxes)} {boxes.size}".encode() + np.ascontiguousarray(boxes.xyxy).tobytes())
        return digest.hexdigest()


def open_data(
    dataset: str | Path,
    split: str = "test",
    *,
    boxes: str | Path = ENTITIES,
    bin_boxes: str | Path | None = None,
    xml_coordinates: XmlCoordinates = "one_based_inclusive",
    skip_bad_boxes: bool = False,
    limit: int | None = None,
    max_boxes: int | None = None,
    progress: Progress | None = None,
) -> EvaluationData:
    """Read a split and everything about it that needs no network.

    Args:
        dataset: a folder in LAVIS's layout, or one of `DEMO_SETS`, generated scenes (drawn once, into the cache).
        split: `train`, `val` or `test`.
        boxes: which perturb: `entities`, `none`, or a box file.
        bin_boxes: which decide the size bins, given like `boxes`; None uses Entities if there are any, else `boxes`.
        xml_coordinates: how corners in XML are counted; see `qpert.runtime.inputs.box_files`.
        skip_bad_boxes: leave out boxes that cannot be used, with a warning, instead of stopping at them.
        limit: use only the first `limit` images, with their captions.
        max_boxes: of more boxes that perturb an image, keep the best by score.

    Raises:
        InputError: see `read_dataset` and `read_box_file`; or a limit below 1.
        ImageError, BoxError: an image that cannot be read, or boxes that do not fit theirs.
    """
    if limit is not None and limit < 1:
        raise InputError(f"got --limit {limit}, expected at least one image", code="limit-images")
    name, root = str(dataset), Path(dataset)
    if name in DEMO_SETS:
        root = demo_folder(split, progress or Silent(), captions=DEMO_SETS[name])
    if bin_boxes is None:
        bin_boxes = ENTITIES if has_entities(root) else boxes
    entities = ENTITIES in (str(boxes), str(bin_boxes))
    found = read_dataset(root, split, entities=entities, xml_coordinates=xml_coordinates, skip_bad_boxes=skip_bad_boxes)
    found = found if limit is None else found.take(limit)
    sizes = [image_size(file) for file in found.images]
    chosen: dict[str, tuple[tuple[Boxes, ...], str]] = {}
    for source in sorted({str(boxes), str(bin_boxes)}):
        chosen[source] = read_boxes(found, sizes, source, xml_coordinates, skip_bad_boxes=skip_bad_boxes)
    (own, own_from), (bins, bins_from) = chosen[str(boxes)], chosen[str(bin_boxes)]
    if max_boxes is not None:
        own = tuple(one.best(max_boxes) for one in own)
        own_from += f", at most {max_boxes} an image: {sum(map(len, own)):,} boxes"
    title = f"{f'Generated scenes ({name})' if name in DEMO_SETS else root.resolve().name}, {split} split"
    return EvaluationData(found, own, bins, own_from, bins_from, title)


def read_boxes(
    dataset: RetrievalDataset,
    sizes: Sequence[Size],
    source: str,
    coordinates: XmlCoordinates,
    *,
    skip_bad_boxes: bool = False,
) -> tuple[tuple[Boxes, ...], str]:
    """The boxes of every image from `source` (`entities`, `none` or a file), and a phrase that names their source.

    A file may also have boxes of other images. Boxes that extend beyond their image are clipped, with one warning for
    all. Raises BoxError, for instance if no image has a box (`boxes-none`).
    """
    if source == NO_BOXES:
        return tuple(Boxes.empty(size) for size in sizes), "no boxes"
    found = _table(dataset, source, coordinates, skip_bad_boxes=skip_bad_boxes)
    with one_warning_a_kind():
        boxes = tuple(found.table.for_image(name, size) for name, size in zip(dataset.names, sizes, strict=True))
    with_boxes = sum(bool(len(one)) for one in boxes)
    if not with_boxes:
        named = ", ".join([*found.table.images, *found.others][:3]) or "no image"
        raise BoxError(
            f"{source} has boxes for none of the {len(dataset)} images; it has boxes of {named}, the data set has "
            f"{', '.join(dataset.names[:3])}: give boxes of these images, or `none`",
            code="boxes-none",
        )
    if found.others:
        shown = ", ".join(found.others[:3])
        message = f"{source} has boxes of {len(found.others)} images that are not among those evaluated: {shown}"
        warnings.warn(message, QpertWarning, stacklevel=2)
    phrase = f"Entities ({Path(found.table.source).name})" if source == ENTITIES else source
    return boxes, f"{phrase}: {sum(map(len, boxes)):,} boxes on {with_boxes:,} of {len(dataset):,} images"


def _table(
    dataset: RetrievalDataset, source: str, coordinates: XmlCoordinates, *, skip_bad_boxes: bool
) -> TableOfImages:
    """The boxes, by the data set's image names."""
    if source == ENTITIES:
        if dataset.boxes is None:
            raise BoxError(f"the data set {dataset.root} was read without its Entities boxes", code="boxes-not-read")
        return TableOfImages(dataset.boxes, ())
    return read_box_file(source, xml_coordinates=coordinates, skip_bad_boxes=skip_bad_boxes).of_images(dataset.names)


def demo_folder(split: str, progress: Progress, *, captions: CaptionKind = "usual") -> Path:
    """The generated scenes of a split, drawn on first use and after a change of the generator."""
    from qpert.runtime.scenes import SPLIT_SIZES, write_dataset

    if split not in SPLIT_SIZES:
        raise InputError(f"split is {split!r}; expected one of {', '.join(SPLIT_SIZES)}", code="split")
    suffix = "" if captions == "usual" else f"-{captions}"
    root = cache_folder() / "scenes" / f"{generator_digest()}-{split}-{SPLIT_SIZES[split]}{suffix}"
    if not (root / "annotations" / f"{split}.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        write_dataset(root, split, seed=SEED, captions=captions, progress=progress)
    return root


def generator_digest() -> str:
    """Digest of the code that draws scenes: a changed generator draws other pictures."""
    import qpert.runtime.scenes as scenes

    digest = hashlib.sha256()
    for file in sorted(Path(next(iter(scenes.__path__))).glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
