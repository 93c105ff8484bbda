"""The paper's baselines beside its perturbation, on the 1,000 test scenes of a demonstration.

    python benchmarks/methods.py BUNDLE --dataset demo-small-objects --work /tmp/methods \
        --out benchmarks/results/demonstration_methods.json

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

from full_size import machine

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.inputs import EvaluationData, open_data
from qpert.runtime.evaluation.methods.choices import Choices, Method, Pooling, SeveralBoxes, Similarity
from qpert.runtime.evaluation.methods.compare import compare
from qpert.runtime.evaluation.methods.comparison import Comparison
from qpert.runtime.evaluation.result import Evaluation
from qpert.runtime.evaluation.work import Binding, open_work
from qpert.runtime.progress import Progress, Terminal
from qpert.runtime.report.files import environment
from qpert.runtime.retrieval.encoder import Encoder

READINGS: tuple[tuple[Method, Choices], ...] = (
    ("none", Choices()),
    ("q-pert", Choices()),
    *(("or-q-pert", Choices(several_boxes=name)) for name in get_args(SeveralBoxes)),
    *(
        ("oes", Choices(pooling=pooling, similarity=similarity))
        for pooling, similarity in product(get_args(Pooling), get_args(Similarity))
    ),
)


class Split:
    """One split of a data set, encoded once for all readings."""

    def __init__(self, encoder: Encoder, data: EvaluationData, work: Path, progress: Progress) -> None:
        self.encoder, self.data, self.progress = encoder, data, progress
        self.work = open_work(work, Binding.of(encoder, data, "cpu"))

    def compare(self, methods: tuple[Method, ...], choices: Choices, rerank: int) -> Comparison:
        return compare(self.encoder, self.data, methods, choices, rerank=rerank, work=self.work, progress=self.progress)

    def readings(self) -> list[dict[str, Any]]:
        """Every reading by ITC alone."""
        return [self.reading(method, choices) for method, choices in READINGS]

    def reading(self, method: Method, choices: Choices) -> dict[str, Any]:
        (one,) = self.compare((method,), choices, 0).evaluations
        return {"method": method, "choices": choices.of(method), **recalls(one)}


def recalls(one: Evaluation) -> dict[str, Any]:
    """R@K and mR@K in percent, with the small bin's R@K."""
    found = one.metrics.to_dict()
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


def compared(found: Comparison) -> dict[str, Any]:
    """Every method's recalls, and the differences of any two with their intervals."""
    document = found.to_dict()
    return {
        "choices": {one.method: one.choices.of(one.method) for one in found.evaluations},
        "rerank": found.evaluations[0].rerank,
        "pairs": {one.method: one.itm_pairs for one in found.evaluations},
        "recall": {one.method: recalls(one) for one in found.evaluations},
        "bins": {one.method: rounded(one.metrics.to_dict()["bins"]) for one in found.evaluations},
        "differences": rounded(document["differences"]),
    }


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    bundle = Bundle.open(options.bundle)
    report: dict[str, Any] = {}
    with closing(Encoder(bundle, "cpu", threads=options.threads)) as encoder:
        splits = {
            name: Split(encoder, open_data(options.dataset, name, limit=options.limit), options.work / name, progress)
            for name in ("val", "test")
        }
        test = splits["test"]
        report = {
            "environment": environment(bundle, "cpu"),
            "machine": machine(),
            "load": [round(value, 1) for value in os.getloadavg()],
            "images": {name: len(split.data.dataset) for name, split in splits.items()},
            "texts": {name: len(split.data.dataset.captions) for name, split in splits.items()},
            "boxes": {name: split.data.boxes_from for name, split in splits.items()},
            "perturbation": encoder.perturbation.to_dict(),
            "val": splits["val"].readings(),
            "test": test.readings(),
        }
        write(options, report)
        choices = chosen(report["val"], "or-q-pert")
        tokens, crops = (chosen(report["val"], "oes", crops=way) for way in (False, True))
        four: tuple[Method, ...] = ("none", "q-pert", "or-q-pert", "oes")
        for name, oes in (("tokens", tokens), ("crops", crops)):
            both = replace(oes, several_boxes=choices.several_boxes)
            report.setdefault("itc", {})[name] = compared(test.compare(four, both, 0))
            write(options, report)
        if options.rerank:
            both = replace(tokens, several_boxes=choices.several_boxes)
            report["reranked"] = {"tokens": compared(test.compare(four, both, options.rerank))}
            write(options, report)
    return report


def write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Under the data set's name; those of other data sets stay."""
    if options.out is None:
        return
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(json.dumps({**before, options.dataset: report}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--rerank", type=int, default=0, help="top k for ITM; 0: ITC alone")
    parser.add_argument("--limit", type=int, help="use only the first N images of each split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True, help="features and scores; the same call resumes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measure(options, Terminal()), indent=1))


if __name__ == "__main__":
    main()
