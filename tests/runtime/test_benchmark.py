"""The benchmark's arithmetic with a clock of our own, its baselines against the recorded outputs, and the command.

No test says how long anything may take.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import TINY
from torch.utils.flop_counter import FlopCounterMode

from qpert.exporter.families.blip2.graph_specs import graph_specs
from qpert.exporter.families.declare import Limits
from qpert.exporter.references.baselines import eigh_query_map, open_baselines, without_empty_boxes
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.graphs.perturbation.oracle import query_map
from qpert.runtime.benchmark import run as run_module
from qpert.runtime.benchmark.cold import peak_memory_mb
from qpert.runtime.benchmark.report import rows_table
from qpert.runtime.benchmark.run import BenchRequest, benchmark
from qpert.runtime.benchmark.timing import Schedule, Timing, interleaved
from qpert.runtime.benchmark.workloads import Sizes
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import QUERY_HEAD, TEXT_TOWER
from qpert.runtime.cli import run
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.progress import Silent
from qpert.runtime.retrieval.encoder import Encoder


@dataclass
class FakeClock:
    """Time passes only where it is told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


@dataclass
class TimedSession:
    """A session that takes so many seconds of a fake clock."""

    session: object
    clock: FakeClock
    seconds: float

    @property
    def spec(self):
        return self.session.spec

    def run(self, inputs):
        self.clock.now += self.seconds
        return self.session.run(inputs)

    def close(self) -> None:
        return


@dataclass
class FakeBaseline:
    """The bundle's own sessions, `seconds` slow, with `wrong` added to what they give."""

    sessions: dict
    clock: FakeClock
    seconds: float = 3.0
    wrong: float = 0.0
    broken: bool = False
    name: str = "other"
    perturbs: bool = True

    def run(self, graph, inputs):
        if self.broken:
            raise UnavailableError("it lacks a compiler")
        self.clock.now += self.seconds
        return {name: array + np.float32(self.wrong) for name, array in self.sessions[graph].run(inputs).items()}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def encoder(tiny_bundle: Path) -> Iterator[Encoder]:
    encoder = Encoder(Bundle.open(tiny_bundle), "cpu", threads=1)
    yield encoder
    encoder.close()


