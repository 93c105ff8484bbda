"""Runs the tests that are marked `gpu`, and counts.

    python -m gpu_acceptance.measure.tests

Only the files that hold such tests are collected, so that the other tests' packages need not be installed.
"""

from __future__ import annotations

import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_acceptance.measure.output import run

REPOSITORY = Path(__file__).resolve().parents[3]
OUTCOMES = ("failure", "error", "skipped")


def main() -> dict[str, Any]:
    try:
        import pytest
    except ImportError as error:
        return {"skipped": f"{error.name} is not installed; pip install 'qpert[test]'"}
    files = [
        str(path)
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        if re.search(r"\bpytest\.mark\.gpu\b|\bmark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        options = ["-m", "gpu", "-rs", "-p", "no:cacheprovider", "-o", "junit_family=xunit2", f"--junitxml={junit}"]
        code = pytest.main([f"--rootdir={REPOSITORY}", "-c", str(REPOSITORY / "pyproject.toml"), *options, *files])
        return counted(junit) | {"exit_code": int(code)}


def counted(junit: Path) -> dict[str, Any]:
    """How many tests ended how, the names of those that failed, and why others were skipped (reason → how many)."""
    passed, failed, reasons = 0, [], Counter[str]()
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        outcome = next((child for child in case if child.tag in OUTCOMES), None)
        if outcome is None:
            passed += 1
        elif outcome.tag == "skipped":
            reasons[outcome.get("message", "")] += 1
        else:
            failed.append(f"{case.get('name')}: {(outcome.get('message') or '').strip().splitlines()[:1]}")
    return {"passed": passed, "failed": failed, "skips": dict(reasons)}


if __name__ == "__main__":
    raise SystemExit(run(main))
