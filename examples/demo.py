"""`make demo`: export the demonstration checkpoint, verify it, index generated scenes, search them.

Writes `demo/` in the working folder: the scenes, the bundle, and `index.html` with the pictures and their boxes, where
each search finds its picture before and after the perturbation and after re-ranking, the parity verdict and the
timings. Needs no network and no GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from demo_page import Search, render
from PIL import Image

from qpert.runtime import Boxes, Gallery, Retriever
from qpert.runtime.cli import run
from qpert.runtime.datasets import RetrievalDataset, read_dataset
from qpert.runtime.metrics import recall, text_to_image_ranks
from qpert.runtime.progress import Terminal
from qpert.runtime.scenes import write_dataset
from qpert.runtime.scores import itc_scores

OUT = Path("demo")
SCENES = 200
SEARCHES = 6
SHORTLIST = 32


@dataclass
class Timings:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


def main() -> int:
    timings, bundle = Timings(), OUT / "bundle"
    shutil.rmtree(OUT, ignore_errors=True)
    with timings.measure(f"drawing {SCENES} scenes"):
        write_dataset(OUT / "scenes", "test", SCENES, progress=Terminal())
    dataset = read_dataset(OUT / "scenes", "test")
    for stage, command in (("export", ["export", "blip2", "--out", str(bundle)]), ("verify", ["verify", str(bundle)])):
        with timings.measure(stage):
            code = run(command)
        if code:
            return code
    boxes = [dataset.boxes_of(i, Image.open(path).size) for i, path in enumerate(dataset.images)]
    with Retriever.open(bundle) as retriever:
        page = explore(retriever, dataset, boxes, timings)
    path = OUT / "index.html"
    path.write_text(page, encoding="utf-8")
    print(f"the page to look at: {path.resolve()}")
    return 0


def explore(retriever: Retriever, dataset: RetrievalDataset, boxes: list[Boxes], timings: Timings) -> str:
    """Index without and with boxes, search for the smallest objects, and make the page."""
    with timings.measure(f"indexing {len(dataset)} pictures, without and with boxes"):
        stock = Gallery(dataset.names, retriever.encode_images(dataset.images))
        perturbed = Gallery(dataset.names, retriever.encode_images(dataset.images, boxes))
        texts = retriever.encode_texts(dataset.captions)
    scores = {
        "without boxes": itc_scores(stock.features.query_embeds, texts),
        "with boxes": itc_scores(perturbed.features.query_embeds, texts),
    }
    ranks = {name: text_to_image_ranks(score, dataset.image_of_caption) for name, score in scores.items()}
    with timings.measure(f"{2 * SEARCHES} searches, {SHORTLIST} pictures re-ranked each"):
        searches = [
            Search(
                caption=dataset.captions[number],
                target=dataset.names[dataset.image_of_caption[number]],
                rank_stock=int(ranks["without boxes"][number]) + 1,
                rank_perturbed=int(ranks["with boxes"][number]) + 1,
                hits_stock=retriever.search(dataset.captions[number], stock, k=SHORTLIST, rerank=SHORTLIST),
                hits=retriever.search(dataset.captions[number], perturbed, k=SHORTLIST, rerank=SHORTLIST),
            )
            for number in chosen_captions(dataset, boxes)
        ]
    manifest = json.loads((retriever.encoder.bundle.folder / "manifest.json").read_text(encoding="utf-8"))
    return render(
        dataset,
        boxes,
        searches,
        verdict=manifest["verification"]["verdict"],
        notes=manifest["notes"],
        recalls={name: recall(rank) for name, rank in ranks.items()},
        timings=timings.seconds,
    )


def chosen_captions(dataset: RetrievalDataset, boxes: list[Boxes]) -> list[int]:
    """A caption of each of the pictures whose largest object is smallest: chosen by the scenes, not by results."""
    largest = np.array([given.areas.max() if len(given) else 1.0 for given in boxes])
    pictures = np.argsort(largest, kind="stable")[:SEARCHES]
    return [int(np.flatnonzero(dataset.image_of_caption == picture)[turn % 5]) for turn, picture in enumerate(pictures)]


if __name__ == "__main__":
    sys.exit(main())
