"""References: other implementations of a bundle's graphs. Another package runs the live ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qpert.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from qpert.runtime.bundle.manifest import Manifest
    from qpert.runtime.bundle.samples import Samples
    from qpert.runtime.verification.live import LiveReference

ENTRY_POINTS = "qpert.references"
"""The entry-point group in which the package that runs live references registers them (`qpert.exporter`)."""


class Reference(Protocol):
    """Another implementation of the exported graphs."""

    @property
    def name(self) -> str: ...

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of the named graph, with the exported graph's names and shapes, float32."""
        ...


class Baseline(Reference, Protocol):
    """A reference to compare a bundle's speed with. `run` raises UnavailableError if it does not work here."""

    @property
    def perturbs(self) -> bool:
        """Whether it can be measured with boxes."""
        ...


class LiveReferences(Protocol):
    """What the commands need from the package that runs references."""

    def live_samples(
        self, manifest: Manifest, kind: str, checkpoint: str | None, samples: Samples, *, seed: int
    ) -> Samples:
        """The recorded inputs and fresh ones, with all results of a live reference from the picture on."""
        ...

    def open_scorer(
        self, manifest: Manifest, kind: str, checkpoint: str | None
    ) -> AbstractContextManager[LiveReference]:
        """A live reference that ranks pictures and captions."""
        ...

    def open_baselines(
        self, names: Sequence[str], manifest: Manifest, checkpoint: str | None, *, provider: str, threads: int
    ) -> AbstractContextManager[tuple[Baseline, ...]]:
        """The baselines of a benchmark, ready to run."""
        ...


def live_references(purpose: str) -> LiveReferences:
    """The installed live references.

    Raises:
        UnavailableError: the libraries that they need are missing.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            found: LiveReferences = entry.load()
        except ImportError as error:
            raise UnavailableError(
                f"{purpose} needs {error.name or error}, not installed here; pip install 'qpert[export]'",
                code="export-extra-missing",
            ) from error
        return found
    raise UnavailableError(
        f"{purpose} needs a package that registers {ENTRY_POINTS}, and none is installed; pip install 'qpert[export]'",
        code="export-extra-missing",
    )
