"""The built-in demonstration checkpoints, opened."""

from __future__ import annotations

from dataclasses import replace

from qpert.exporter import demo
from qpert.exporter.checkpoints.checkpoint import Checkpoint
from qpert.exporter.checkpoints.files import open_tensors
from qpert.exporter.checkpoints.parameters import LazyTensors, Origin
from qpert.exporter.families.blip2.positions import at_image_size, positions_for
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.preprocessing import ImagePreprocessing


def open_demo(image_size: int | None = None, name: str = "demo") -> Checkpoint:
    """The demonstration checkpoint `name` of `demo.NAMES`, at its own 112 px or another multiple of 14."""
    config = replace(CONFIGS["demo"], name=name)
    size = config.vision.image_size if image_size is None else image_size
    file = demo.model_file(name)
    store = open_tensors(file)
    origins = {name: Origin(name) for name in store.entries}
    record = CheckpointRecord(name, name, "demo", sha256_of(file), "Apache-2.0")
    note = "the demonstration model was trained on generated scenes and knows nothing else (see its model card)"
    tensors = LazyTensors(store, origins, positions_for(config, size))
    return Checkpoint(at_image_size(config, size), record, tensors, demo.VOCABULARY, (note,), ImagePreprocessing(size))
