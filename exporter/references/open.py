"""Live references for `qpert verify`, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qpert.exporter.checkpoints.open import DEMO, NAMED, Checkpoint, open_checkpoint
from qpert.exporter.families.blip2.architecture import ArchitectureOptions
from qpert.exporter.families.blip2.reference_huggingface import HuggingFaceReference
from qpert.exporter.families.blip2.reference_lavis import LavisReference
from qpert.exporter.families.blip2.upstream import StockReference
from qpert.exporter.references.eager import TorchReference
from qpert.exporter.references.recording import InputMaker, Reference, make_cases
from qpert.exporter.references.scorer import ReferenceScorer
from qpert.graphs.families.blip2.config import Blip2Config
from qpert.graphs.families.blip2.model import GraphPerturbation
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.samples import Case, Samples
from qpert.runtime.errors import InputError
from qpert.runtime.inputs.perturbation import Perturbation

HUB_URL = "https://huggingface.co/"


@dataclass(frozen=True)
class WithMargins:
    """A stock reference for outputs; the PyTorch reference only says which boxes' cuts are decided."""

    stock: StockReference | LavisReference
    margins: TorchReference

    @property
    def name(self) -> str:
        return self.stock.name

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        single = {
            name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in inputs.items()
        }
        return dict(self.stock.run(graph, single))

    def cut_margins(self, image_embeds: np.ndarray, object_masks: np.ndarray) -> np.ndarray:
        return self.margins.cut_margins(image_embeds, object_masks)


def live_cases(manifest: Manifest, kind: str, checkpoint: str | None, samples: Samples, *, seed: int) -> list[Case]:
    """The recorded inputs and fresh ones, with what a live reference makes of them.

    Args:
        manifest: of the bundle.
        kind: `torch`, `hf` or `lavis`.
        checkpoint: the weights; None takes what the manifest says was exported.
        samples: the recorded ones; only their inputs are used.
        seed: of the fresh inputs.

    Raises:
        InputError: the checkpoint is not the one that was exported.
        UnavailableError: the reference's library is not installed here.
    """
    source, options = reopening(manifest, checkpoint)
    with open_checkpoint(source, image_size=manifest.preprocessing.size, options=options) as opened:
        check_same(opened, manifest)
        with open_reference(kind, opened, manifest) as reference:
            recorded = [
                replace(case, name=f"recorded {case.name}", expected=reference.run(case.graph, case.inputs))
                for case in samples.cases
            ]
            maker = InputMaker(opened.config, manifest.graphs, manifest.preprocessing, seed)
            images = len(samples.cases[0].inputs["pixel_values"])
            return recorded + make_cases(reference, maker, images=images)


@contextmanager
def open_scorer(manifest: Manifest, kind: str, checkpoint: str | None) -> Iterator[ReferenceScorer]:
    """A live reference that ranks: its own preprocessing, its own masks, the bundle's perturbation settings.

    Arguments and errors as in `live_cases`.
    """
    source, options = reopening(manifest, checkpoint)
    with open_checkpoint(source, image_size=manifest.preprocessing.size, options=options) as opened:
        check_same(opened, manifest)
        vision = opened.config.vision
        with open_reference(kind, opened, manifest) as reference:
            yield ReferenceScorer(kind, reference, manifest.perturbation, vision.grid, vision.image_size)


def reopening(manifest: Manifest, checkpoint: str | None) -> tuple[str, ArchitectureOptions]:
    """What `open_checkpoint` needs to find the exported weights again, and what their tensors do not tell."""
    architecture = Blip2Config.from_dict(manifest.architecture)
    recorded = manifest.checkpoint
    if checkpoint is None and recorded.name in (DEMO, *NAMED):
        return recorded.name, ArchitectureOptions()
    source, _, vision = (checkpoint or recorded.source.removeprefix(HUB_URL)).partition(" and ")
    options = ArchitectureOptions(
        vision_heads=architecture.vision.heads,
        qformer_heads=architecture.qformer.heads,
        vision_eps=architecture.vision.layer_norm_eps,
        ln_vision_eps=architecture.ln_vision_eps,
        qformer_eps=architecture.qformer.layer_norm_eps,
    )
    if vision:
        return source, replace(options, vision_checkpoint=Path(vision), vision_layers=architecture.vision.layers)
    return source, options


@contextmanager
def open_reference(kind: str, checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Reference]:
    """The reference of that name over the same checkpoint, with the bundle's perturbation settings."""
    settings = manifest.perturbation
    torch_reference = TorchReference.open(checkpoint, GraphPerturbation(settings.threshold, settings.preserve_norm))
    if kind == "torch":
        yield torch_reference
        return
    with open_stock(kind, checkpoint, settings) as stock:
        yield WithMargins(stock, torch_reference)


def open_stock(kind: str, checkpoint: Checkpoint, settings: Perturbation) -> StockReference | LavisReference:
    """Stock Hugging Face (`hf`) or stock LAVIS (`lavis`)."""
    first, *others = checkpoint.tensors.store.files or (Path(checkpoint.record.source),)
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("threshold", "preserve_norm", "stages")}
    if kind == "lavis":
        vision = others[0] if others else None
        return LavisReference.open(first, config=checkpoint.config, vision_checkpoint=vision, **options)
    if checkpoint.record.family == "huggingface":
        return HuggingFaceReference.open(first.parent, **options)
    return HuggingFaceReference.from_lavis(checkpoint.tensors, checkpoint.config, **options)


def check_same(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Raises InputError where the weights are not those that were exported."""
    found, exported = checkpoint.record.sha256, manifest.checkpoint.sha256
    if found != exported:
        raise InputError(
            f"the checkpoint {checkpoint.record.source} has SHA-256 {found}, the bundle was exported from "
            f"{manifest.checkpoint.source} with {exported}; pass --checkpoint with that one"
        )
