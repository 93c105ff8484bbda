"""The report of a search: the verdict, a heat map of every setting, the ranking; `reports/calibrate.{json,html}`."""

from __future__ import annotations

from qpert.calibration.perturbation.grid import Setting
from qpert.calibration.perturbation.result import SCORE_NAMES, Calibration
from qpert.calibration.perturbation.search import Trial
from qpert.runtime.evaluation.bootstrap import LEVEL
from qpert.runtime.evaluation.metrics import DIRECTIONS, SMALL_BIN
from qpert.runtime.evaluation.report import percent, stage
from qpert.runtime.report import model as m

BEST_ROWS = 10
REDUCTIONS = {
    "sum": "Summed over boxes",
    "mean": "Averaged over boxes",
    "each": "A query set for each box",
    "each+stock": "A query set for each box, and the stock set",
}


def calibration_report(found: Calibration) -> m.Report:
    """The whole report."""
    data, none = found.dataset(), found.value(found.result.none)
    counts = f"{data['images']:,} images, {data['texts']:,} texts, {len(found.result.trials)} settings"
    legend = (
        f"In percent. Green is above no perturbation ({none:.2f}), red below; the deepest colour is the largest "
        "difference. Dotted: within chance of the best, which is framed."
    )
    maps = tuple(reduction_maps(found, reduction) for reduction in found.grid.reductions)
    name = f"{score_name(found)}, {stage(found.rerank)}"
    blocks: tuple[m.Block, ...] = (
        *m.paragraphs(f"{data['root']}, split {data['split']}: {counts}; {data['boxes']}", tone="quiet"),
        m.Paragraph(headline(found), tone_of(found)),
        m.Bullets((*verdict(found), *reduction_lines(found))),
        m.Section(name, (m.Paragraph(legend, "quiet"), *maps), details=True),
        m.Section(f"The best {BEST_ROWS}", (ranking_table(found),)),
        m.Section("Run", (m.pairs(run_facts(found)),), details=True),
    )
    return m.Report("qpert calibrate", "Perturbation search", blocks)


def score_name(found: Calibration) -> str:
    way = "mean of both directions" if found.direction == "both" else DIRECTIONS[found.direction]
    return f"{SCORE_NAMES[found.score]} {way}"


def tone_of(found: Calibration) -> m.Tone:
    return "bad" if not found.improves else "unsure" if found.none_within_noise else "good"


def headline(found: Calibration) -> str:
    """One line: which setting is better than no perturbation, if any."""
    if not found.improves:
        return "No setting beats no perturbation: nothing is recommended"
    if found.none_within_noise:
        return f"Best: {found.best}. Its gain over no perturbation is within chance"
    return f"Best: {found.best}"


def verdict(found: Calibration) -> list[str]:
    """How good the best setting is, and how much of that may be chance."""
    best, none = found.value(found.result.trials[found.best]), found.value(found.result.none)
    low, high = found.uncertainty.gain_interval
    count = len(found.result.trials)
    return [
        f"{score_name(found)}, {stage(found.rerank)}: {best:.2f} with {found.best}; {none:.2f} without perturbation "
        f"({found.gain:+.2f} points, {LEVEL} % of the bootstrap's draws give {low:+.2f} to {high:+.2f})",
        f"picked as the best of {count}: if no setting helped, the best of them would still gain as much in "
        f"{100 * found.uncertainty.p_value:.0f} % of draws (White's reality check)",
        f"{found.within_noise} of the other {count - 1} settings are within chance of the best; the standard error of "
        f"its score is {found.uncertainty.standard_error:.2f} points",
    ]


def reduction_lines(found: Calibration) -> list[str]:
    """The reductions side by side, if several were searched: the best, mean and worst of each part of the grid."""
    if len(found.grid.reductions) < 2:
        return []
    lines = []
    for reduction in found.grid.reductions:
        values = [found.value(one) for setting, one in found.result.trials.items() if setting.reduction == reduction]
        mean = sum(values) / len(values)
        lines.append(f"{reduction} over boxes: best {max(values):.2f}, mean {mean:.2f}, worst {min(values):.2f}")
    return lines


# Heat maps


def reduction_maps(found: Calibration, reduction: str) -> m.Section:
    maps = tuple(threshold_map(found, reduction, threshold) for threshold in found.grid.thresholds)
    return m.Section(REDUCTIONS[reduction], (m.Grid(maps, 26),))


def threshold_map(found: Calibration, reduction: str, threshold: float) -> m.HeatMap:
    """α across, weight functions down."""
    rows = tuple(
        (weight, tuple(heat(found, s) for s in found.result.trials if (s.reduction, s.threshold, s.weight) == place))
        for weight in found.grid.weights
        for place in [(reduction, threshold, weight)]
    )
    return m.HeatMap(f"τ {threshold:g}", "α", tuple(f"{alpha:g}" for alpha in found.grid.alphas), rows)


def heat(found: Calibration, setting: Setting) -> m.Heat:
    largest = max(abs(gain(found, one)) for one in found.result.trials) or 1.0
    points = gain(found, setting)
    return m.Heat(
        f"{found.value(found.result.trials[setting]):.2f}",
        points / largest,
        f"{setting}: {points:+.2f} points",
        best=setting == found.best,
        unsure=found.is_within_noise(setting),
    )


def gain(found: Calibration, setting: Setting) -> float:
    return found.value(found.result.trials[setting]) - found.value(found.result.none)


# Ranking


def ranking_table(found: Calibration) -> m.Table:
    """The best settings, the bundle's current one if it was tried, and no perturbation."""
    ranked, trials = found.ranked(), found.result.trials
    rows = [(setting.short, *cells(trials[setting])) for setting in ranked[:BEST_ROWS]]
    present = present_setting(found)
    if present is not None:
        place = f"{ranked.index(present) + 1} of {len(ranked)}"
        rows.append((f"{present.short} (the bundle's: {place})", *cells(trials[present])))
    rows.append(("no perturbation", *cells(found.result.none)))
    legend = (
        "mR@1: harmonic mean of R@1 over ten bins of the largest object's share of the image; small: R@1 of the first "
        "bin, below a tenth.",
    )
    return m.Table(("setting", "t2i mR@1", "R@1", "small", "i2t mR@1", "R@1", "small"), tuple(rows), legend=legend)


def cells(trial: Trial) -> tuple[str, ...]:
    """mR@1, R@1 and small R@1 of both directions."""
    ways = (trial.metrics.t2i, trial.metrics.i2t)
    return tuple(
        percent(value) for way in ways for value in (way.mean_recall[1], way.recall[1], way.bins[SMALL_BIN].recall[1])
    )


def present_setting(found: Calibration) -> Setting | None:
    """The bundle's current setting, if the grid includes it."""
    now = found.exported
    return next((setting for setting in found.result.trials if setting.perturbation(now) == now), None)


def run_facts(found: Calibration) -> dict[str, str]:
    """Data, the bundle's own settings, times and versions."""
    data = {f"data: {name}": str(value) for name, value in found.dataset().items()}
    kept = {f"bundle: {name}": str(value) for name, value in found.exported.to_dict().items()}
    seconds = {f"seconds: {stage}": f"{value:,.1f}" for stage, value in found.result.seconds.items()}
    pairs = {"ITM pairs": f"{found.result.itm_pairs:,}"} if found.rerank else {}
    return data | kept | pairs | seconds | found.environment
