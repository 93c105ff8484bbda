"""The search: every setting of the grid on one split, with vision, texts and subspaces computed once.

for each threshold: for each image: keys and projectors once, then queries under all α, weights and reductions;
then for each setting: ITC, ranks and shortlists. At the end ITM of all pairs on any shortlist, once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpert.calibration.perturbation.grid import Grid, Setting
from qpert.calibration.perturbation.ranks import SettingRanks
from qpert.calibration.perturbation.score_cache import ScoreBlocks
from qpert.calibration.perturbation.split_encoder import SplitEncoder
from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.evaluate import check_data, opened_images
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.evaluation.journal import DiskJournal, key_of
from qpert.runtime.evaluation.metrics import RetrievalMetrics, metrics_of_ranks
from qpert.runtime.evaluation.running import ImageStore, Watch, check_itc, encode_all_texts, match_all
from qpert.runtime.evaluation.schedule import Schedule
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.progress import Advance, Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

JOURNAL_NAME = "calibration.sqlite"


@dataclass(frozen=True, eq=False)
class Trial:
    """What one setting gives. t2i_ranks int64 [T], i2t_ranks int64 [B], counted from 0, final ones if re-ranked."""

    metrics: RetrievalMetrics
    t2i_ranks: Indices = field(repr=False)
    i2t_ranks: Indices = field(repr=False)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """`trials` in the grid's order, and `none`: stock BLIP-2, without perturbation.

    itm_pairs: pairs on any setting's shortlists, each matched once. seconds: of this process, by stage. resumed:
    images, texts, settings and pairs computed by an earlier process.
    """

    none: Trial
    trials: dict[Setting, Trial]
    itm_pairs: int
    seconds: dict[str, float]
    resumed: dict[str, int]


def check_searchable(encoder: Encoder, data: EvaluationData, rerank: int) -> None:
    """Raise InputError if a search cannot give a result, or not the requested one."""
    stages = encoder.manifest.perturbation.stages
    if stages == "none":
        raise InputError(
            "this bundle was exported with --perturb none, so it has nothing to calibrate; export it again",
            code="bundle-without-boxes",
        )
    if stages == "both" and rerank:
        raise InputError(
            "this bundle perturbs ITM too, so its ITM scores change with every setting and cannot be shared; "
            "search by ITC with --rerank 0, or calibrate a bundle exported with --perturb itc",
            code="rerank-perturbed",
        )
    if rerank < 0:
        raise InputError(f"got rerank={rerank}, expected 0 (no re-ranking) or more", code="rerank-negative")
    if len(data.dataset) < 2:
        raise InputError(
            "the split has one image, which every text finds; give a split of a few hundred images",
            code="split-one-image",
        )
    if not any(len(boxes) for boxes in data.boxes):
        raise InputError(
            "no image of the split has a box, so all settings are the same; give boxes with --boxes",
            code="split-without-boxes",
        )


def search(
    encoder: Encoder,
    data: EvaluationData,
    grid: Grid,
    *,
    work: Path,
    rerank: int = 0,
    provider: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
) -> SearchResult:
    """Recall of every setting of `grid`, and without perturbation.

    Args:
        encoder: the opened bundle; only its settings outside the grid matter (coverage, norm).
        data: the split and its boxes.
        work: a folder bound to bundle and data (`open_work`); results in it are not computed again.
        rerank: length of the ITM shortlists, as in `evaluate`; 0 ranks by ITC alone.

    Raises:
        InputError: see `check_searchable`; or NaN among the scores. BundleError: the graph cannot be split.
        UnavailableError: the disk is full; the same call resumes.
    """
    progress, watch = progress or Silent(), Watch()
    began = time.perf_counter()
    check_searchable(encoder, data, rerank)
    texts = check_data(encoder, data)
    with ExitStack() as stack:
        journal = stack.enter_context(DiskJournal(work / JOURNAL_NAME))
        images = opened_images(encoder, without_boxes(data), work, progress, watch, features="stored")
        store = stack.enter_context(images)
        text_embeds = encode_all_texts(encoder, texts, journal, progress, watch)
        split = _Split(data, store, text_embeds, rerank)
        with measured(watch, "settings"):
            cut = stack.enter_context(SplitEncoder(encoder, work / "cut", provider, threads=threads))
            found = _rank_settings(split, grid, cut, journal, work, progress, watch)
        stock = split.ranks(store.itc_scores(text_embeds))
        with measured(watch, "pairs"):
            matched, itm = _match(encoder, split, texts, [stock, *found.values()], journal, progress, watch)
        with measured(watch, "ranks"):
            none = split.trial(stock, matched, itm)
            trials = {setting: split.trial(ranks, matched, itm) for setting, ranks in found.items()}
    watch.measure("total", began)
    return SearchResult(none, trials, len(matched), watch.seconds, watch.resumed)


def without_boxes(data: EvaluationData) -> EvaluationData:
    """The same split, to encode it without perturbation."""
    return replace(data, boxes=tuple(Boxes.empty(boxes.size) for boxes in data.boxes))


@contextmanager
def measured(watch: Watch, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    watch.measure(stage, began)


@dataclass(frozen=True, eq=False)
class _Split:
    """What all settings share."""

    data: EvaluationData
    store: ImageStore
    text_embeds: Floats
    rerank: int

    @property
    def owners(self) -> Indices:
        return self.data.dataset.image_of_caption

    def ranks(self, itc: Floats) -> SettingRanks:
        check_itc(itc)
        return SettingRanks.of(itc, self.owners, self.rerank)

    def trial(self, ranks: SettingRanks, matched: Schedule, itm: Floats) -> Trial:
        t2i, i2t = ranks.final(self.owners, matched, itm)
        metrics = metrics_of_ranks(t2i, i2t, image_of_text=self.owners, largest_areas=self.data.largest_areas)
        return Trial(metrics, t2i, i2t)


def _rank_settings(
    split: _Split,
    grid: Grid,
    cut: SplitEncoder,
    journal: DiskJournal,
    work: Path,
    progress: Progress,
    watch: Watch,
) -> dict[Setting, SettingRanks]:
    """Ranks and shortlists of all settings, from the journal or computed threshold by threshold."""
    images, texts = len(split.data.dataset), len(split.text_embeds)
    settings = grid.settings()
    found = {setting: _recorded(journal, setting, images, texts, split.rerank) for setting in settings}
    missing = [setting for setting, ranks in found.items() if ranks is None]
    watch.resumed["settings"] = len(settings) - len(missing)
    if watch.resumed["settings"]:
        progress.say(f"{watch.resumed['settings']} of {len(settings)} settings are already computed")
    if missing:
        _check_cut(split, cut)
    by_threshold = {one: [each for each in missing if each.threshold == one] for one in grid.thresholds}
    total = sum(images + len(part) for part in by_threshold.values() if part)
    with progress.stage(f"{len(missing)} settings × {images:,} images", total) as advance:
        for threshold, part in by_threshold.items():
            if part:
                for setting, ranks in _of_threshold(split, part, cut, work / f"scores-{threshold!r}", advance):
                    journal.put(_kind(setting, split.rerank), 0, KEY, ranks.pack())
                    journal.commit()
                    found[setting] = ranks
    return {setting: ranks for setting, ranks in found.items() if ranks is not None}


def _of_threshold(
    split: _Split, settings: list[Setting], cut: SplitEncoder, folder: Path, advance: Advance
) -> Iterator[tuple[Setting, SettingRanks]]:
    """Each setting's ranks; `settings` share their threshold."""
    texts = split.text_embeds
    blocks = ScoreBlocks(folder, settings, images=len(split.data.dataset), texts=len(texts))

    def scores(row: int) -> Floats:
        image = cut.of_image(split.store.features_of([row]).image_embeds)
        return cut.query_sets(image, split.data.boxes[row], blocks.settings).itc_scores(texts)

    blocks.fill(scores, advance)
    for setting in settings:
        yield setting, split.ranks(blocks.of(setting))
        advance(1)
    blocks.delete()


