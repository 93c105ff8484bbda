"""The built-in demonstration checkpoint: its files, and the card that says what it is.

It is BLIP-2's architecture in small, trained on the generated scenes of `qpert.runtime.scenes` (see `MODEL_CARD.md`):
enough to see the whole path run, verify and retrieve on a laptop. It knows nothing but those scenes.
"""

from __future__ import annotations

from pathlib import Path

VOCABULARY = Path(__file__).with_name("vocab.txt")
MODEL = Path(__file__).with_name("model.safetensors")
