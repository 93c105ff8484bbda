"""Query embeddings of one image under many settings, with the parts of the bundle's own graph.

The projectors of an image's boxes are computed once for each threshold. A query map is affine in the weights of the
boxes, M(w) = M(0) + Σ_b w_b (M(e_b) − M(0)) (paper, equation 3), so the maps of all settings are one matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.calibration.perturbation.grid import Setting
from qpert.calibration.perturbation.split_graph import GraphPart, SplitGraph, split_query_head
from qpert.graphs.perturbation.names import THRESHOLD
from qpert.runtime.bundle.roles import BOX_WEIGHTS, IMAGE_TOKENS, IMAGE_VECTORS, OBJECT_MASKS, QUERY_HEAD
from qpert.runtime.errors import BundleError
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.perturbation import Perturbation, box_weights, object_masks
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.query_sets import QuerySets, image_sets
from qpert.runtime.sessions.graph_files import start_graph
from qpert.runtime.sessions.providers import find_provider
from qpert.runtime.verification import TOLERANCES

Floats = npt.NDArray[np.float32]
Arrays = dict[str, np.ndarray]

KEYS_AT_ONCE = 1 << 27
"""Bytes of keys repeated for the boxes of one call: 10 boxes of the full-size model, all boxes of a small one."""
CHECKED = (
    Setting(0.0, "sum", "constant", 8.0),
    Setting(0.0, "mean", "1-S", 2.0),
    Setting(0.0, "sum", "S-0.5", 10.0),
)
"""Settings to compare the parts with the whole graph, at the bundle's own threshold."""


SETS_AT_ONCE = 64
"""Query sets in one call of the last part: attention of the full-size model then takes 66 MB a layer."""


def set_weights(boxes: Boxes, settings: Perturbation) -> Floats:
    """float32 [sets, O]: the box weights of each query set of an image under these settings."""
    (together,) = box_weights([boxes], settings)
    sets = image_sets(len(boxes), settings)
    if not settings.splits_boxes or not len(boxes):
        return np.asarray(together[None])
    alone = np.arange(len(boxes)) == sets[:, None]  # a stock set, NO_BOX, has no weight
    return np.asarray(np.where(alone, together, np.float32(0)), np.float32)


