"""Calibration data: images, captions and boxes of a split, and the inputs of each graph made from them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qpert.calibration.quantization.request import MIN_SAMPLES, QuantizeRequest
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_TOWER, PAIR_SCORER, PIXELS, TEXT_TOWER
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import check_box_counts
from qpert.runtime.evaluation.inputs import demo_folder
from qpert.runtime.files import cache_folder, sha256_of
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.datasets import RetrievalDataset, has_entities, read_dataset
from qpert.runtime.inputs.images import load_image, preprocess_images
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import Encoder, token_slots

Feed = dict[str, np.ndarray]
"""Inputs of one call of a graph, by name."""
TEXTS_A_PAIR_CALL = 16
"""Texts paired with each image to calibrate the pair graph: its own and others."""


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """The images for the gate, and those of them for ranges.

    split: all images for the gate. chosen: the part of the split to measure ranges on. sha256: over the chosen images'
    bytes and captions.
    """

    split: RetrievalDataset
    chosen: RetrievalDataset
    sha256: str
    feeds: dict[str, tuple[Feed, ...]] = field(default_factory=dict, repr=False)

    def describe(self, name: str) -> dict[str, Any]:
        """The entry in the manifest."""
        return {
            "dataset": name,
            "split": self.split.split,
            "range_images": len(self.chosen),
            "range_captions": len(self.chosen.captions),
            "gate_images": len(self.split),
            "gate_captions": len(self.split.captions),
            "sha256": self.sha256,
        }


def open_split(request: QuantizeRequest, progress: Progress) -> RetrievalDataset:
    """The split that `--dataset` names; `demo` is drawn once and kept in the cache folder."""
    if request.dataset == "demo":
        return demo_split(request.split, request.limit, progress)
    root = Path(request.dataset)
    has_boxes = has_entities(root)
    if not has_boxes:
        progress.say(f"{root} has no Entities boxes: the perturbation is calibrated without boxes")
    split = read_dataset(root, request.split, entities=has_boxes, skip_bad_boxes=request.skip_bad_boxes)
    return split if request.limit is None else split.take(request.limit)


def demo_split(split: str, count: int | None, progress: Progress) -> RetrievalDataset:
    """The split that `qpert eval` uses too; for part of it only that part is drawn, which is faster."""
    from qpert.runtime.scenes import write_dataset

    if count is None:
        return read_dataset(demo_folder(split, progress), split)
    root = cache_folder() / "quantization" / f"{split}-{count}"
    if not (root / "annotations" / f"{split}.json").is_file():
        write_dataset(root, split, count, progress=progress)
    return read_dataset(root, split)


def check_data(split: RetrievalDataset, samples: int) -> RetrievalDataset:
    """The images to measure ranges on, after checking that they differ enough.

    Raises:
        InputError: fewer than `MIN_SAMPLES` images, distinct images, or distinct captions.
    """
    if len(split) < MIN_SAMPLES:
        raise InputError(
            f"the split {split.split!r} of {split.root} has {len(split)} images, expected at least {MIN_SAMPLES} to "
            "measure ranges on; add images, or use another split",
            code="samples-too-few",
        )
    chosen = split.take(min(samples, len(split)))
    if len({sha256_of(path) for path in chosen.images}) < MIN_SAMPLES:
        raise InputError(
            f"fewer than {MIN_SAMPLES} of the first {len(chosen)} images of {split.root} differ; ranges measured on "
            "copies of a few images do not fit other images: give a sample of those to be searched",
            code="samples-repeated",
        )
    if len(set(chosen.captions)) < MIN_SAMPLES:
        raise InputError(
            f"fewer than {MIN_SAMPLES} of the first {len(chosen.captions)} captions of {split.root} differ; the text "
            "and pair graphs need captions like the queries to come",
            code="captions-repeated",
        )
    return chosen


def calibration_data(request: QuantizeRequest, encoder: Encoder, progress: Progress) -> CalibrationData:
    """Read and check the data, and run the float graphs to get realistic inputs for each graph.

    Raises:
        InputError: see `open_split` and `check_data`. LimitError: an image has more boxes than the bundle takes.
    """
    split = open_split(request, progress)
    chosen = check_data(split, request.samples)
    split = with_usable_boxes(split, encoder, progress)
    chosen = replace(chosen, boxes=split.boxes)
    with progress.stage("preparing calibration inputs"):
        feeds = make_feeds(encoder, chosen)
    return CalibrationData(split, chosen, data_hash(chosen), feeds)


def with_usable_boxes(split: RetrievalDataset, encoder: Encoder, progress: Progress) -> RetrievalDataset:
    """The split, without its boxes if the bundle takes none, which is reported.

    Raises:
        LimitError: an image has more boxes than the bundle takes.
    """
    if split.boxes is None:
        return split
    if not encoder.manifest.query_head.takes_boxes:
        progress.say("this bundle takes no boxes (--perturb none): it is calibrated and judged without them")
        return replace(split, boxes=None)
    counts = Counter(row.image for row in split.boxes.rows)
    check_box_counts(encoder, split.names, [counts[name] for name in split.names])
    return split


def data_hash(dataset: RetrievalDataset) -> str:
    """SHA-256 over the images' own hashes and the captions, in order."""
    digest = hashlib.sha256()
    for path in dataset.images:
        digest.update(sha256_of(path).encode())
    for caption in dataset.captions:
        digest.update(caption.encode() + b"\0")
    return digest.hexdigest()


