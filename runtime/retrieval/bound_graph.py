"""A graph addressed by what its tensors mean instead of by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.sessions.protocol import Array, Session, run_on_device


@dataclass(frozen=True)
class BoundGraph:
    """A session, and the slots of its tensors."""

    session: Session

    @property
    def spec(self) -> GraphSpec:
        return self.session.spec

    def run(self, slots: Mapping[str, Array]) -> dict[str, np.ndarray]:
        """Outputs by slot. A slot that the graph does not take is left out.

        Raises:
            InputError, LimitError: an array that the graph cannot take.
        """
        return self.spec.by_slot(self.session.run(self.spec.bind(slots)))

    def run_on_device(self, slots: Mapping[str, Array]) -> dict[str, Array]:
        """The same; outputs stay in GPU memory where the session runs on a GPU."""
        return self.spec.by_slot(run_on_device(self.session, self.spec.bind(slots)))