class SplitEncoder:
    """The query head of a bundle, split into parts, each run as the bundle's graphs are. A context manager."""

    def __init__(self, encoder: Encoder, folder: Path, provider: str, *, threads: int = 0) -> None:
        self.encoder = encoder
        head = encoder.manifest.query_head
        self.graph_file = encoder.bundle.graph_path(head)
        self.split: SplitGraph = split_query_head(self.graph_file, head, folder)
        self._image, self._vectors = head.input(IMAGE_TOKENS).name, head.output(IMAGE_VECTORS).name
        self._mask_name, self._weight_name = head.input(OBJECT_MASKS).name, head.input(BOX_WEIGHTS).name
        self._origin: Arrays | None = None  # the maps without boxes, which no image changes
        parts = (self.split.keys, self.split.maps, self.split.queries)
        self._sessions: dict[Path, Any] = {
            part.file: start_graph(part.file, find_provider(provider), threads) for part in parts
        }

    def close(self) -> None:
        self._sessions.clear()

    def of_image(self, image_embeds: npt.NDArray[np.floating]) -> Arrays:
        """image_embeds [1, N, C] → keys, values and everything else that the other parts need from the image."""
        return self._run(self.split.keys, {self._image: image_embeds})

    def query_sets(self, image: Mapping[str, np.ndarray], boxes: Boxes, settings: Sequence[Setting]) -> QuerySets:
        """The query sets of one image, from `of_image`, under S settings of one threshold: S entries, in order."""
        (threshold,) = {setting.threshold for setting in settings}
        each = [set_weights(boxes, setting.perturbation(self.encoder.perturbation)) for setting in settings]
        weights = np.concatenate(each)  # [R, O]
        rows = [weight.tobytes() for weight in weights]  # with one box, sum and mean are the same
        first = {row: rows.index(row) for row in dict.fromkeys(rows)}
        maps = self._maps(image, boxes, weights[list(first.values())], threshold)
        found = []
        for start in range(0, len(first), SETS_AT_ONCE):
            part = {name: values[start : start + SETS_AT_ONCE] for name, values in maps.items()}
            count = min(SETS_AT_ONCE, len(first) - start)
            found.append(self._run(self.split.queries, {**image, **part, **self._sizes(count)})[self._vectors])
        order = {row: place for place, row in enumerate(first)}
        vectors = np.asarray(np.concatenate(found), np.float32)[[order[row] for row in rows]]
        return QuerySets(vectors, np.array([len(one) for one in each], np.int64))

    def check(self, image_embeds: npt.NDArray[np.floating], boxes: Boxes) -> float:
        """The largest difference between the parts and the whole graph, on one image at the bundle's own threshold.

        Raises:
            BundleError: it is more than the rounding that `qpert verify` allows between a row and its neighbours.
        """
        exported = self.encoder.manifest.perturbation
        settings = [Setting(exported.threshold, each.reduction, each.weight, each.alpha) for each in CHECKED]
        got = self.query_sets(self.of_image(image_embeds), boxes, settings).vectors
        head, slots = self.encoder.graph(QUERY_HEAD), {IMAGE_TOKENS: image_embeds, OBJECT_MASKS: self._masks(boxes)}
        weights = [box_weights([boxes], setting.perturbation(exported)) for setting in settings]
        whole = [head.run({**slots, BOX_WEIGHTS: weight})[IMAGE_VECTORS][0] for weight in weights]
        distance = float(np.abs(got - np.stack(whole)).max())
        limit = TOLERANCES[self.encoder.manifest.precision].neighbour_abs
        if not distance <= limit:
            raise BundleError(
                f"the parts of {self.graph_file} give query embeddings that differ by {distance:.2g} from the whole "
                f"graph's, expected at most {limit:g}; please report this, the search cannot be trusted",
                code="split-graph-differs",
            )
        return distance

    def _maps(self, image: Mapping[str, np.ndarray], boxes: Boxes, weights: Floats, threshold: float) -> Arrays:
        """Query maps [S, …] for weights [S, O], by graph output."""
        masks = self._masks(boxes)[0][:, None]  # [O, 1, N]: each box as an image of its own
        if self._origin is None:
            self._origin = self._single(image, np.zeros((1, *masks.shape[1:]), np.float32), threshold, weight=0.0)
        size = sum(image[name].nbytes for name in self.split.maps.inputs if name in image)
        step = max(1, KEYS_AT_ONCE // size)
        chunks = [masks[start : start + step] for start in range(0, len(masks), step)]
        runs = [self._single(image, chunk, threshold, weight=1.0) for chunk in chunks]
        found = {}
        for name, origin in self._origin.items():
            each = np.concatenate([run[name] for run in runs]) - origin if runs else origin[:0]  # [O, …]
            found[name] = (origin + np.tensordot(weights, each, axes=1)).astype(origin.dtype)
        return found

    def _single(self, image: Mapping[str, np.ndarray], masks: Floats, threshold: float, *, weight: float) -> Arrays:
        """The maps of single boxes, all of one weight: masks [R, 1, N] → [R, …] by name."""
        needed = [name for name in self.split.maps.inputs if name in image]
        repeated = {name: np.repeat(image[name], len(masks), axis=0) for name in needed}
        given = {self._mask_name: masks, self._weight_name: np.full((len(masks), 1), weight, np.float32)}
        return self._run(self.split.maps, {**repeated, **given, THRESHOLD: np.array(threshold, np.float32)})

    def _masks(self, boxes: Boxes) -> Floats:
        manifest = self.encoder.manifest
        return object_masks([boxes], grid=manifest.token_grid, coverage=self.encoder.perturbation.coverage)

    def _sizes(self, count: int) -> Arrays:
        """Graph inputs whose size alone is read: `count` images, no boxes."""
        found = {}
        for tensor in self.encoder.manifest.query_head.inputs:
            shape = [{"B": count, "O": 0}.get(str(axis), axis) for axis in tensor.shape]
            found[tensor.name] = np.zeros([int(axis) for axis in shape], tensor.dtype)
        return found

    def _run(self, part: GraphPart, given: Mapping[str, np.ndarray]) -> Arrays:
        found = self._sessions[part.file].run(list(part.outputs), {name: given[name] for name in part.inputs})
        return dict(zip(part.outputs, found, strict=True))

    def __enter__(self) -> SplitEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
