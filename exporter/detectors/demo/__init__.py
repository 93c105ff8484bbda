"""The files of the built-in detector, a folder that stock transformers opens. `README.md` describes it.

A small RT-DETRv2, trained on the generated scenes of `qpert.runtime.scenes`: enough to find the objects of the
demonstration's pictures. It has seen nothing but those scenes.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
