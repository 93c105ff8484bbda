"""References: other implementations of a bundle's graphs. Those that run live are another package's."""

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
    """A network that computes the exported graphs by other means."""

    @property
    def name(self) -> str: ...

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of the graph of that name, named and shaped as the exported graph's, float32."""
        ...


class Baseline(Reference, Protocol):
    """A reference that is measured beside a bundle. `run` raises UnavailableError where it does not work here."""

    @property
    def perturbs(self) -> bool:
        """Whether it can be measured with boxes."""
        ...


class LiveReferences(Protocol):
    """What the commands need of the package that runs references."""

    def live_samples(
        self, manifest: Manifest, kind: str, checkpoint: str | None, samples: Samples, *, seed: int
    ) -> Samples:
        """The recorded inputs and fresh ones, with what a live reference makes of them, from the picture on."""
        ...

    def open_scorer(
        self, manifest: Manifest, kind: str, checkpoint: str | None
    ) -> AbstractContextManager[LiveReference]:
        """A live reference that ranks pictures and captions."""
        ...

    def open_baselines(
        self, names: Sequence[str], manifest: Manifest, checkpoint: str | None, *, provider: str, threads: int
    ) -> AbstractContextManager[tuple[Baseline, ...]]:
        """What a benchmark compares with."""
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
