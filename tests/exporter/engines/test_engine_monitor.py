"""Progress of a build, from phases as TensorRT reports them."""

from __future__ import annotations

import pytest

from qpert.exporter.engines.monitor import PhaseTree


def test_a_phase_inside_another_fills_one_step_of_it():
    tree = PhaseTree()
    tree.start("build", None, 4)
    assert tree.fraction() == 0
    tree.step("build", 0)
    assert tree.fraction() == 0.25
    tree.start("optimise", "build", 2)
    tree.step("optimise", 0)
    assert tree.fraction() == pytest.approx(0.25 + 0.25 * 0.5)
    tree.start("tactics", "optimise", 10)
    tree.step("tactics", 4)
    assert tree.fraction() == pytest.approx(0.25 + 0.25 * (0.5 + 0.5 * 0.5))


def test_progress_never_goes_back_where_a_phase_ends_early_or_comes_again():
    tree = PhaseTree()
    tree.start("build", None, 4)
    tree.start("optimise", "build", 2)
    tree.step("optimise", 1)
    before = tree.fraction()
    tree.finish("optimise")
    assert tree.fraction() == before == 0.25
    tree.start("optimise", "build", 2)
    assert tree.fraction() == before


def test_the_end_of_the_outermost_phase_is_all_of_it():
    tree = PhaseTree()
    tree.start("build", None, 6)
    tree.finish("build")
    assert tree.fraction() == 1


def test_phases_that_were_never_started_are_nothing_to_stumble_over():
    tree = PhaseTree()
    tree.step("unknown", 3)
    tree.finish("unknown")
    assert tree.fraction() == 0
