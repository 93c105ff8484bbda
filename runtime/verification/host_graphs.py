"""The bundle's own preprocessing and boxes graphs, compared with the recorded pictures and boxes.

What was recorded comes from PIL and PyTorch, or from definitions cell by cell: not from what generated the graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import (
    BOX_CORNERS,
    BOX_WEIGHTS,
    BOXES,
    IMAGE_SIZE,
    OBJECT_MASKS,
    PICTURE,
    PIXELS,
    PREPROCESS,
)
from qpert.runtime.bundle.samples import BoxSample, Samples
from qpert.runtime.errors import QpertWarning, UnavailableError
from qpert.runtime.retrieval.bound_graph import BoundGraph
from qpert.runtime.sessions.open import open_host_graph
from qpert.runtime.sessions.protocol import Session
from qpert.runtime.verification.result import Gate

PixelsOf = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
Distance = Callable[[PixelsOf, np.ndarray, np.ndarray], float]

LIMIT = 1e-5
"""As for the runtime's own: float32 rounding of (x/255 − mean)/std, of shares, and of weights up to 10."""


def host_graph_gates(bundle: Bundle, samples: Samples, distance: Distance) -> Iterator[Gate]:
    """Gates of the host graphs that the bundle has; older bundles have none, and nothing is said of that.

    `distance`: max abs difference between the pixels that a function makes of a picture and the recorded ones. Where
    ONNX Runtime is not installed (a machine with engines alone), one `QpertWarning` says that they were not verified.
    """
    if not bundle.manifest.host_graphs:
        return
    try:
        yield from gates_in_onnxruntime(bundle, samples, distance)
    except UnavailableError as error:
        if error.code != "no-onnxruntime":
            raise
        names = " and ".join(bundle.manifest.host_graphs)
        warnings.warn(f"not verified: {names}, which need ONNX Runtime ({error})", QpertWarning, stacklevel=2)


def gates_in_onnxruntime(bundle: Bundle, samples: Samples, distance: Distance) -> Iterator[Gate]:
    with opened(bundle, PREPROCESS) as session:
        if session is not None:
            graph = BoundGraph(session)
            made = [
                distance(lambda image: graph.run({PICTURE: image})[PIXELS][0], picture, pixels)
                for picture, pixels in samples.pictures
            ]
            yield Gate("preprocess graph: max abs difference", float(np.max(made)), LIMIT)
    with opened(bundle, BOXES) as session:
        if session is not None:
            found = [box_distances(BoundGraph(session), sample) for sample in samples.boxes]
            masks, weights = np.max(found, axis=0)
            yield Gate("boxes graph: masks, max abs difference", float(masks), LIMIT)
            yield Gate("boxes graph: weights, max abs difference", float(weights), LIMIT)


@contextmanager
def opened(bundle: Bundle, role: str) -> Iterator[Session | None]:
    session = open_host_graph(bundle, role)
    try:
        yield session
    finally:
        if session is not None:
            session.close()


def box_distances(graph: BoundGraph, sample: BoxSample) -> tuple[float, float]:
    """Max abs difference of masks and of weights. A row of padding is added, which must cover and weigh nothing."""
    corners = np.pad(sample.xyxy, [(0, 1), (0, 0)]).astype(np.float32)[None]
    outputs = graph.run({BOX_CORNERS: corners, IMAGE_SIZE: sample.size.astype(np.float32)[None]})
    return tuple(  # type: ignore[return-value]
        float(np.abs(outputs[slot][0] - np.pad(wanted, [(0, 1)] + [(0, 0)] * (wanted.ndim - 1))).max())
        for slot, wanted in ((OBJECT_MASKS, sample.masks), (BOX_WEIGHTS, sample.weights))
    )
