"""From a bundle's settings to those that are fixed inside its graphs."""

from __future__ import annotations

from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.runtime.inputs.perturbation import Perturbation


def graph_perturbation(settings: Perturbation) -> GraphPerturbation | None:
    """What the network needs to know of `settings`; None where no stage is perturbed."""
    if settings.stages == "none":
        return None
    return GraphPerturbation(settings.threshold, settings.preserve_norm, settings.centre_keys)
