"""The files of the built-in demonstration checkpoints. Each is described by a card beside it.

Two small BLIP-2 of one architecture and vocabulary, trained on the generated scenes of `qpert.runtime.scenes`: enough
to export, verify and search on a laptop. They have seen nothing but those scenes. `demo` was trained on captions that
name small objects as often as large ones, `demo-small-objects` on captions that speak of what is large, as people's do:
it overlooks small objects unless boxes point at them.
"""

from __future__ import annotations

from pathlib import Path

VOCABULARY = Path(__file__).with_name("vocab.txt")
MODEL = Path(__file__).with_name("model.safetensors")
SMALL_OBJECTS_MODEL = Path(__file__).with_name("model_small_objects.safetensors")


def model_file(name: str) -> Path:
    """The weights of a built-in checkpoint. Raises KeyError for another name than those of `NAMES`."""
    return {"demo": MODEL, "demo-small-objects": SMALL_OBJECTS_MODEL}[name]


NAMES = ("demo", "demo-small-objects")
CALIBRATED = {
    "demo": Path(__file__).with_name("calibrated.json"),
    "demo-small-objects": Path(__file__).with_name("calibrated_small_objects.json"),
}
"""How boxes act on each, as `qpert calibrate` found on the validation scenes."""
