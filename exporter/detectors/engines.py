"""What TensorRT can build of a detector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qpert.runtime.detection.bundle import DetectorBundle
from qpert.runtime.errors import UnavailableError

if TYPE_CHECKING:
    from qpert.exporter.engines.targets import BuildPlan
    from qpert.runtime.bundle.folder import GraphBundle


def require_buildable(bundle: GraphBundle, plan: BuildPlan) -> None:
    """Raises UnavailableError for a detector with suppression in its graph and TensorRT-RTX.

    TensorRT-RTX 1.7.1 parses NonMaxSuppression and has "no runners that implement it", whatever its sizes.
    """
    suppresses = isinstance(bundle, DetectorBundle) and bundle.manifest.decoding.get("suppression")
    if suppresses and plan.flavor.name == "rtx":
        raise UnavailableError(
            f"{bundle.folder} suppresses duplicates in its graph, and TensorRT-RTX has no NonMaxSuppression; run it "
            "with --provider cpu or cuda, build with --flavor classic on the GPU, or export a detector that needs no "
            "suppression (RT-DETR, D-FINE)",
            code="engine-suppression",
        )
