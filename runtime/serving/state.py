"""What one running application holds, from before the bundle is loaded to after the last answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from qpert.runtime.serving.metrics import Metrics
from qpert.runtime.serving.service import Service
from qpert.runtime.serving.settings import Settings


@dataclass(eq=False)
class State:
    """`service` is None until the bundle is loaded and warm; `failure` is why it never will be."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    service: Service | None = None
    failure: BaseException | None = None
    is_stopping: bool = False

    @property
    def trouble(self) -> str | None:
        """Why requests would not be answered now, or None."""
        if self.is_stopping:
            return "stopping"
        if self.failure is not None:
            return f"the bundle could not be loaded: {self.failure}"
        if self.service is None:
            return "loading the bundle"
        return self.service.scheduler.trouble