def make_feeds(encoder: Encoder, dataset: RetrievalDataset) -> dict[str, tuple[Feed, ...]]:
    """Calls of each graph by its name, within the bundle's limits: images, features without and then with boxes,
    texts, pairs."""
    tower, head, scorer = encoder.graph(IMAGE_TOWER), encoder.manifest.query_head, encoder.manifest.pair_scorer
    images_in: list[Feed] = []
    plain: list[Feed] = []
    boxed: list[Feed] = []
    pairs: list[Feed] = []
    for rows in chunks(len(dataset), encoder.limit(IMAGE_TOWER, "B")):
        images = [load_image(dataset.images[row], name=dataset.names[row]) for row in rows]
        pixels = preprocess_images(images, encoder.manifest.preprocessing)
        images_in.append(tower.spec.bind({PIXELS: pixels}))
        tokens = tower.run({PIXELS: pixels})[IMAGE_TOKENS]
        boxes = [dataset.boxes_of(row, image.size) for row, image in zip(rows, images, strict=True)]
        plain.append(head.bind({IMAGE_TOKENS: tokens, **encoder.box_slots([None] * len(rows))}))
        if dataset.boxes is not None:
            boxed.append(head.bind({IMAGE_TOKENS: tokens, **encoder.box_slots(boxes)}))
        if scorer is not None:
            pairs += [pair_feed(encoder, scorer, dataset, tokens[[i]], rows[i], boxes[i]) for i in range(len(rows))]
    feeds = {
        tower.spec.name: tuple(images_in),
        head.name: (*plain, *boxed),
        encoder.manifest.text_tower.name: text_feeds(encoder, dataset),
    }
    return feeds | ({} if scorer is None else {scorer.name: tuple(pairs)})


def chunks(count: int, step: int) -> Iterator[range]:
    return (range(start, min(start + step, count)) for start in range(0, count, step))


def text_feeds(encoder: Encoder, dataset: RetrievalDataset) -> tuple[Feed, ...]:
    tokens, tower = encoder.tokenizer.encode(dataset.captions), encoder.manifest.text_tower
    step = encoder.limit(TEXT_TOWER, "T")
    parts = (tokens.trimmed(np.array(rows)) for rows in chunks(len(dataset.captions), step))
    return tuple(tower.bind(token_slots(part)) for part in parts)


def pair_feed(
    encoder: Encoder, scorer: GraphSpec, dataset: RetrievalDataset, image_tokens: np.ndarray, row: int, boxes: Boxes
) -> Feed:
    """One image with its own captions and some of the next images'."""
    first = int(np.searchsorted(dataset.image_of_caption, row))
    count = min(TEXTS_A_PAIR_CALL, encoder.limit(PAIR_SCORER, "T"), len(dataset.captions))
    texts = [dataset.captions[(first + offset) % len(dataset.captions)] for offset in range(count)]
    tokens = encoder.tokenizer.encode(texts).trimmed(np.arange(count))
    slots = {slot: array[None] for slot, array in token_slots(tokens).items()}
    return scorer.bind({IMAGE_TOKENS: image_tokens, **slots, **encoder.box_slots([boxes])})
