"""The short run of `make soak`: some hundred hostile inputs, and threads that share a retriever."""

import pytest
from soak.running import concurrent_differences, memory_growth, soak
from soak.targets import Bench, Target

from qpert.runtime.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tiny_bundle, tmp_path_factory):
    found = Bench(tiny_bundle, tmp_path_factory.mktemp("soak"))
    yield found
    found.close()


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("image files", 150),
        ("image arrays", 60),
        ("box files", 150),
        ("captions", 60),
        ("annotations", 150),
        ("manifests", 100),
    ],
)
def test_hostile_inputs_are_refused_with_an_error_of_ours_or_give_finite_results(bench, kind, count):
    (target,) = (target for target in bench.targets() if target.name == kind)
    outcome = soak(target, count, first_seed=1)
    assert outcome.inputs >= count
    assert outcome.refused > 0, "nothing was hostile"
    assert outcome.accepted > 0, "nothing came through, so nothing behind the checks was tried"


def test_eight_threads_on_one_retriever_get_what_one_gets(bench):
    assert concurrent_differences(bench.retriever, threads=8, rounds=3) == 0


def test_a_crash_is_found_and_a_refusal_is_not_taken_for_one():
    from hypothesis import strategies as st

    def refuse(value):
        raise InputError("no")

    def crash(value):
        if value > 5:
            raise ZeroDivisionError

    assert soak(Target("refused", st.integers(0, 9), refuse), 20, 1).refused >= 10
    with pytest.raises(ZeroDivisionError):
        soak(Target("crash", st.integers(0, 9), crash), 50, 1)


def test_memory_growth_compares_the_end_with_the_warm_start():
    assert memory_growth([10, 50, 50, 50, 50]) == 0
    assert memory_growth([10, 50, 60, 70, 80]) == 30
    assert memory_growth([10]) == 0
