"""The parity report: JSON and one page, written into the bundle."""

from __future__ import annotations

import datetime
import html
import json
import platform
from importlib.metadata import PackageNotFoundError, version

from qpert.runtime.bundle import Bundle
from qpert.runtime.progress import Progress
from qpert.runtime.verification import Comparison, Gate, Verification

LIBRARIES = ("qpert", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy", "pillow", "tokenizers")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --pass: #14804a; --fail: #c02626 }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.05rem; margin-top: 2rem }}
.verdict {{ display: inline-block; padding: .1rem .7rem; border-radius: .4rem; color: #fff }}
.pass {{ background: var(--pass) }} .fail {{ background: var(--fail) }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line) }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
</style>
{body}
</html>
"""


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
    """Write `reports/verify.{json,html}` and the verdict into the manifest; returns the page.

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
        written = bundle.with_report("verify.html", page, verification=verdict)
        written.with_report("verify.json", json.dumps(verification.to_dict(), indent=1) + "\n")
    except OSError as error:
        progress.say(f"the report is not kept: {bundle.folder} cannot be written ({error})")
    return page


def render(verification: Verification) -> str:
    """One self-contained page: verdict, gates, worst comparison of each case, environment."""
    verdict = f'<span class="verdict {verification.verdict}">{verification.verdict}</span>'
    body = [
        f"<h1>Parity {verdict}</h1>",
        f"<p>{verification.precision} on {html.escape(verification.provider)}, compared with the "
        f"<b>{html.escape(verification.reference)}</b> reference: {len(verification.comparisons)} comparisons.</p>",
        "<h2>Gates</h2>",
        table(("gate", "value", "limit", ""), [gate_row(gate) for gate in verification.gates]),
        "<h2>Largest difference of each case, over all batch shapes</h2>",
        table(("graph", "case", "max abs", "1 − cosine", "in shape"), worst_rows(verification)),
        "<h2>Environment</h2>",
        table(("", ""), [(html.escape(key), html.escape(value)) for key, value in verification.environment.items()]),
    ]
    return PAGE.format(title=f"qpert parity: {verification.verdict}", body="\n".join(body))


def gate_row(gate: Gate) -> tuple[str, ...]:
    mark = "pass" if gate.passed else "fail"
    return (
        html.escape(gate.name),
        f"{gate.value:.3g}",
        f"{gate.limit:.3g}",
        f'<span class="verdict {mark}">{mark}</span>',
    )


def worst_rows(verification: Verification) -> list[tuple[str, ...]]:
    worst: dict[tuple[str, str], Comparison] = {}
    for comparison in verification.comparisons:
        key = (comparison.graph, comparison.case)
        if key not in worst or not comparison.max_abs <= worst[key].max_abs:
            worst[key] = comparison
    return [
        (graph, case, f"{row.max_abs:.3g}", f"{row.cosine_distance:.3g}", row.shape)
        for (graph, case), row in worst.items()
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """An HTML table; cells are markup already."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{header}</tr>{''.join(lines)}</table>"
