"""`qpert doctor`: what this machine can run, and why."""

from __future__ import annotations

import json

import click

from qpert.runtime.cli.options import json_option
from qpert.runtime.sessions.doctor import Finding, examine


@click.command("doctor", short_help="what this machine can run, and why")
@json_option
def command(as_json: bool) -> None:
    """Show versions, providers and GPU of this machine, what will be used, and what to install for the rest."""
    findings = examine()
    if as_json:
        click.echo(json.dumps({finding.name: finding.to_dict() for finding in findings}))
    else:
        show(findings)


def show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "", "found", "to do")
    for finding in findings:
        table.add_row(finding.name, "yes" if finding.usable else "no", escape(finding.found), escape(finding.advice))
    Console(highlight=False).print(table)
