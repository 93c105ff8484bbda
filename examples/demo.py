"""`make demo`: pictures alone go in; boxes are found, and the small thing asked for is found because of them.

Writes `demo/` in the working folder: generated scenes, a retrieval bundle, a detector, galleries without boxes, with
detected and with true boxes, and `index.html`, which shows what boxes changed, for better and for worse. Needs no
network and no GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from demo_page import Case, Condition, Page, render

from qpert.runtime import Boxes, Retriever
from qpert.runtime.cli import run
from qpert.runtime.evaluation.bootstrap import Hits, draws, interval, once, scores
from qpert.runtime.evaluation.metrics import text_to_image_ranks
from qpert.runtime.gallery.reader import StoredGallery
from qpert.runtime.inputs.datasets import RetrievalDataset, read_dataset
from qpert.runtime.inputs.images import image_size
from qpert.runtime.progress import Terminal
from qpert.runtime.scenes import generate, write_dataset

OUT = Path("demo")
CHECKPOINT = "demo-small-objects"
SCENES, SEED = 200, 0
CASES = 6
"""Cases shown of those that moved up, and of those that moved down."""
TRIED = 20
"""Improved captions that are tried for the search to suggest."""
CONDITIONS = ("without boxes", "boxes of the detector", "true boxes")
WITHOUT, DETECTED, TRUE = CONDITIONS

Ranks = npt.NDArray[np.int64]


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
    timings, bundle, detector = Timings(), OUT / "bundle", OUT / "detector"
    shutil.rmtree(OUT, ignore_errors=True)
    with timings.measure(f"drawing {SCENES} scenes"):
        write_dataset(OUT / "scenes", "test", SCENES, SEED, captions="smallest", progress=Terminal())
    dataset = read_dataset(OUT / "scenes", "test")
    boxes = [dataset.boxes_of(i, image_size(path)) for i, path in enumerate(dataset.images)]
    pictures = dataset.images[0].parent
    write_boxes(OUT / "true-boxes.jsonl", dataset, boxes)
    index = ["index", str(bundle), str(pictures), "--out"]
    commands = {
        "export the retrieval model": ["export", "blip2", "--checkpoint", CHECKPOINT, "--out", str(bundle)],
        "export the detector": ["export", "detector", "--checkpoint", "demo", "--out", str(detector)],
        "verify": ["verify", str(bundle)],
        "index without boxes": [*index, str(gallery_of(WITHOUT))],
        "detect and index": [*index, str(gallery_of(DETECTED)), "--detector", str(detector)],
        "index with true boxes": [*index, str(gallery_of(TRUE)), "--boxes", str(OUT / "true-boxes.jsonl")],
    }
    for stage, command in commands.items():
        print("$ qpert", " ".join(command), flush=True)
        with timings.measure(stage):
            code = run(command)
        if code:
            return code
    path = OUT / "index.html"
    with Retriever.open(bundle) as retriever:
        page = explore(retriever, dataset, boxes, timings)
    path.write_text(render(page), encoding="utf-8")
    print(f"search it yourself: {page.suggestion}")
    print(f"the page to look at: {path.resolve()}")
    return 0


def gallery_of(condition: str) -> Path:
    names = {WITHOUT: "gallery-without-boxes", DETECTED: "gallery", TRUE: "gallery-with-true-boxes"}
    return OUT / names[condition]


def write_boxes(path: Path, dataset: RetrievalDataset, boxes: list[Boxes]) -> None:
    """A box file by the pictures' own names."""
    lines = [
        json.dumps({"image": file.name, **dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True)), "label": label})
        for file, given in zip(dataset.images, boxes, strict=True)
        for corners, label in zip(given.xyxy.tolist(), given.labels or ("",) * len(given), strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def explore(retriever: Retriever, dataset: RetrievalDataset, boxes: list[Boxes], timings: Timings) -> Page:
    """Rank every caption in every gallery by ITC, and choose what the page shows by the ranks alone."""
    usual = [caption.text for _, captions in generate("test", SCENES, SEED) for caption in captions]
    owners = {
        "smallest": np.asarray(dataset.image_of_caption),
        "usual": np.repeat(np.arange(SCENES), len(usual) // SCENES),
    }
    with timings.measure(f"encoding {len(dataset.captions) + len(usual):,} captions"):
        texts = {
            "smallest": retriever.encode_texts(dataset.captions),
            "usual": retriever.encode_texts(usual),
        }
    ranks: dict[str, dict[str, Ranks]] = {}
    for condition in CONDITIONS:
        with retriever.open_gallery(gallery_of(condition)) as gallery:
            assert gallery.images == tuple(file.name for file in dataset.images)
            ranks[condition] = {
                kind: text_to_image_ranks(gallery.itc_scores(embeds), owners[kind]) for kind, embeds in texts.items()
            }
    largest = np.array([given.areas.max() if len(given) else np.nan for given in boxes])
    before, after = ranks[WITHOUT]["smallest"], ranks[DETECTED]["smallest"]
    up, down = (one_a_picture(moved, owners["smallest"]) for moved in (chosen(before, after), chosen(after, before)))
    with retriever.open_gallery(gallery_of(DETECTED)) as gallery:

        def case(number: int) -> Case:
            row = int(owners["smallest"][number])
            matched = gallery.matched_box(row, texts["smallest"][number])
            index = None if matched is None else matched.index
            places = int(before[number]) + 1, int(after[number]) + 1
            return Case(dataset.captions[number], dataset.images[row], gallery.boxes_of(row), index, *places)

        suggestion = suggested(retriever, gallery, dataset, up)
        shown = tuple(map(case, up[:CASES])), tuple(map(case, down[:CASES]))
    return Page(
        conditions=conditions(ranks, owners, largest),
        improved=shown[0],
        worsened=shown[1],
        moved=(int((after < before).sum()), int((after > before).sum()), int((after == before).sum())),
        pictures=SCENES,
        suggestion=suggestion,
        verification=retriever.encoder.manifest.verification or {},
        timings=timings.seconds,
    )


def one_a_picture(captions: list[int], owners: Ranks) -> list[int]:
    """The first caption of each picture."""
    return list({int(owners[number]): number for number in reversed(captions)}.values())[::-1]


def chosen(worse: Ranks, better: Ranks) -> list[int]:
    """Captions that moved up, by how many times: from rank 100 to 1 before 150 to 3."""
    gains = np.log((worse + 1) / (better + 1))
    return [int(number) for number in np.argsort(-gains, kind="stable") if gains[number] > 0]


def conditions(
    ranks: Mapping[str, Mapping[str, Ranks]], owners: Mapping[str, Ranks], largest: npt.NDArray[np.float64]
) -> tuple[Condition, ...]:
    """R@1 of both kinds of captions under every condition, and the difference to no boxes with its interval."""
    found = {}
    for kind in ("smallest", "usual"):
        hits = Hits.of_texts([ranks[condition][kind] for condition in CONDITIONS], owners[kind], largest)
        drawn = np.concatenate([scores(hits, part, "r1") for part in draws(SCENES)])
        whole = scores(hits, once(SCENES), "r1")[0]
        found[kind] = [(float(whole[i]), interval(drawn[:, i] - drawn[:, 0])) for i in range(len(CONDITIONS))]
    return tuple(
        Condition(name, *found["smallest"][place], *found["usual"][place]) for place, name in enumerate(CONDITIONS)
    )


def suggested(retriever: Retriever, gallery: StoredGallery, dataset: RetrievalDataset, up: list[int]) -> str:
    """A search to try: a caption that boxes brought to the top, where it stays when the command re-ranks."""
    command = f'qpert search {gallery_of(DETECTED)} "{{}}" --html {OUT / "search.html"}'
    for number in up[:TRIED]:
        caption, target = dataset.captions[number], dataset.images[dataset.image_of_caption[number]].name
        if retriever.search(caption, gallery, k=1)[0].image == target:
            return command.format(caption)
    for number in up[:TRIED]:
        caption, target = dataset.captions[number], dataset.images[dataset.image_of_caption[number]].name
        if retriever.search(caption, gallery, k=1, rerank=0)[0].image == target:
            return command.format(caption) + " --rerank 0"
    raise RuntimeError("none of the captions that boxes helped most is found first; something is wrong")


if __name__ == "__main__":
    sys.exit(main())
