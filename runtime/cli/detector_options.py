"""`--detector` and the options that go with it, for commands that otherwise take `--boxes`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from qpert.runtime.cli.options import PATH, detection_options
from qpert.runtime.detection.choice import OPTIONS, PREFIX, DetectorChoice


def detector_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--detector` and `--detector-…`, which reach the command as one `detector`."""

    @wraps(command)
    def collected(**values: Any) -> Any:
        choice = DetectorChoice(
            values.pop("detector_folder"), **{name: values.pop(f"detector_{name}") for name in OPTIONS}
        )
        return command(**values, detector=choice)

    wrapped = detection_options(PREFIX, most=False)(collected)
    option = click.option(
        "--detector",
        "detector_folder",
        type=PATH,
        help="find the boxes with this detector, which `qpert export detector` made",
    )
    made: Callable[..., Any] = option(wrapped)
    return made
