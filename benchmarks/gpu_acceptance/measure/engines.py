"""Builds a bundle's engines, or says why this library cannot build for this GPU.

    python -m gpu_acceptance.measure.engines BUNDLE --flavor rtx --target current

What `qpert build` refuses before any work (a library that is missing, an architecture that it does not list) is
skipped; what fails after that is a failure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpu_acceptance.measure.output import run
from qpert.exporter.engines.build import BuildRequest, build_engines
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import UnavailableError
from qpert.runtime.progress import Terminal


def main(bundle: Path, flavor: str, target: str) -> dict[str, Any]:
    opened = Bundle.open(bundle)
    request = BuildRequest(flavor=flavor, target=target, force=True, command="gpu_acceptance")
    try:
        plan = request.plan(opened.manifest.precision)
    except UnavailableError as error:
        return {"skipped": str(error)}
    report = build_engines(opened, request, plan, Terminal()).to_dict()
    built = {engine["graph"] for engine in report["engines"] if engine["bytes"] > 0}
    return report | {"missing": sorted(set(opened.manifest.graphs) - built)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--flavor", required=True)
    parser.add_argument("--target", required=True)
    given = parser.parse_args()
    raise SystemExit(run(lambda: main(given.bundle, given.flavor, given.target)))
