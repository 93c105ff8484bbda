"""The command line: `qpert …`, and `qpert-export …` for `qpert export …`.

Errors are handled here, at the edge: a `QpertError` becomes one line on stderr and its exit code, anything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points

import click

from qpert.runtime.errors import QpertError, QpertWarning

ORDER = (
    *("export", "verify", "eval", "calibrate", "quantize", "build", "index", "search", "bench", "inspect", "doctor"),
)
"""The order in which `qpert --help` lists commands; others follow by name."""

OWN = ("verify", "eval", "index", "search", "bench", "inspect", "doctor")
"""Commands of this package: each lives in the module of its name."""

ENTRY_POINTS = "qpert.commands"
"""The entry-point group in which other packages (`qpert.exporter`, `qpert.calibration`, yours) register commands."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is used, so that `qpert search` loads nothing but what it needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = {*OWN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))}
        return [*(name for name in ORDER if name in found), *sorted(found.difference(ORDER))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OWN:
            command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
            return command
        for entry in entry_points(group=ENTRY_POINTS, name=cmd_name):
            found: click.Command = entry.load()
            return found
        return None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qpert")
def cli() -> None:
    """BLIP-2 image-text retrieval, exported, verified and run without PyTorch."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code: 0 fine, 1 a gate failed, 2 bad input, 3 not possible here."""
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        warnings.simplefilter("always", QpertWarning)
        try:
            result = cli.main(args=list(arguments), prog_name="qpert", standalone_mode=False, obj=list(arguments))
        except QpertError as error:
            click.echo(f"error: {error}", err=True)
            return error.exit_code
        except click.ClickException as error:
            error.show()
            return 2
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            return 130
    return result if isinstance(result, int) else 0


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """One line for the user's own warnings; other libraries' warnings are not the user's business."""
    if issubclass(category, QpertWarning):
        click.echo(f"warning: {message}", err=True)


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def export_main() -> None:
    sys.exit(run(["export", *sys.argv[1:]]))
