"""Put the settings of a calibrated demonstration bundle where the package ships them.

    qpert export blip2 --checkpoint demo-small-objects --perturb itc --out bundle
    qpert calibrate bundle --dataset demo --score r1 --direction both --out calibrated …
    python examples/demonstration/ship_calibration.py calibrated

`qpert export blip2 --checkpoint NAME` uses them, with the record of the search, unless an option about boxes is given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qpert.exporter import demo
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.files import write_atomically


def ship(folder: Path) -> Path:
    """Write the settings of the bundle in `folder`; returns the file. The paths of this machine are left out."""
    manifest = Bundle.open(folder).manifest
    if manifest.calibration is None:
        raise SystemExit(f"{folder} was not calibrated: make it with qpert calibrate BUNDLE --out {folder}")
    calibration = dict(manifest.calibration)
    calibration["dataset"] = {**calibration["dataset"], "root": "the generated scenes (demo)"}
    del calibration["command"]
    target = demo.CALIBRATED[manifest.checkpoint.name]
    values = {"perturbation": manifest.perturbation.to_dict(), "calibration": calibration}
    write_atomically(target, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    print(ship(parser.parse_args().bundle))
