"""A tiny bundle that perturbs ITC, and a split with boxes of many sizes, for the tests of `qpert calibrate`."""

import json

import numpy as np
import pytest
from evaluation_sets import SIZE, write_set
from tiny_model import THRESHOLD

IMAGES, CAPTIONS = 16, 3


def write_boxes(root, images):
    """A box file: one for the first image, none for the second, then two to four, from small to large ones."""
    random = np.random.default_rng(4)
    lines = []
    for image in (0, *range(2, images)):
        for number in range(1 if image == 0 else 2 + image % 3):
            side = np.maximum(4, np.array(SIZE) * random.uniform(0.2, 1, 2) * (image + 1) / images)
            low = random.uniform(0, 1, 2) * (np.array(SIZE) - side)
            x1, y1, x2, y2 = (float(value) for value in (*low, *(low + side)))
            name = f"flickr30k-images/{image:04d}.png"
            lines.append(json.dumps({"image": name, "x1": x1, "y1": y1, "x2": x2, "y2": y2, "label": str(number)}))
    (root / "boxes.jsonl").write_text("\n".join(lines) + "\n")
    return root / "boxes.jsonl"


@pytest.fixture(scope="session")
def itc_bundle(export_tiny):
    """The tiny model with boxes in ITC only. Not to be written to."""
    from qpert.exporter.families.declare import Limits
    from qpert.runtime.inputs.perturbation import Perturbation

    perturbation = Perturbation(stages="itc", threshold=THRESHOLD)
    return export_tiny(perturbation=perturbation, limits=Limits(4, 4, 8, 12))


@pytest.fixture(scope="session")
def boxed_set(tmp_path_factory):
    """16 pictures, 48 captions, 43 boxes; split `val`."""
    root = write_set(tmp_path_factory.mktemp("boxed") / "set", IMAGES, CAPTIONS, split="val")
    write_boxes(root, IMAGES)
    return root


@pytest.fixture(scope="session")
def boxed_data(boxed_set):
    from qpert.runtime.evaluation.inputs import open_data

    return open_data(boxed_set, "val", boxes=boxed_set / "boxes.jsonl", bin_boxes=boxed_set / "boxes.jsonl")
