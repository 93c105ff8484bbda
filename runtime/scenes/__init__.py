"""The scenes of the built-in demonstration: generated pictures, their captions and their boxes, without torch.

A scene is plain data (`scene.py`), sampled from tables of objects (`objects.py`), painted with Pillow (`drawing.py`),
described by captions that can be checked against any scene (`captions.py`, `ceiling.py`), and written in the layout of
the real data sets (`writer.py`).
"""

from __future__ import annotations

from qpert.runtime.scenes.captions import Caption, Salience, describe, describe_large, describe_smallest
from qpert.runtime.scenes.ceiling import Ceiling, caption_ceiling
from qpert.runtime.scenes.drawing import draw_scene, object_map
from qpert.runtime.scenes.scene import Scene, SceneObject, sample_scene
from qpert.runtime.scenes.writer import SPLIT_SIZES, Layout, generate, write_dataset

__all__ = [
    "SPLIT_SIZES",
    "Caption",
    "Ceiling",
    "Layout",
    "Salience",
    "Scene",
    "SceneObject",
    "caption_ceiling",
    "describe",
    "describe_large",
    "describe_smallest",
    "draw_scene",
    "generate",
    "object_map",
    "sample_scene",
    "write_dataset",
]
