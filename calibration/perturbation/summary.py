"""A calibration in words and cells: what the terminal and the page both say."""

from __future__ import annotations

from qpert.calibration.perturbation.bootstrap import LEVEL
from qpert.calibration.perturbation.grid import Setting
from qpert.calibration.perturbation.result import DIRECTION_NAMES, SCORE_NAMES, Calibration
from qpert.calibration.perturbation.search import Trial
from qpert.runtime.evaluation.metrics import SMALL_BIN
from qpert.runtime.evaluation.tables import percent
from qpert.runtime.inputs.perturbation import WEIGHT_FUNCTIONS

HEAD = ("setting", "t2i mR@1", "R@1", "small", "i2t mR@1", "R@1", "small")
"""Of `ranking_rows`: words, then percentages."""


def score_name(found: Calibration) -> str:
    return f"{SCORE_NAMES[found.score]} {DIRECTION_NAMES[found.direction]}"


def stage(found: Calibration) -> str:
    """What was scored."""
    return f"ITC + ITM on the best {found.rerank}" if found.rerank else "ITC alone"


def headline(found: Calibration) -> str:
    """One line: is any setting better than none, and which."""
    if not found.beaten:
        return "No setting beats no perturbation: nothing is recommended"
    if found.none_within_noise:
        return f"Best: {found.best}. Its gain over no perturbation is within chance"
    return f"Best: {found.best}"


def verdict(found: Calibration) -> list[str]:
    """How good the best is, and how much of that may be chance."""
    best, none = found.value(found.result.trials[found.best]), found.value(found.result.none)
    low, high = found.spread.gain_interval
    count = len(found.result.trials)
    return [
        f"{score_name(found)}, {stage(found)}: {best:.2f} with {found.best}; {none:.2f} without perturbation "
        f"({found.gain:+.2f} points, {LEVEL} % of the bootstrap's draws give {low:+.2f} to {high:+.2f})",
        f"picked as the best of {count}: if no setting helped, the best of them would still gain as much in "
        f"{100 * found.spread.chance:.0f} % of draws (White's reality check)",
        f"{found.within_noise} of the other {count - 1} settings are within chance of the best; the standard error of "
        f"its score is {found.spread.standard_error:.2f} points",
    ]


def ranking_rows(found: Calibration, count: int) -> list[tuple[str, ...]]:
    """The best settings, the bundle's present one where it was tried, and no perturbation."""
    ranked, trials = found.ranked(), found.result.trials
    rows = [(setting.short, *cells(trials[setting])) for setting in ranked[:count]]
    present = present_setting(found)
    if present is not None:
        place = f"{ranked.index(present) + 1} of {len(ranked)}"
        rows.append((f"{present.short} (the bundle's: {place})", *cells(trials[present])))
    return [*rows, ("no perturbation", *cells(found.result.none))]


def cells(trial: Trial) -> tuple[str, ...]:
    """In the order of `HEAD`: mR@1, R@1 and small R@1 of both directions."""
    ways = (trial.metrics.t2i, trial.metrics.i2t)
    return tuple(
        percent(value) for way in ways for value in (way.mean_recall[1], way.recall[1], way.bins[SMALL_BIN].recall[1])
    )


def present_setting(found: Calibration) -> Setting | None:
    """The grid's setting that the bundle has already, if there is one."""
    now = found.exported
    for setting in found.result.trials:
        beta, gamma = WEIGHT_FUNCTIONS[setting.weight]
        same = (setting.alpha, beta, gamma, setting.threshold) == (now.alpha, now.beta, now.gamma, now.threshold)
        if same and setting.reduction == now.reduction:
            return setting
    return None


def reduction_lines(found: Calibration) -> list[str]:
    """Sum against mean, where both were searched: the best and the middle of each half of the grid."""
    lines: list[str] = []
    if len(found.grid.reductions) < 2:
        return lines
    for reduction in found.grid.reductions:
        trials = (trial for setting, trial in found.result.trials.items() if setting.reduction == reduction)
        values = sorted(map(found.value, trials))
        mean = sum(values) / len(values)
        lines.append(f"{reduction} over boxes: best {values[-1]:.2f}, mean {mean:.2f}, worst {values[0]:.2f}")
    return lines
