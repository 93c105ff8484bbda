"""The files of the built-in demonstration checkpoint. `MODEL_CARD.md` describes it.

A small BLIP-2, trained on the generated scenes of `qpert.runtime.scenes`: enough to export, verify and search on a
laptop. It has seen nothing but those scenes.
"""

from __future__ import annotations

from pathlib import Path

VOCABULARY = Path(__file__).with_name("vocab.txt")
MODEL = Path(__file__).with_name("model.safetensors")
