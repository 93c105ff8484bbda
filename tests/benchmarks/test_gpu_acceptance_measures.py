"""The measuring programs on the CPU: figures that follow from others, and what they do where something fails."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gpu_acceptance.measure import checkpoint, evaluation, speed
from gpu_acceptance.measure import tests as gpu_tests
from gpu_acceptance.measure.device import Accelerator
from gpu_acceptance.measure.evaluation import DATA_SETS, DataSet, flops_of, seconds_of

from qpert.exporter.families.blip2.tokenizer import build_tokenizer
from qpert.exporter.references.baselines import open_baselines
from qpert.runtime.benchmark.timing import Schedule
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.retrieval.encoder import Encoder

ROOT = Path(__file__).parents[2]
QUICK = Schedule(repeats=3, warmup=1, seconds=0.1, settle=0.0)


@pytest.fixture(params=["fp32", "fp16"])
def sides(request, tiny_weights):
    """A tiny bundle in either precision with its SDPA baseline; features are float16 on both sides in the second."""
    folder = request.getfixturevalue({"fp32": "tiny_bundle", "fp16": "half_bundle"}[request.param])
    opened = Bundle.open(folder)
    with (
        closing(Encoder(opened, "cpu")) as encoder,
        open_baselines(["torch-sdpa"], opened.manifest, str(tiny_weights)) as baselines,
    ):
        yield encoder, baselines


@pytest.mark.parametrize(
    ("graph", "batch", "boxes"), [("vision", 2, 0), ("image_query", 2, 3), ("text", 3, 0), ("itm", 6, 0)]
)
def test_a_row_holds_both_sides_of_every_graph(sides, graph, batch, boxes):
    encoder, baselines = sides
    measured = speed.GraphSpeed(encoder, graph, Accelerator("cpu"), baselines, QUICK).measure(batch, boxes, 1e12)
    one = measured["baselines"]["torch-sdpa"]
    assert measured["left_out"] == {}
    assert one["ratio"] == pytest.approx(one["median_ms"] / measured["median_ms"])
    assert measured["per_second"] == pytest.approx(batch / measured["median_ms"] * 1e3)
    assert measured["share_of_peak"] > 0


def test_a_baseline_that_fails_is_left_out_and_one_that_computes_something_else_is_an_error(sides, monkeypatch):
    encoder, (baseline,) = sides
    row = speed.GraphSpeed(encoder, "text", Accelerator("cpu"), (baseline,), QUICK)
    prepare = type(baseline).prepare

    def fails(*arguments):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore")

    monkeypatch.setattr(type(baseline), "prepare", fails)
    measured = row.measure(2, 0, 1e12)
    assert measured["baselines"] == {}
    assert measured["left_out"] == {"torch-sdpa": "CUDA out of memory. Tried to allocate 3.00 GiB."}
    monkeypatch.setattr(type(baseline), "prepare", lambda self, *given: lambda: 2 * prepare(self, *given)())
    with pytest.raises(InputError) as error:
        row.measure(2, 0, 1e12)
    assert error.value.code == "baseline-differs"


def test_a_gpu_provider_needs_a_pytorch_that_sees_a_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError) as error:
        Accelerator("cuda")
    assert error.value.code == "torch-without-cuda"
    given = speed.without_gpu(lambda options: Accelerator("cuda"), None)
    assert "pip install torch" in given["skipped"]


def test_features_are_the_towers_own(sides):
    encoder, _ = sides
    tower = encoder.sessions["vision"]
    features = speed.features_of(encoder.manifest, lambda one: tower.run(one.inputs))
    spec = encoder.manifest.graphs["image_query"].input("image_tokens")
    assert features.dtype == np.dtype(spec.dtype)
    assert features.shape == (1, encoder.manifest.token_grid.tokens, spec.shape[-1])


def test_the_data_sets_are_of_the_published_size():
    """64 candidates of each text and of each image: (1,000 + 5,000) × 64 and (5,000 + 25,010) × 64."""
    assert DATA_SETS["Flickr30K"] == DataSet(1_000, 5_000, 384_000)
    assert DATA_SETS["COCO-5K"] == DataSet(5_000, 25_010, 1_920_640)


def test_seconds_are_extrapolated_from_each_rate():
    rates = {"images": 100.0, "texts": 1000.0, "pairs": 32_000.0}
    assert seconds_of(DATA_SETS["Flickr30K"], rates) == pytest.approx(10 + 5 + 12)


def test_flops_count_an_images_keys_and_values_once(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    one, two = (flops_of(DataSet(1, 0, pairs), manifest, 8) for pairs in (100, 200))
    per_pair = (two - one) / 100
    image = flops_of(DataSet(1, 0, 0), manifest, 8)
    assert one == pytest.approx(image + 100 * per_pair)
    assert image > manifest.image_tower.count_flops({"B": 1})
    assert flops_of(DataSet(7, 0, 700), manifest, 8) == pytest.approx(7 * one)


def test_rates_come_from_an_evaluation_that_resumes_nothing(tiny_bundle):
    data = evaluation.open_data(evaluation.DEMO, boxes=evaluation.NO_BOXES, limit=4)
    with closing(Encoder(Bundle.open(tiny_bundle), "cpu")) as encoder:
        found = [evaluation.evaluated(encoder, data) for _ in range(2)]
    assert [set(one.resumed.values()) for one in found] == [{0}, {0}]
    rates = evaluation.rates_of(found[1])
    assert rates["pairs"] == pytest.approx(found[1].itm_pairs / found[1].seconds["pairs"])


def test_the_random_checkpoints_vocabulary_has_a_word_for_each_row_and_knows_the_captions(tmp_path):
    """The rows are those of the stock checkpoint, from the fixture that LAVIS gave."""
    keys = json.loads((ROOT / "tests" / "fixtures" / "keys" / "lavis_coco.json").read_text())["files"]["checkpoint"]
    shape = keys["Qformer.bert.embeddings.word_embeddings.weight"]
    assert shape == f"F32 {checkpoint.STOCK_ROWS}x768"
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(checkpoint.vocabulary_of("full")) + "\n")
    tokenizer = build_tokenizer(file, vocab_size=checkpoint.STOCK_ROWS)
    found = tokenizer.encode("a small red box on a table").tokens
    assert "[UNK]" not in found
    assert len(set(found)) > 6


JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase name="a"/><testcase name="b"><failure message="assert 1 == 2&#10;more">x</failure></testcase>
<testcase name="c"><error message="no CUDA">x</error></testcase>
<testcase name="d"><skipped message="no GPU"/></testcase><testcase name="e"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_by_how_they_ended(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    found = gpu_tests.counted(path)
    assert found["passed"] == 1
    assert [text.partition(":")[0] for text in found["failed"]] == ["b", "c"]
    assert found["skips"] == {"no GPU": 2}
