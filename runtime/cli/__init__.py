"""The command line: `qpert …`, and `qpert-export …` for `qpert export …`.

Errors are handled here, at the edge: a `QpertError` becomes one line on stderr and its exit code, anything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence

import click

from qpert.runtime.errors import QpertError, QpertWarning

COMMANDS: dict[str, str] = {
    "export": "checkpoint to bundle",
    "verify": "does a bundle compute what PyTorch computes?",
    "eval": "recall on a data set, by object size too",
    "calibrate": "perturbation settings by search on a validation split",
    "quantize": "INT8 or FP8, with a gate on recall",
    "build": "TensorRT engines for a bundle",
    "index": "images to a gallery on disk",
    "search": "a gallery, by text or by image",
    "bench": "how fast a bundle is here, beside PyTorch",
    "inspect": "what is in a bundle, hashes checked",
    "doctor": "what this machine can run, and why",
}
"""Each command lives in the module of its name, and is imported when it is called."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is used, so that `qpert --help` loads nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


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
