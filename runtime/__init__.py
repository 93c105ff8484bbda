"""Two-stage BLIP-2 retrieval without PyTorch.

    from qpert.runtime import Retriever
    with Retriever.open("bundle", provider="cpu") as retriever:
        features = retriever.encode_images(["street.jpg"], boxes=None)

The names below are loaded when they are first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpert.runtime.bundle.folder import Bundle
    from qpert.runtime.detection.detector import Detector
    from qpert.runtime.detection.source import BoxSource
    from qpert.runtime.errors import QpertError, QpertWarning
    from qpert.runtime.gallery.hits import Hit, TextHit
    from qpert.runtime.gallery.reader import StoredGallery
    from qpert.runtime.gallery.search import Gallery, TextGallery
    from qpert.runtime.inputs.boxes import Boxes
    from qpert.runtime.inputs.perturbation import Perturbation
    from qpert.runtime.retrieval.features import ImageFeatures
    from qpert.runtime.retriever import Retriever

_HOME = {
    "BoxSource": "detection.source",
    "Boxes": "inputs.boxes",
    "Bundle": "bundle.folder",
    "Detector": "detection.detector",
    "Gallery": "gallery.search",
    "Hit": "gallery.search",
    "ImageFeatures": "retrieval.encoder",
    "Perturbation": "inputs.perturbation",
    "QpertError": "errors",
    "QpertWarning": "errors",
    "Retriever": "retriever",
    "StoredGallery": "gallery.reader",
    "TextGallery": "gallery.search",
    "TextHit": "gallery.search",
}

__all__ = [
    "BoxSource",
    "Boxes",
    "Bundle",
    "Detector",
    "Gallery",
    "Hit",
    "ImageFeatures",
    "Perturbation",
    "QpertError",
    "QpertWarning",
    "Retriever",
    "StoredGallery",
    "TextGallery",
    "TextHit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
