"""Whether a provider is installed and starts, as `qpert doctor` finds it.

python -m gpu_acceptance.measure.provider cuda
"""

from __future__ import annotations

import sys
from typing import Any

from gpu_acceptance.measure.output import run
from qpert.runtime.sessions.doctor import find_provider_here
from qpert.runtime.sessions.providers import available_providers, find_provider


def main(name: str) -> dict[str, Any]:
    """What is not installed is skipped; what is installed and does not start is a failure."""
    provider = find_provider(name)
    finding = find_provider_here(provider)
    if name not in available_providers():
        return {"skipped": f"{finding.found}; {finding.advice}"}
    return {"usable": finding.usable, "found": finding.found, "advice": finding.advice}


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(sys.argv[1])))
