"""The built-in demonstration checkpoint.

It is BLIP-2's architecture in small, trained on the generated scenes of `qpert.runtime.scenes` (see `MODEL_CARD.md`):
enough to see the whole path run, verify and retrieve on a laptop. It knows nothing but those scenes.
"""

from __future__ import annotations

from pathlib import Path

from qpert.exporter.checkpoints.files import open_tensors
from qpert.exporter.checkpoints.open import Checkpoint, at_image_size
from qpert.exporter.checkpoints.parameters import LazyTensors
from qpert.exporter.families.blip2.names import Origin
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.files import sha256_of

VOCABULARY = Path(__file__).with_name("vocab.txt")
MODEL = Path(__file__).with_name("model.safetensors")


def open_demo(image_size: int | None = None) -> Checkpoint:
    """The demonstration checkpoint, at its own 112 px or another multiple of 14."""
    config = CONFIGS["demo"]
    size = config.vision.image_size if image_size is None else image_size
    store = open_tensors(MODEL)
    origins = {name: Origin(name) for name in store.entries}
    record = CheckpointRecord("demo", "demo", "demo", sha256_of(MODEL), "Apache-2.0")
    note = "the demonstration model was trained on generated scenes and knows nothing else (see its MODEL_CARD.md)"
    return Checkpoint(
        at_image_size(config, size), record, LazyTensors(store, origins, config, size), VOCABULARY, (note,)
    )
