"""The parity report: JSON, a page and Markdown, written into the bundle."""

from __future__ import annotations

import datetime
import json
import platform
from importlib.metadata import PackageNotFoundError, version

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.progress import Progress
from qpert.runtime.verification.markdown import render_markdown
from qpert.runtime.verification.page import render
from qpert.runtime.verification.result import Verification

LIBRARIES = ("qpert", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy", "pillow", "tokenizers")


def environment(bundle: Bundle, provider: str) -> dict[str, str]:
    """What this was measured on."""
    found = {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return found | {"provider": provider, "checkpoint": bundle.manifest.checkpoint.name, "when": now}


def write_report(bundle: Bundle, verification: Verification, progress: Progress) -> str:
    """Write `reports/verify.{json,html,md}` and the verdict into the manifest; returns the page.

    A bundle that cannot be written (a read-only deployment) is verified all the same, and that is said.
    """
    page = render(verification)
    verdict: dict[str, object] = {
        "verdict": verification.verdict,
        "level": verification.level,
        "reference": verification.reference,
        "provider": verification.provider,
        "when": verification.environment["when"],
    }
    try:
        now = Bundle(bundle.folder, read_manifest(bundle.folder))  # others may have written reports in these minutes
        written = now.with_report("verify.html", page, verification=verdict)
        written = written.with_report("verify.md", render_markdown(verification))
        written.with_report("verify.json", json.dumps(verification.to_dict(), indent=1) + "\n")
    except OSError as error:
        progress.say(f"the report is not kept: {bundle.folder} cannot be written ({error})")
    return page
