"""`qpert doctor`: what this machine can run, and why."""

from __future__ import annotations

import click

from qpert.runtime.cli.options import json_option, print_result
from qpert.runtime.report.model import Report, Table
from qpert.runtime.sessions.doctor import Finding, examine


@click.command("doctor", short_help="what this machine can run, and why")
@json_option
def command(as_json: bool) -> None:
    """Show versions, providers and GPU of this machine, what will be used, and what to install for the rest."""
    findings = examine()
    document = {finding.name: finding.to_dict() for finding in findings}
    print_result(document, lambda: machine_report(findings), as_json=as_json)


def machine_report(findings: list[Finding]) -> Report:
    rows = ((one.name, "yes" if one.usable else "no", one.found, one.advice) for one in findings)
    table = Table(("what", "", "found", "to do"), tuple(rows), words=4)
    return Report("qpert doctor", "This machine", (table,))
