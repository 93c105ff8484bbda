"""Whether the strength of a bundle's boxes was chosen on data, and what to say where it was not."""

from __future__ import annotations

from pathlib import Path

from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.inputs.perturbation import Perturbation


def calibration_notice(manifest: Manifest, perturbation: Perturbation, bundle: str | Path = "BUNDLE") -> str | None:
    """What users of boxes should know, or None where there is nothing to say.

    Nothing is said of a calibrated bundle, of settings that the user chose for this call, and where boxes do nothing.

    Args:
        manifest: the bundle's.
        perturbation: the settings in use.
        bundle: its folder, for the command in the message.
    """
    chosen_by_user = perturbation != manifest.perturbation
    if manifest.calibration is not None or chosen_by_user or perturbation.stages == "none" or not perturbation.alpha:
        return None
    return (
        f"NOT CALIBRATED: this bundle's boxes act with the default strength (α {perturbation.alpha:g}, "
        f"{perturbation.reduction} over boxes), which was not chosen for this model and can make results worse than no "
        f"boxes. Choose it on validation data: qpert calibrate {bundle} --dataset DIR --apply"
    )
