"""Stock queries that attend to some of an image's tokens: the query head of a bundle, cut at its keys and values.

A query head takes all N tokens of an image. Keys and values are a function of one token each, so those of a selection
are rows of the keys and values of all; and what follows in the graph sums over however many there are. With
`split_query_head` every operator comes from the bundle, and the result over all N tokens is compared with that of the
whole graph before the first selection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.calibration.perturbation.split_graph import GraphPart, split_query_head
from qpert.graphs.perturbation.names import THRESHOLD
from qpert.runtime.bundle.roles import BOX_WEIGHTS, IMAGE_TOKENS, IMAGE_VECTORS, OBJECT_MASKS, QUERY_HEAD
from qpert.runtime.errors import BundleError
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.onnx import start_onnxruntime
from qpert.runtime.sessions.providers import find_provider
from qpert.runtime.verification import TOLERANCES

Floats = npt.NDArray[np.float32]
Arrays = dict[str, np.ndarray]


class SelectedTokens:
    """The query head of an opened encoder over any number of tokens, in ONNX Runtime."""

    def __init__(self, encoder: Encoder) -> None:
        """Raises BundleError where the graph cannot be cut at its keys."""
        self.encoder = encoder
        head, provider = encoder.manifest.query_head, find_provider(encoder.provider)
        self._tokens, self._vectors = head.input(IMAGE_TOKENS).name, head.output(IMAGE_VECTORS).name
        self._masks, self._weights = head.input(OBJECT_MASKS).name, head.input(BOX_WEIGHTS).name
        with tempfile.TemporaryDirectory(prefix="qpert-") as folder:
            self.split = split_query_head(encoder.bundle.graph_path(head), head, Path(folder))
            parts = (self.split.keys, self.split.maps, self.split.queries)
            self._sessions: dict[Path, Any] = {
                part.file: start_onnxruntime(part.file, provider, encoder.threads) for part in parts
            }
        self._axes: dict[str, int] | None = None  # of tokens, in each tensor that the queries read
        self._map: Arrays = {}

    def query_vectors(self, image_tokens: npt.NDArray[np.floating], places: Sequence[npt.NDArray[np.int64]]) -> Floats:
        """image_tokens [1, N, C] and R selections of them (int64, at least one place each) → float32 [R, Q, E], unit
        length. Without boxes: the queries are the stock ones.

        Raises:
            BundleError: on the first call, where the parts over all tokens differ from the whole graph.
        """
        image = self._run(self.split.keys, {self._tokens: image_tokens})
        if self._axes is None:
            self._axes, self._map = self._token_axes(image_tokens, image), self._stock_map(image)
            self._check(image_tokens, image)
        return np.concatenate([self._of(image, chosen) for chosen in places])

    def _of(self, image: Arrays, chosen: npt.NDArray[np.int64]) -> Floats:
        """[1, Q, E]."""
        axes = self._axes or {}
        rows = {name: np.take(image[name], chosen, axis=axis) for name, axis in axes.items()}
        others = {name: image[name] for name in self.split.queries.inputs if name in image and name not in axes}
        return self._run(self.split.queries, {**others, **rows, **self._map, **self._no_boxes()})[self._vectors]

    def _token_axes(self, image_tokens: npt.NDArray[np.floating], image: Arrays) -> dict[str, int]:
        """The axis along which a tensor changes where one token alone does."""
        changed = image_tokens.copy()
        place = image_tokens.shape[1] - 1
        changed[:, place] = image_tokens[:, 0] + 1
        other = self._run(self.split.keys, {self._tokens: changed})
        found = {}
        for name in self.split.queries.inputs:
            if name not in image or np.array_equal(image[name], other[name]):
                continue
            differs = np.argwhere(image[name] != other[name])  # [changes, axes]
            axes = [
                axis
                for axis, length in enumerate(image[name].shape)
                if length == image_tokens.shape[1] and set(differs[:, axis].tolist()) == {place}
            ]
            if len(axes) != 1:
                raise self._differs(f"{name} {list(image[name].shape)} is no list of tokens")
            found[name] = axes[0]
        return found

    def _stock_map(self, image: Arrays) -> Arrays:
        """The query maps without boxes, which no image changes."""
        given = {name: image[name] for name in self.split.maps.inputs if name in image}
        threshold = np.array(self.encoder.manifest.perturbation.threshold, np.float32)
        return self._run(self.split.maps, {**given, **self._no_boxes(), THRESHOLD: threshold})

    def _no_boxes(self) -> Arrays:
        tokens = self.encoder.manifest.token_grid.tokens
        return {self._masks: np.zeros((1, 0, tokens), np.float32), self._weights: np.zeros((1, 0), np.float32)}

    def _check(self, image_tokens: npt.NDArray[np.floating], image: Arrays) -> None:
        slots = {IMAGE_TOKENS: image_tokens, OBJECT_MASKS: self._no_boxes()[self._masks]}
        slots[BOX_WEIGHTS] = self._no_boxes()[self._weights]
        whole = self.encoder.graph(QUERY_HEAD).run(slots)[IMAGE_VECTORS]
        distance = float(np.abs(self._of(image, np.arange(image_tokens.shape[1])) - whole).max())
        limit = TOLERANCES[self.encoder.manifest.precision].neighbour_abs
        if not distance <= limit:
            raise self._differs(f"over all tokens its parts differ by {distance:.2g} from the whole, limit {limit:g}")

    def _differs(self, why: str) -> BundleError:
        return BundleError(
            f"{self.encoder.manifest.query_head.file} cannot be given a selection of tokens: {why}; use --oes-pooling "
            "mean or crop",
            code="split-graph-differs",
        )

    def _run(self, part: GraphPart, given: Arrays) -> Arrays:
        found = self._sessions[part.file].run(list(part.outputs), {name: given[name] for name in part.inputs})
        return dict(zip(part.outputs, found, strict=True))
