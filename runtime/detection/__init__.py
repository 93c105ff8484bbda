"""Boxes from pictures: the `BoxSource` protocol, and `Detector`, which runs a detector bundle without PyTorch."""

from __future__ import annotations

from qpert.runtime.detection.detector import Detector
from qpert.runtime.detection.options import DetectionOptions
from qpert.runtime.detection.source import BoxSource

__all__ = ["BoxSource", "DetectionOptions", "Detector"]
