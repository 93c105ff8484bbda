"""Stock Hugging Face and stock LAVIS over the weights of an open checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.checkpoint import Checkpoint
from qpert.exporter.families.blip2.checkpoint import IMAGE_PROCESSOR
from qpert.exporter.families.blip2.reference_huggingface import HuggingFaceReference
from qpert.exporter.families.blip2.reference_lavis import LavisReference
from qpert.exporter.hub.stock_inputs import stock_pixels, stock_token_ids
from qpert.runtime.inputs.perturbation import Perturbation


def open_huggingface(checkpoint: Checkpoint, settings: Perturbation) -> HuggingFaceReference:
    """The stock model of the folder, or with a LAVIS checkpoint's weights; inputs by the folder's stock tools."""
    folder, prefix = checkpoint.folder, checkpoint.tensors.store.prefix
    if folder is not None:
        reference = HuggingFaceReference.open(folder, prefix=prefix, **choices(settings))
    else:
        reference = HuggingFaceReference.from_lavis(checkpoint.tensors, checkpoint.config, **choices(settings))
    reference.pixels = stock_pixels(folder, checkpoint.preprocessing.size, IMAGE_PROCESSOR)
    reference.token_ids = stock_token_ids(folder)
    return reference


def open_lavis(checkpoint: Checkpoint, settings: Perturbation) -> LavisReference:
    """From the checkpoint's own files."""
    first, *others = checkpoint.tensors.store.files or (Path(checkpoint.record.source),)
    vision = others[0] if others else None
    return LavisReference.open(first, config=checkpoint.config, vision_checkpoint=vision, **choices(settings))


def choices(settings: Perturbation) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("threshold", "preserve_norm", "centre_keys", "stages")}
