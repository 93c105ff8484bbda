"""A stock implementation in another process and environment, for what cannot be imported beside qpert's dependencies.

The worker runs with the other environment's interpreter and answers JSON lines; arrays are passed as safetensors files
in a temporary folder. An answer has `ok`; a failed one `kind` (checkpoint, unavailable, other), `error`, `traceback`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from qpert.runtime.errors import CheckpointError, QpertError, UnavailableError

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """The environment of a stock implementation.

    `key`: its name in error codes. `folder`: where its make target puts it, below `.cache`. `variable`: the start of
    the names of the variables that say otherwise, `…_ENV` for the folder and `…_PYTHON` for the interpreter.
    """

    name: str
    key: str
    folder: str
    variable: str
    target: str

    @property
    def hint(self) -> str:
        return (
            f"Run `make {self.target}` in the project folder, or set {self.variable}_PYTHON to another environment's "
            "interpreter"
        )

    def python(self) -> Path:
        """Its interpreter.

        Raises:
            UnavailableError: there is none.
        """
        folder = Path(os.environ.get(f"{self.variable}_ENV") or PROJECT / ".cache" / self.folder)
        found = Path(os.environ.get(f"{self.variable}_PYTHON") or folder / "bin" / "python")
        if not found.is_file():
            raise UnavailableError(
                f"the {self.name} reference needs a separate environment, but {found} does not exist. {self.hint}",
                code=f"{self.key}-environment-missing",
            )
        return found


class WorkerProcess:
    """A running worker. `close` ends it and removes its folder; closing twice is fine."""

    def __init__(self, environment: Environment, script: Path, python: Path | None = None) -> None:
        """Start `script` with the environment's interpreter, or with `python`. Raises UnavailableError without one."""
        self.environment = environment
        python = python or environment.python()
        self._folder = TemporaryDirectory(prefix=f"qpert-{environment.key}-")
        self._log = (Path(self._folder.name) / "log.txt").open("w+")
        self._process = subprocess.Popen(
            [python, "-I", "-W", "ignore", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def arrays(self, request: Mapping[str, Any], inputs: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """The arrays that answer a request, which gets the paths of `inputs` and `outputs`. Errors as in `ask`."""
        if self._log.closed:
            raise self._died()
        given, made = Path(self._folder.name) / "inputs.safetensors", Path(self._folder.name) / "outputs.safetensors"
        files = {"outputs": str(made)}
        if inputs is not None:
            save_file({name: np.ascontiguousarray(value) for name, value in inputs.items()}, given)
            files["inputs"] = str(given)
        self.ask({**request, **files})
        outputs: dict[str, Any] = load_file(made)
        return outputs

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            UnavailableError: the process has died, was closed, or lacks a library.
            CheckpointError: the stock implementation rejects the checkpoint.
            RuntimeError: a bug, with the worker's traceback.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it ended, or was closed
            line = ""
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise self._error(answer)
        return answer

    def _died(self) -> UnavailableError:
        name, key = self.environment.name, self.environment.key
        if self._log.closed:
            return UnavailableError(f"the {name} reference has been closed", code=f"{key}-worker-closed")
        try:
            code: int | str = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = "none"
        self._log.seek(0)
        tail = self._log.read().strip()[-1500:] or "(empty)"
        killed = " (killed: is there enough memory?)" if code == -9 else ""
        return UnavailableError(
            f"the {name} process ended, exit code {code}{killed}. {self.environment.hint}. The end of its log:\n{tail}",
            code=f"{key}-worker-died",
        )

    def _error(self, answer: Mapping[str, Any]) -> QpertError | RuntimeError:
        name, key = self.environment.name, self.environment.key
        if answer["kind"] == "checkpoint":
            return CheckpointError(answer["error"], code=f"checkpoint-rejected-by-{key}")
        if answer["kind"] == "unavailable":
            return UnavailableError(
                f"the {name} environment is incomplete: {answer['error']}. {self.environment.hint}",
                code=f"{key}-environment-incomplete",
            )
        return RuntimeError(f"in the {name} process: {answer['error']}\n{answer['traceback']}")

    def close(self) -> None:
        if self._log.closed:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # an unread request
                pipe.close()  # type: ignore[union-attr]
        self._log.close()
        self._folder.cleanup()
