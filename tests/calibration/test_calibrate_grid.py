"""The grid: the paper's by default, and what it refuses."""

import math

import pytest

from qpert.calibration.perturbation.grid import Grid, alphas_around
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import Perturbation


def test_the_default_is_the_papers_grid_under_every_reduction():
    grid = Grid()
    assert (grid.alphas, grid.thresholds) == ((2, 4, 6, 8, 10), (0.85, 0.9, 0.95, 0.99))
    assert grid.weights == ("constant", "S", "S-0.5", "1-S", "0.5-S")
    assert len(grid) == len(set(grid.settings())) == 5 * 5 * 4 * 4


@pytest.mark.parametrize(
    ("own", "grid"), [(0.2, (0.2, 0.4, 0.6, 0.8, 1)), (1, (0.2, 0.4, 0.6, 0.8, 1)), (8, (2, 4, 6, 8, 10))]
)
def test_strengths_are_searched_on_the_papers_scale_for_the_bundle(own, grid):
    assert alphas_around(own) == grid


def test_a_setting_keeps_what_the_grid_does_not_search():
    exported = Perturbation(stages="itc", coverage="dilated", preserve_norm=True, semantics="release", centre_keys=True)
    (setting,) = Grid((4.0,), ("1-S",), (0.9,), ("mean",)).settings()
    assert setting.perturbation(exported) == Perturbation(
        "release", 4.0, 1.0, -1.0, 0.9, "dilated", "mean", "itc", preserve_norm=True, centre_keys=True
    )


def test_each_with_the_stock_set_is_reduction_each_that_keeps_it():
    (each, kept) = Grid((4.0,), ("S",), (0.9,), ("each", "each+stock")).settings()
    assert each.perturbation(Perturbation()) == Perturbation(
        alpha=4.0, beta=0.0, gamma=1.0, threshold=0.9, reduction="each"
    )
    assert kept.perturbation(Perturbation()) == Perturbation(
        alpha=4.0, beta=0.0, gamma=1.0, threshold=0.9, reduction="each", keep_stock=True
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alphas": (2.0, -1.0)}, "got α -1.0, expected numbers above 0"),
        ({"alphas": (0.0,)}, "got α 0.0"),
        ({"alphas": (math.nan,)}, "got α nan"),
        ({"alphas": (math.inf,)}, "got α inf"),
        ({"alphas": ()}, "alphas is empty"),
        ({"alphas": (2.0, 4.0, 2.0)}, "repeats a value"),
        ({"thresholds": (0.9, 1.0)}, "got threshold 1.0, expected contribution ratios between 0 and 1"),
        ({"thresholds": (0.0,)}, "got threshold 0.0"),
        ({"thresholds": (math.nan,)}, "got threshold nan"),
        ({"weights": ("S", "2-S")}, "weights has '2-S'; expected values from constant, S, S-0.5, 1-S, 0.5-S"),
        ({"reductions": ("median",)}, "reductions has 'median'; expected values from sum, mean, each, each+stock"),
    ],
)
def test_unusable_values_are_refused(values, message):
    with pytest.raises(InputError) as error:
        Grid(**values)
    assert message in str(error.value)