@pytest.fixture
def bench(encoder: Encoder, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs a benchmark in which each graph takes one second and the machine does 1e6 operations a second."""
    monkeypatch.setattr(run_module, "measure_peaks", lambda: {"product_gflops": 1e-3, "copy_gb_per_second": 1.0})
    monkeypatch.setattr(run_module, "measure_cold_start", lambda *_, **__: {"process_seconds": 1.0})
    plain = dict(encoder.sessions)
    encoder.sessions = {name: TimedSession(session, clock, 1.0) for name, session in plain.items()}

    def run_it(stages=("text",), batches=(2,), boxes=(0,), baselines=(), repeats=3):
        request = BenchRequest(
            Sizes(stages, batches, boxes), schedule=Schedule(repeats, warmup=1, seconds=1e9, settle=0)
        )
        made = [FakeBaseline(plain, clock, **each) for each in baselines]
        return benchmark(encoder, request, made, Silent(), clock=clock)

    return run_it


def test_calls_are_measured_in_turns_that_begin_with_another_each_round(clock):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    interleaved(calls, Schedule(repeats=3, warmup=1, settle=0), clock)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_each_turn_begins_with_calls_that_do_not_count(clock):
    """Threads of the other library stop spinning, and this one's wake up."""
    order = []
    seconds = {"a": 1, "b": 5}
    calls = {name: lambda name=name: (order.append(name), clock.work(seconds[name])()) for name in "ab"}
    timings = interleaved(calls, Schedule(repeats=2, warmup=0, settle=3), clock)
    assert "".join(order) == "aaa" + "a" + "b" + "b" + "b" + "b" + "aaa" + "a"
    assert timings["a"].seconds == (1, 1)
    assert timings["b"].seconds == (5, 5)


def test_every_measured_call_counts_and_no_warm_up(clock):
    seconds = iter([100, 1, 2, 4])
    timing = interleaved(
        {"a": lambda: clock.work(next(seconds))()}, Schedule(repeats=3, warmup=1, settle=0), clock, clock
    )["a"]
    assert timing == Timing((1, 2, 4), (1, 2, 4))


def test_a_row_ends_early_when_its_time_is_up_but_not_before_the_least(clock):
    timings = interleaved({"a": clock.work(10)}, Schedule(repeats=50, warmup=0, seconds=15, least=3, settle=0), clock)
    assert len(timings["a"].seconds) == 3
    timings = interleaved({"a": clock.work(10)}, Schedule(repeats=50, warmup=0, seconds=65, least=3, settle=0), clock)
    assert len(timings["a"].seconds) == 7  # the seventh begins after 60 seconds


def test_median_and_95th_percentile_are_those_worked_by_hand():
    timing = Timing(tuple(i / 1000 for i in range(1, 22)), (0.0,))
    assert timing.median_ms == pytest.approx(11)
    assert timing.p95_ms == pytest.approx(20)  # 19 of the 20 gaps between 21 values lie below


def test_ratios_rates_and_shares_follow_from_the_medians(bench, encoder):
    result = bench(baselines=[{"seconds": 3.0}, {"name": "slower", "seconds": 10.0}])
    first, second = result.rows
    assert (first.stage, first.batch, first.boxes, first.provider, first.precision) == ("text", 2, 0, "cpu", "fp32")
    assert first.median_ms == first.p95_ms == 1000
    assert first.per_second == 2
    assert (first.baseline, first.baseline_median_ms, first.ratio) == ("other", 3000, 3)
    assert (second.baseline, second.baseline_median_ms, second.ratio) == ("slower", 10000, 10)
    length = encoder.limit(TEXT_TOWER, "L")
    assert first.share_of_peak == pytest.approx(
        encoder.manifest.graphs["text"].count_flops({"T": 2, "L": length}) / 1e6
    )
    assert first.baseline_max_abs == 0


def test_without_baselines_there_is_one_row_and_no_ratio(bench):
    (row,) = bench().rows
    assert (row.baseline, row.ratio, row.cpu_ratio) == (None, None, None)


def test_every_stage_is_measured_at_every_size_and_boxes_only_where_they_are_taken(bench):
    stages = ("vision", "image_query", "text", "itm", "encode", "search")
    result = bench(stages, batches=(1, 2), boxes=(0, 3))
    found = [(row.stage, row.batch, row.boxes) for row in result.rows]
    boxed = [(stage, batch, boxes) for stage in ("image_query", "encode") for batch in (1, 2) for boxes in (0, 3)]
    plain = [(stage, batch, 0) for stage in ("vision", "text", "itm") for batch in (1, 2)]
    assert sorted(found) == sorted([*boxed, *plain, ("search", 1, 0)])


def test_end_to_end_a_baseline_runs_in_place_of_the_sessions(bench):
    (row,) = bench(("encode",), baselines=[{"seconds": 5.0}]).rows
    assert row.median_ms == 2000  # vision and image_query
    assert row.ratio == 5


def test_a_baseline_that_computes_something_else_is_refused(bench):
    with pytest.raises(InputError, match="text_embeds") as caught:
        bench(baselines=[{"wrong": 0.01}])
    assert caught.value.code == "baseline-differs"


def test_a_baseline_that_gives_nan_is_refused(bench):
    with pytest.raises(InputError, match="text_embeds") as caught:
        bench(baselines=[{"wrong": float("nan")}])
    assert caught.value.code == "baseline-differs"


def test_a_baseline_that_does_not_work_here_is_left_out_with_the_reason(bench):
    result = bench(baselines=[{"broken": True}])
    assert [row.baseline for row in result.rows] == [None]
    assert result.notes == ("other is left out: it lacks a compiler",)


def test_a_baseline_without_boxes_is_compared_without_boxes_only(bench):
    result = bench(("image_query",), boxes=(0, 2), baselines=[{"perturbs": False}])
    assert [(row.boxes, row.baseline) for row in result.rows] == [(0, "other"), (2, None)]
    assert result.notes == ("other with boxes: it has no query perturbation",)


def test_sizes_beyond_the_bundle_are_left_out_with_the_reason(bench):
    result = bench(("text",), batches=(2, 7))
    assert [row.batch for row in result.rows] == [2]
    assert result.notes == ("text with batch 7: this bundle takes up to 6",)
    with pytest.raises(InputError) as caught:
        bench(("text",), batches=(7,))
    assert caught.value.code == "bench-nothing-left"


def test_the_machine_is_described_without_names_of_host_or_user(bench):
    machine = bench().machine
    assert set(machine) == {
        *("cpu", "gpu", "cores", "memory_gb", "system", "python", "versions", "blas", "load", "when", "peak")
    }
    assert machine["cores"] >= 1
    assert "onnxruntime" in machine["versions"]


def test_the_kernels_that_numpy_multiplies_with_are_named():
    """By OpenBLAS itself, in a process whose environment chooses them."""
    pytest.importorskip("threadpoolctl")
    if platform.machine() not in ("x86_64", "AMD64") or "openblas" not in str(np.show_config("dicts")):
        pytest.skip("needs NumPy with OpenBLAS on an x86-64 processor")
    code = "from qpert.runtime.benchmark.machine import blas_kernels; print(blas_kernels())"
    environment = os.environ | {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert "openblas" in found.stdout
    assert "Nehalem, 1 threads" in found.stdout


@pytest.mark.parametrize("name", ["torch", "torch-sdpa"])  # compiling takes a minute; bench compares before it times
def test_a_baseline_computes_what_the_reference_recorded(name, tiny_bundle, tiny_weights):
    """1e-5: both are float32 over the same numbers (measured: 1e-6). The recorded boxes are decided clearly."""
    bundle = Bundle.open(tiny_bundle)
    samples = bundle.samples()
    with open_baselines([name], bundle.manifest, str(tiny_weights)) as (baseline,):
        assert baseline.name == name
        for case in samples.cases:
            for tensor, array in baseline.run(case.graph, case.inputs).items():
                np.testing.assert_allclose(array, case.expected[tensor], atol=1e-5, rtol=1e-5)


def test_the_float32_query_map_of_the_baselines_is_that_of_the_float64_oracle():
    rng = torch.Generator().manual_seed(0)
    keys, masks = torch.randn(2, 2, 3, 30, 16, generator=rng), torch.rand(2, 4, 30, generator=rng)
    masks[0, 1] = 0  # covers nothing
    weights = torch.randn(2, 4, generator=rng)
    expected = query_map(keys, masks, weights, threshold=0.9)
    # 1e-4: an eigenvector's error in float32 is about 1e-7 over the relative gap, which is above 1e-3 here.
    torch.testing.assert_close(eigh_query_map(keys, masks, weights, threshold=0.9), expected, atol=1e-4, rtol=0)


def test_the_sdpa_variant_really_runs_pytorchs_kernel(tiny_bundle, tiny_weights, monkeypatch):
    bundle, calls = Bundle.open(tiny_bundle), []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    ids = np.ones((1, 4), np.int64)
    with open_baselines(["torch", "torch-sdpa"], bundle.manifest, str(tiny_weights)) as (eager, fused):
        eager.run("text", {"input_ids": ids, "attention_mask": ids})
        assert not calls
        fused.run("text", {"input_ids": ids, "attention_mask": ids})
    assert len(calls) == TINY.qformer.layers


def test_no_boxes_are_the_stock_network_to_a_baseline(encoder):
    spec = encoder.manifest.graph(QUERY_HEAD)
    inputs = {"image_embeds": np.ones(1), "object_masks": np.ones((1, 0, 5)), "box_weights": np.ones((1, 0))}
    assert set(without_empty_boxes(spec, inputs)) == {"image_embeds"}
    inputs |= {"object_masks": np.ones((1, 1, 5)), "box_weights": np.ones((1, 1))}
    assert set(without_empty_boxes(spec, inputs)) == set(inputs)


@pytest.mark.parametrize("name", [*CONFIGS, "tiny"])
def test_useful_work_is_what_pytorch_counts(name):
    """`FlopCounterMode` on tensors without content, for one image or text: exactly equal."""
    config = TINY if name == "tiny" else CONFIGS[name]
    if config.vision.layers > 4:  # every layer costs the same; three are enough, and quick
        config = replace(config, vision=replace(config.vision, layers=3))
    graphs = graph_specs(config, precision="fp32", stages="none", limits=Limits(length=12))
    side = config.vision.image_size

    def counted(method: str, *inputs: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            getattr(model, method)(*inputs)
        return counter.get_total_flops()

    with torch.device("meta"), torch.no_grad():
        model = Blip2Retrieval(config).eval()
        features = torch.zeros(1, config.vision.tokens, config.vision.width)
        ids, pairs = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 3, 9, dtype=torch.int64)
        assert counted("encode_image", torch.zeros(1, 3, side, side)) == graphs["vision"].count_flops({"B": 1})
        assert counted("encode_queries", features) == graphs["image_query"].count_flops({"B": 1})
        assert counted("encode_text", ids, ids) == graphs["text"].count_flops({"T": 1, "L": 9})
        assert counted("match", features, pairs, pairs) == graphs["itm"].count_flops({"I": 1, "T": 3, "L": 9})


def test_the_command_prints_one_document_and_keeps_it_in_the_bundle(tiny_bundle, tiny_weights, copy_of, capsys):
    folder = copy_of(tiny_bundle)
    arguments = ["bench", str(folder), "--baseline", "torch", "--checkpoint", str(tiny_weights), "--repeats", "3"]
    sizes = ["--stage", "image_query,search", "--batch", "1", "--boxes", "0,2", "--threads", "1"]
    assert run([*arguments, *sizes, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "reports" / "bench.json").read_text())
    assert [(row["stage"], row["boxes"]) for row in printed["rows"]] == [
        ("image_query", 0),
        ("image_query", 2),
        ("search", 0),
    ]
    assert all(row["baseline"] == "torch" and row["ratio"] > 0 for row in printed["rows"])
    cold = printed["cold_start"]
    # An interpreter with NumPy alone holds more than 20 MB; this process, with PyTorch, which started it, far more.
    assert 20 < cold["peak_memory_mb"] < peak_memory_mb() / 2
    assert cold["process_seconds"] > cold["open_seconds"] + cold["first_search_seconds"] > 0
    assert run(["inspect", str(folder), "--json"]) == 0  # the report's hash is in the manifest


def test_a_verdict_that_verify_writes_while_the_benchmark_runs_stays(tiny_bundle, copy_of, monkeypatch, capsys):
    import qpert.runtime.cli.bench as command

    folder = copy_of(tiny_bundle)

    def slow(*arguments):
        assert run(["verify", str(folder), "--json"]) == 0
        return benchmark(*arguments)

    monkeypatch.setattr(command, "benchmark", slow)
    arguments = ["bench", str(folder), "--stage", "text", "--batch", "1", "--repeats", "3", "--threads", "1"]
    assert run(arguments) == 0
    manifest = Bundle.open(folder).manifest
    assert manifest.verification["verdict"] == "pass"
    assert {"reports/bench.json", "reports/verify.json", "reports/verify.html"} <= manifest.files.keys()


def test_the_table_has_a_line_for_each_call_and_a_column_for_each_baseline(bench):
    result = bench(("text", "itm"), baselines=[{"seconds": 3.0}, {"name": "slower", "seconds": 10.0}])
    rows = rows_table(result).rows
    assert ("text", "2", "", "1000.00", "1000.00", "2.0") in [row[:6] for row in rows]
    assert [row[-2:] for row in rows if row[0] in ("text", "itm")] == [("3.00", "10.00")] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stage", "speech"], "expected one or more of vision"),
        (["--batch", "one"], "whole numbers"),
        (["--batch", "0"], "1 or more"),
        (["--baseline", "jax"], "expected one or more of torch"),
        (["--checkpoint", "other.pth", "--baseline", "torch"], "other.pth"),
    ],
)
def test_what_cannot_be_measured_is_bad_input(arguments, words, tiny_bundle, capsys):
    assert run(["bench", str(tiny_bundle), *arguments]) == 2
    assert words in capsys.readouterr().err
