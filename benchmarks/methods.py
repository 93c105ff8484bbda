"""The paper's baselines beside its perturbation, on the 1,000 test scenes of a demonstration.

    python benchmarks/methods.py BUNDLE --dataset demo-small-objects --work /tmp/methods \
        --out benchmarks/results/demonstration_methods.json

With --evaluated, the default readings as one command compared them:

    qpert eval BUNDLE --dataset demo-small-objects --rerank 0 --method none,q-pert,or-q-pert,oes --json > FILE

True boxes. The settings of the perturbation are the bundle's, which `qpert calibrate` chose on the validation scenes.
The readings of OrQ-Pert and OEs that the paper leaves open are chosen on the same validation scenes by the same score
(the mean R@1 of both directions, ITC alone), and every reading is reported on the test scenes by ITC alone. OEs are
chosen among readings that pool visual tokens, as the paper has it; pictures cropped to the box are a stronger
baseline of their own, which goes through the image tower once more a box. With --rerank the chosen readings are
compared by ITC + ITM too. Everything is deterministic but for rounding; the seed is that of the bootstrap.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
from full_size import machine

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.evaluate import opened_images
from qpert.runtime.evaluation.inputs import EvaluationData, open_data
from qpert.runtime.evaluation.methods.choices import Choices, Method, Pooling, SeveralBoxes, Similarity
from qpert.runtime.evaluation.methods.compare import STOCK_GALLERY, compare, opened_journal, without_boxes
from qpert.runtime.evaluation.methods.comparison import Comparison
from qpert.runtime.evaluation.methods.images import MethodImages, MethodReader
from qpert.runtime.evaluation.methods.report import comparison_report
from qpert.runtime.evaluation.metrics import image_to_text_ranks, text_to_image_ranks
from qpert.runtime.evaluation.running import Watch, encode_all_texts
from qpert.runtime.evaluation.work import Binding, open_work
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.report.files import environment
from qpert.runtime.report.html import to_html
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.query_sets import QuerySets

READINGS: tuple[tuple[Method, Choices], ...] = (
    ("none", Choices()),
    ("q-pert", Choices()),
    *(("or-q-pert", Choices(several_boxes=name)) for name in get_args(SeveralBoxes)),
    *(
        ("oes", Choices(pooling=pooling, similarity=similarity))
        for pooling, similarity in product(get_args(Pooling), get_args(Similarity))
    ),
)
"""The two similarities of a pooling are neighbours: they share their vectors."""


class Split:
    """One split of a data set, encoded once for all readings."""

    def __init__(self, encoder: Encoder, data: EvaluationData, work: Path, progress: Progress) -> None:
        self.encoder, self.data, self.progress = encoder, data, progress
        self.work = open_work(work, Binding.of(encoder, data, "cpu"))

    def compare(self, methods: tuple[Method, ...], choices: Choices, rerank: int) -> Comparison:
        return compare(self.encoder, self.data, methods, choices, rerank=rerank, work=self.work, progress=self.progress)

    def readings(self) -> list[dict[str, Any]]:
        """R@1 of every reading by ITC alone, in percent."""
        found = []
        stored = opened_images(
            self.encoder, without_boxes(self.data), self.work, self.progress, Watch(), name=STOCK_GALLERY
        )
        with stored as base, opened_journal(self.work) as journal:
            watch, texts = Watch(), self.encoder.tokenize(self.data.dataset.captions)
            embeds = encode_all_texts(self.encoder, texts, journal, self.progress, watch)
            images: MethodImages | None = None
            for method, choices in READINGS:
                if choices.similarity == "mean" and images is not None and images.objects is not None:
                    images = replace(images, objects=averaged(images.objects))
                else:
                    reader = MethodReader(self.encoder, self.data, base, choices, journal, self.progress, watch)
                    images = reader.images(method)
                objects = images.object_scores(embeds)
                scores = images.itc_scores(embeds) + (0 if objects is None else objects)
                found.append({"method": method, "choices": choices.of(method), **self.recall_at_1(scores)})
        return found

    def recall_at_1(self, scores: np.ndarray) -> dict[str, dict[str, float]]:
        owners = self.data.dataset.image_of_caption
        ranks = {"t2i": text_to_image_ranks(scores, owners), "i2t": image_to_text_ranks(scores, owners)}
        return {way: {"r1": round(100 * float(np.mean(found == 0)), 3)} for way, found in ranks.items()}


def averaged(objects: QuerySets) -> QuerySets:
    """What similarity `mean` makes of the vectors of `max`."""
    return QuerySets(objects.vectors.mean(axis=1, keepdims=True), objects.counts)


def recalls(found: dict[str, Any]) -> dict[str, Any]:
    """Of `eval --json`: R@K and mR@K in percent, with the small bin's R@K."""
    ways = {
        way: {name: rounded(value) for name, value in found[way].items() if name.lstrip("m")[0] == "r"}
        for way in ("t2i", "i2t")
    }
    small = {way: {name: rounded(value) for name, value in found["small"][way].items()} for way in ("t2i", "i2t")}
    return {**ways, "small": small}