def _check_cut(split: _Split, cut: SplitEncoder) -> None:
    """Check the split graph on the first image with the most boxes."""
    counts = [len(boxes) for boxes in split.data.boxes]
    row = int(np.argmax(counts))
    cut.check(split.store.features_of([row]).image_embeds, split.data.boxes[row])


def _match(
    encoder: Encoder,
    split: _Split,
    texts: TokenizedTexts,
    ranks: list[SettingRanks],
    journal: DiskJournal,
    progress: Progress,
    watch: Watch,
) -> tuple[Schedule, Floats]:
    """ITM of every pair on any setting's shortlists."""
    keys = np.unique(np.concatenate([each.keys() for each in ranks]))
    no_lists = np.zeros((0, 0), np.int64)
    matched = Schedule(len(split.data.dataset), len(texts), no_lists, no_lists, keys)
    return matched, match_all(encoder, split.store, texts, matched, journal, progress, watch)


KEY = key_of(np.zeros(0))
"""Constant: the work folder is bound to bundle and data, and a record's kind names its setting."""


def _kind(setting: Setting, rerank: int) -> str:
    return f"{setting!r} rerank {rerank}"


def _recorded(journal: DiskJournal, setting: Setting, images: int, texts: int, rerank: int) -> SettingRanks | None:
    values = journal.get(_kind(setting, rerank), 0, KEY)
    return None if values is None else SettingRanks.unpack(values, images, texts, rerank)
