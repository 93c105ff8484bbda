"""The command line: `qpert …`, and `qpert-export …` for `qpert export …`.

Errors are handled here, at the edge: a `QpertError` becomes one line on stderr and its exit code, and so does an error
caused by the machine (`edge`). Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import click

from qpert.runtime.cli.edge import BROKEN_PIPE, MACHINE, ReaderGoneError, exit_code_of, machine_error, open_streams
from qpert.runtime.errors import QpertError, QpertWarning, UnavailableError

ORDER = (
    *("export", "verify", "eval", "data", "calibrate", "quantize", "build", "detect", "index", "search", "serve"),
    *("package", "bench", "inspect", "doctor"),
)
"""The order in which `qpert --help` lists commands; others follow by name."""

OWN = ("verify", "eval", "data", "detect", "index", "search", "serve", "package", "bench", "inspect", "doctor")
"""Commands of this package, each in the module of its name."""

ENTRY_POINTS = "qpert.commands"
"""The entry-point group in which other packages (`qpert.exporter`, `qpert.calibration`, yours) register commands."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is used, so that `qpert search` loads only what it needs."""

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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # not a standard stream; click would exit with 1, a failed gate
            raise RuntimeError("a pipe to another process broke") from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qpert")
def cli() -> None:
    """Image-text retrieval models (BLIP-2 first of all), exported, verified and run without PyTorch."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code: 0 success, 1 a gate failed, 2 bad input, 3 not possible here."""
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        warnings.simplefilter("always", QpertWarning)
        try:
            result = cli.main(args=list(arguments), prog_name="qpert", standalone_mode=False, obj=list(arguments))
            sys.stdout.flush()
        except QpertError as error:
            click.echo(f"error: {error}", err=True)
            return exit_code_of(error)
        except ReaderGoneError:
            return BROKEN_PIPE
        except click.ClickException as error:
            return refused_by_click(error)
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            return 130
        except Exception as error:
            explained = machine_error(error)
            if explained is None:
                raise
            click.echo(f"error: {explained}", err=True)
            return explained.exit_code
    return result if isinstance(result, int) else 0


def refused_by_click(error: click.ClickException) -> int:
    """Show click's message. A path without read permission is the machine's fault, not bad input."""
    if " is not readable" in error.message:
        click.echo(f"error: {error.message.rstrip('.')}; {MACHINE[errno.EACCES]}", err=True)
        return UnavailableError.exit_code
    error.show()
    return QpertError.exit_code


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print our own warnings as one line; drop those of other libraries."""
    if issubclass(category, QpertWarning):
        click.echo(f"warning: {message}", err=True)


def run_process(arguments: Sequence[str]) -> int:
    """`run`, after making this process's standard streams safe."""
    try:
        open_streams()
    except QpertError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    return run(arguments)


def main() -> None:
    sys.exit(run_process(sys.argv[1:]))


def export_main() -> None:
    sys.exit(run_process(["export", *sys.argv[1:]]))