def rounded(value: Any) -> Any:
    """Numbers of a document to three digits."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def chosen(readings: list[dict[str, Any]], method: str, *, crops: bool = False) -> Choices:
    """The reading that finds most on the validation scenes; of equal ones the first."""
    rows = [
        number
        for number, row in enumerate(readings)
        if row["method"] == method and (row["choices"].get("oes-pooling") == "crop") == crops
    ]
    return READINGS[max(rows, key=lambda n: readings[n]["t2i"]["r1"] + readings[n]["i2t"]["r1"])][1]


def compared(document: dict[str, Any]) -> dict[str, Any]:
    """Of `eval --json` of several methods: every method's recalls, and the differences of any two with intervals."""
    methods = {one["method"]["name"]: one for one in document["methods"]}
    return {
        "choices": {name: one["method"]["choices"] for name, one in methods.items()},
        "rerank": document["rerank"],
        "pairs": {name: one["itm_pairs"] for name, one in methods.items()},
        "recall": {name: recalls(one) for name, one in methods.items()},
        "bins": {name: rounded(one["bins"]) for name, one in methods.items()},
        "differences": rounded(document["differences"]),
    }


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    bundle = Bundle.open(options.bundle)
    with closing(Encoder(bundle, "cpu", threads=options.threads)) as encoder:
        val, test = (
            Split(encoder, open_data(options.dataset, name, limit=options.limit), options.work / name, progress)
            for name in ("val", "test")
        )
        splits = {"val": val, "test": test}
        facts = environment(bundle, "cpu")
        report: dict[str, Any] = {
            "environment": facts,
            "machine": machine(),
            "load": [round(value, 1) for value in os.getloadavg()],
            "images": {name: len(split.data.dataset) for name, split in splits.items()},
            "texts": {name: len(split.data.dataset.captions) for name, split in splits.items()},
            "boxes": {name: split.data.boxes_from for name, split in splits.items()},
            "perturbation": encoder.perturbation.to_dict(),
            "val": val.readings(),
        }
        several = chosen(report["val"], "or-q-pert").several_boxes
        tokens, crops = (
            replace(chosen(report["val"], "oes", crops=crop), several_boxes=several) for crop in (False, True)
        )
        four: tuple[Method, ...] = ("none", "q-pert", "or-q-pert", "oes")
        found = test.compare(four, tokens, 0)
        report["itc"] = {"tokens": compared(found.to_dict())}
        write(options, report, page_of(found, facts))
        report["itc"]["crops"] = compared(test.compare(("none", "q-pert", "oes"), crops, 0).to_dict())
        write(options, report)
        report["test"] = test.readings()
        write(options, report)
        if options.rerank:
            found = test.compare(four, tokens, options.rerank)
            report["reranked"] = {"tokens": compared(found.to_dict())}
            write(options, report, page_of(found, facts))
    return report


def evaluated(document: dict[str, Any]) -> dict[str, Any]:
    """The report of a comparison that `qpert eval --json` made, with the default readings."""
    stage = "reranked" if document["rerank"] else "itc"
    return {
        "environment": document["environment"],
        "machine": machine(),
        "images": {"test": document["images"]},
        "texts": {"test": document["texts"]},
        "bootstrap": document["bootstrap"],
        "perturbation": next(one for one in document["methods"] if one["method"]["name"] == "q-pert")["perturbation"],
        stage: {"default": compared(document)},
    }


def page_of(found: Comparison, facts: dict[str, str]) -> str:
    return to_html(comparison_report(found.described(facts, None)))


def write(options: argparse.Namespace, report: dict[str, Any], page: str | None = None) -> None:
    """The report under the data set's name, where those of other data sets stay; and the comparison page."""
    if options.html is not None and page is not None:
        options.html.write_text(page)
    if options.out is None:
        return
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(json.dumps({**before, options.dataset: report}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--evaluated", type=Path, help="run nothing: take this document of `qpert eval --json`")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--rerank", type=int, default=0, help="top k for ITM; 0: ITC alone")
    parser.add_argument("--limit", type=int, help="use only the first N images of each split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="features and scores; the same call resumes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--html", type=Path, help="write the comparison page here")
    options = parser.parse_args()
    if options.evaluated is not None:
        write(options, evaluated(json.loads(options.evaluated.read_text())))
        return
    if options.work is None:
        parser.error("--work is needed where something is run")
    options.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measure(options, Terminal()), indent=1))


if __name__ == "__main__":
    main()
