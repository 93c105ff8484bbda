"""Stock LAVIS as a reference. It runs in an environment of its own (`make lavis-env`), in a process of its own.

LAVIS 1.0.2 does not work with a current transformers, so it cannot be imported here. `lavis_worker.py` is started with
the other environment's interpreter and answers JSON lines; arrays travel as safetensors files in a temporary folder.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.errors import CheckpointError, UnavailableError

PROJECT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).resolve().with_name("lavis_worker.py")
HINT = "`make lavis-env` in the project folder makes it, or set QPERT_LAVIS_PYTHON to the interpreter of another one"


def lavis_python(python: Path | None = None) -> Path:
    """The interpreter of the LAVIS environment: the argument, $QPERT_LAVIS_PYTHON, or the one `make lavis-env` made.

    Raises:
        UnavailableError: it is not there.
    """
    default = Path(os.environ.get("QPERT_LAVIS_ENV") or PROJECT / ".cache" / "lavis") / "bin" / "python"
    found = python or Path(os.environ.get("QPERT_LAVIS_PYTHON") or default)
    if not found.is_file():
        raise UnavailableError(
            f"the LAVIS reference needs an environment of its own; {found} does not exist. {HINT}",
            code="lavis-environment-missing",
        )
    return found


class LavisReference:
    """A stock LAVIS `Blip2ITM` in another process. `close` ends it; it is a context manager too.

    `ignored` names the tensors of the vision file that LAVIS has no place for (it leaves out the last block).
    """

    name = "lavis"

    def __init__(self, process: subprocess.Popen[str], folder: TemporaryDirectory[str], log: IO[str]) -> None:
        self._process = process
        self._folder = folder
        self._log = log
        self.ignored: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        config: Blip2Config,
        vision_checkpoint: str | Path | None = None,
        python: Path | None = None,
        threshold: float = 0.95,
        preserve_norm: bool = False,
        stages: str = "itc",
    ) -> LavisReference:
        """Start LAVIS and load a `.pth`, strictly, in float32 on the CPU.

        Args:
            config: the dimensions; another image size than the checkpoint's has its position embedding interpolated
                by LAVIS's own `interpolate_pos_embed`.
            vision_checkpoint: LAVIS's stage-1 checkpoints lack the vision transformer, which was frozen in training;
                this is its file (`eva_vit_g.pth`, `clip_vit_L.pth`).

        Raises:
            UnavailableError: there is no LAVIS environment, LAVIS is not in it, or the process died.
            CheckpointError: a tensor is missing, unknown or of another shape, or the file is not a checkpoint.
        """
        reference = cls._start(lavis_python(python))
        try:
            answer = reference._ask(
                {
                    "open": {
                        "checkpoint": _absolute(checkpoint),
                        "vision_checkpoint": None if vision_checkpoint is None else _absolute(vision_checkpoint),
                        "config": config.to_dict(),
                        "threshold": threshold,
                        "preserve_norm": preserve_norm,
                        "stages": stages,
                    }
                }
            )
        except BaseException:
            reference.close()
            raise
        reference.ignored = tuple(answer["ignored"])
        return reference

    @classmethod
    def _start(cls, python: Path) -> LavisReference:
        folder = TemporaryDirectory(prefix="qpert-lavis-")
        log = (Path(folder.name) / "log.txt").open("w+")
        process = subprocess.Popen(
            [python, "-I", "-W", "ignore", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        return cls(process, folder, log)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of `graph`, as `stock.StockReference.run` describes them."""
        if self._log.closed:
            raise UnavailableError(self._obituary(), code="lavis-worker-died")
        given, made = Path(self._folder.name) / "inputs.safetensors", Path(self._folder.name) / "outputs.safetensors"
        save_file({name: np.ascontiguousarray(value) for name, value in inputs.items()}, given)
        self._ask({"graph": graph, "inputs": str(given), "outputs": str(made)})
        outputs: dict[str, np.ndarray] = load_file(made)
        return outputs

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it ended, or was closed here
            line = ""
        if not line:
            raise UnavailableError(self._obituary(), code="lavis-worker-died")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise _error(answer)
        return answer

    def _obituary(self) -> str:
        if self._log.closed:
            return "the LAVIS reference has been closed"
        try:
            code: int | str = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = "none"
        self._log.seek(0)
        tail = self._log.read().strip()[-1500:] or "it wrote nothing"
        killed = " (killed: is there enough memory?)" if code == -9 else ""
        return f"the LAVIS process ended, exit code {code}{killed}. {HINT}. Its last words:\n{tail}"

    def close(self) -> None:
        """End the process and remove the temporary folder. Closing twice is fine."""
        if self._log.closed:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # a request that nobody read
                pipe.close()  # type: ignore[union-attr]
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> LavisReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _absolute(path: str | Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, expected a LAVIS checkpoint (.pth)", code="checkpoint-not-found")
    return str(path.resolve())


def _error(answer: dict[str, Any]) -> Exception:
    """What the worker reports, as an error of ours; a bug keeps the worker's traceback."""
    if answer["kind"] == "checkpoint":
        return CheckpointError(answer["error"], code="checkpoint-rejected-by-lavis")
    if answer["kind"] == "unavailable":
        return UnavailableError(
            f"the LAVIS environment is not complete: {answer['error']}. {HINT}", code="lavis-environment-incomplete"
        )
    return RuntimeError(f"in the LAVIS process: {answer['error']}\n{answer['traceback']}")
