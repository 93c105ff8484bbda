"""Live references for `qpert verify` and `qpert bench`, by name. This module is the entry point `qpert.references`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from qpert.exporter.checkpoints.checkpoint import Checkpoint
from qpert.exporter.families import find_family
from qpert.exporter.families.base import Family
from qpert.exporter.perturbation import graph_perturbation
from qpert.exporter.references.baselines import open_baselines
from qpert.exporter.references.eager import TorchReference
from qpert.exporter.references.own_inputs import pixels_by, with_own_inputs
from qpert.exporter.references.protocol import MarginReference, Reference
from qpert.exporter.references.recording import InputMaker, make_cases
from qpert.exporter.references.reopening import reopened
from qpert.exporter.references.scorer import ReferenceScorer
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import PIXELS
from qpert.runtime.bundle.samples import Samples

__all__ = ["live_samples", "open_baselines", "open_scorer"]


@dataclass(frozen=True)
class UpstreamWithMargins:
    """A third-party reference for outputs. The PyTorch reference only supplies the boxes' cut margins."""

    upstream: Reference
    margins: TorchReference

    @property
    def name(self) -> str:
        return self.upstream.name

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        single = {
            name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in inputs.items()
        }
        return dict(self.upstream.run(graph, single))

    def cut_margins(self, image_tokens: np.ndarray, object_masks: np.ndarray) -> np.ndarray:
        return self.margins.cut_margins(image_tokens, object_masks)


def live_samples(manifest: Manifest, kind: str, checkpoint: str | None, samples: Samples, *, seed: int) -> Samples:
    """The recorded inputs and new ones, with the outputs of a live reference.

    Images have the reference's own pixels, read from a file: by the stock processor if there is one, else with the
    checkpoint's preprocessing. The manifest's preprocessing is not used.

    Args:
        manifest: the bundle's.
        kind: `torch`, or one of the family's upstream references (`hf`, `lavis`).
        checkpoint: the weights; None uses the source in the manifest.
        samples: the recorded ones; only their inputs are used.
        seed: for the new inputs.

    Raises:
        InputError: the checkpoint is not the one that was exported.
        UnavailableError: the reference's library is not installed, or cannot open the checkpoint's files.
    """
    family = find_family(manifest.family)
    with reopened(family, manifest, checkpoint) as opened, open_reference(kind, family, opened, manifest) as reference:
        recorded = [
            replace(case, name=f"recorded {case.name}", expected=reference.run(case.graph, case.inputs))
            for case in samples.cases
        ]
        grid = replace(manifest.token_grid, image=opened.preprocessing)
        maker = InputMaker(manifest.graphs, grid, manifest.tokenizer.vocab_size, seed)
        pixels = manifest.image_tower.input(PIXELS).name
        images = len(next(case.inputs[pixels] for case in samples.cases if pixels in case.inputs))
        cases = (*recorded, *make_cases(reference, maker, images=images))
        own = with_own_inputs(samples, reference, pixels_by(reference, opened), manifest)
        return replace(own, cases=cases)


@contextmanager
def open_scorer(manifest: Manifest, kind: str, checkpoint: str | None) -> Iterator[ReferenceScorer]:
    """A live reference that ranks, with its own preprocessing and masks and the bundle's perturbation settings.

    Arguments and errors as in `live_samples`.
    """
    family = find_family(manifest.family)
    with reopened(family, manifest, checkpoint) as opened, open_reference(kind, family, opened, manifest) as reference:
        grid = replace(manifest.token_grid, image=opened.preprocessing)
        yield ReferenceScorer(kind, reference, manifest, grid, pixels_by(reference, opened))


@contextmanager
def open_reference(kind: str, family: Family, checkpoint: Checkpoint, manifest: Manifest) -> Iterator[MarginReference]:
    """The reference of that name over the same checkpoint, with the bundle's perturbation settings."""
    settings = manifest.perturbation
    eager = TorchReference.open(family, checkpoint, manifest.graphs, graph_perturbation(settings))
    if kind == eager.name:
        yield eager
        return
    with family.upstream(kind, checkpoint, settings) as upstream:
        yield UpstreamWithMargins(upstream, eager)
