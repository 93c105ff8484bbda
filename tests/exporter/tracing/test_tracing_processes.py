"""Tracing in two processes: the same graphs as in one, and nothing lost where the second ends early."""

import pytest
import torch
from tiny_model import TINY

from qpert.exporter.families.blip2.family import FAMILY
from qpert.exporter.families.blip2.graph_specs import graph_specs
from qpert.exporter.families.declare import Limits
from qpert.exporter.tracing import processes
from qpert.exporter.tracing.processes import TraceJob, helper, traced_stages
from qpert.graphs.perturbation.choices import GraphPerturbation

GRAPHS = graph_specs(TINY, precision="fp32", stages="both", limits=Limits(3, 4, 6, 12))
JOB = TraceJob("blip2", TINY, GraphPerturbation(), "fp32", {name: GRAPHS[name] for name in ("vision", "text")})


@pytest.fixture(scope="module")
def alone():
    """What one process traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        patch.setattr(processes, "helper", lambda job: pytest.fail("a helper was started for one thread"))
        return traced_stages(JOB, FAMILY, lambda count: None)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(processes, "usable_cores", lambda: 2)


def test_the_helper_traces_the_same_bytes(alone):
    with helper(JOB) as ask:
        assert [ask("text"), ask("vision")] == [alone["text"], alone["vision"]]


def test_two_processes_trace_every_graph_once(two_cores, alone):
    done = []
    assert traced_stages(JOB, FAMILY, done.append) == alone
    assert done == [1, 1]


@pytest.mark.parametrize(
    "faulty",
    [
        "raise SystemExit(3)",
        "print('this is no pickle', flush=True)",
        "import os, sys; sys.stdin.buffer.read(10); os.kill(os.getpid(), 9)",
    ],
    ids=["ends", "babbles", "is killed"],
)
def test_what_a_faulty_helper_does_not_bring_is_traced_here(two_cores, alone, monkeypatch, faulty):
    monkeypatch.setattr(processes, "HELPER", faulty)
    done = []
    assert traced_stages(JOB, FAMILY, done.append) == alone
    assert done == [1, 1]


def test_a_fault_in_a_graph_is_raised_here(two_cores, monkeypatch):
    def broken(stage, spec):
        raise ArithmeticError(spec.name)

    monkeypatch.setattr(processes, "trace_stage", broken)
    with pytest.raises(ArithmeticError):
        traced_stages(JOB, FAMILY, lambda count: None)
