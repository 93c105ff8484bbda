"""`make demo`: export the demonstration checkpoint, verify it, index generated scenes, search them.

Writes `demo/` in the working folder: the scenes, the bundle, two galleries (without and with boxes), and `index.html`
with the pictures and their boxes, where each search finds its picture before and after the perturbation and after
re-ranking, the parity verdict and the timings. Needs no network and no GPU.
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

from qpert.runtime import Boxes, Retriever
from qpert.runtime.cli import run
from qpert.runtime.evaluation.metrics import recall, text_to_image_ranks
from qpert.runtime.inputs.datasets import RetrievalDataset, read_dataset
from qpert.runtime.inputs.images import image_size
from qpert.runtime.progress import Terminal
from qpert.runtime.retrieval.scores import itc_scores
from qpert.runtime.scenes import write_dataset

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
    boxes = [dataset.boxes_of(i, image_size(path)) for i, path in enumerate(dataset.images)]
    write_boxes(OUT / "boxes.jsonl", dataset, boxes)
    index = ["index", str(bundle), str(OUT / "scenes" / "annotations" / "test.json"), "--out"]
    commands = {
        "export": ["export", "blip2", "--out", str(bundle)],
        "verify": ["verify", str(bundle)],
        "index without boxes": [*index, str(OUT / "gallery-without-boxes")],
        "index with boxes": [*index, str(OUT / "gallery"), "--boxes", str(OUT / "boxes.jsonl")],
    }
    for stage, command in commands.items():
        print("$ qpert", " ".join(command), flush=True)
        with timings.measure(stage):
            code = run(command)
        if code:
            return code
    path = OUT / "index.html"
    with Retriever.open(bundle) as retriever:
        path.write_text(explore(retriever, dataset, boxes, timings), encoding="utf-8")
    print(f'search it yourself: qpert search {OUT / "gallery"} "a tiny red heart" --html {OUT / "search.html"}')
    print(f"the page to look at: {path.resolve()}")
    return 0


def write_boxes(path: Path, dataset: RetrievalDataset, boxes: list[Boxes]) -> None:
    """A box file as a detector would leave one."""
    lines = [
        json.dumps({"image": name, **dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True)), "label": label})
        for name, given in zip(dataset.names, boxes, strict=True)
        for corners, label in zip(given.xyxy.tolist(), given.labels or ("",) * len(given), strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def explore(retriever: Retriever, dataset: RetrievalDataset, boxes: list[Boxes], timings: Timings) -> str:
    """Search both galleries for the smallest objects, and make the page."""
    with (
        retriever.open_gallery(OUT / "gallery-without-boxes") as stock,
        retriever.open_gallery(OUT / "gallery") as perturbed,
    ):
        scores = {
            "without boxes": itc_scores(stock.query_embeds, stock.text_embeds),
            "with boxes": itc_scores(perturbed.query_embeds, perturbed.text_embeds),
        }
        ranks = {name: text_to_image_ranks(score, dataset.image_of_caption) for name, score in scores.items()}
        numbers = chosen_captions(dataset, boxes)
        captions = [dataset.captions[number] for number in numbers]
        with timings.measure(f"{2 * SEARCHES} searches, {SHORTLIST} pictures re-ranked each"):
            hits_stock = retriever.search_batch(captions, stock, k=SHORTLIST, rerank=SHORTLIST)
            hits = retriever.search_batch(captions, perturbed, k=SHORTLIST, rerank=SHORTLIST)
    searches = [
        Search(
            caption=dataset.captions[number],
            target=dataset.names[dataset.image_of_caption[number]],
            rank_stock=int(ranks["without boxes"][number]) + 1,
            rank_perturbed=int(ranks["with boxes"][number]) + 1,
            hits_stock=hits_stock[turn],
            hits=hits[turn],
        )
        for turn, number in enumerate(numbers)
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
