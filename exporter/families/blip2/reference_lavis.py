"""Stock LAVIS as a reference, in a separate process and environment (`make lavis-env`).

LAVIS 1.0.2 does not work with a current transformers, so it cannot be imported here. `lavis_worker.py` runs with the
other environment's interpreter and answers JSON lines; arrays are passed as safetensors files in a temporary folder.
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

PROJECT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).resolve().with_name("lavis_worker.py")
HINT = "Run `make lavis-env` in the project folder, or set QPERT_LAVIS_PYTHON to another environment's interpreter"


def lavis_python(python: Path | None = None) -> Path:
    """The interpreter of the LAVIS environment: the argument, $QPERT_LAVIS_PYTHON, or that of `make lavis-env`.

    Raises:
        UnavailableError: it does not exist.
    """
    default = Path(os.environ.get("QPERT_LAVIS_ENV") or PROJECT / ".cache" / "lavis") / "bin" / "python"
    found = python or Path(os.environ.get("QPERT_LAVIS_PYTHON") or default)
    if not found.is_file():
        raise UnavailableError(
            f"the LAVIS reference needs a separate environment, but {found} does not exist. {HINT}",
            code="lavis-environment-missing",
        )
    return found


class LavisReference:
    """A stock LAVIS `Blip2ITM` in another process. `close` ends it. A context manager.

    `ignored`: tensors of the vision file that LAVIS does not use (it leaves out the last block).
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
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> LavisReference:
        """Start LAVIS and load a `.pth`, strictly, in float32 on the CPU.

        Args:
            config: the dimensions. If the image size differs from the checkpoint's, LAVIS's own
                `interpolate_pos_embed` interpolates the position embedding.
            vision_checkpoint: the file of the vision transformer (`eva_vit_g.pth`, `clip_vit_L.pth`), which LAVIS's
                stage-1 checkpoints lack because it was frozen in training.

        Raises:
            UnavailableError: the LAVIS environment is missing or incomplete, or the process died.
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
                        "centre_keys": centre_keys,
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
        """Outputs of `graph`, see `upstream.UpstreamReference.run`."""
        if self._log.closed:
            raise self._worker_died()
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
        except (BrokenPipeError, ValueError):  # it ended, or was closed
            line = ""
        if not line:
            raise self._worker_died()
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise _error(answer)
        return answer

    def _worker_died(self) -> UnavailableError:
        if self._log.closed:
            return UnavailableError("the LAVIS reference has been closed", code="lavis-worker-closed")
        try:
            code: int | str = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = "none"
        self._log.seek(0)
        tail = self._log.read().strip()[-1500:] or "(empty)"
        killed = " (killed: is there enough memory?)" if code == -9 else ""
        return UnavailableError(
            f"the LAVIS process ended, exit code {code}{killed}. {HINT}. The end of its log:\n{tail}",
            code="lavis-worker-died",
        )

    def close(self) -> None:
        """End the process and remove the temporary folder. Closing twice is fine."""
        if self._log.closed:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # an unread request
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
    """The error that the worker reports, as one of qpert's. A bug keeps the worker's traceback."""
    if answer["kind"] == "checkpoint":
        return CheckpointError(answer["error"], code="checkpoint-rejected-by-lavis")
    if answer["kind"] == "unavailable":
        return UnavailableError(
            f"the LAVIS environment is incomplete: {answer['error']}. {HINT}", code="lavis-environment-incomplete"
        )
    return RuntimeError(f"in the LAVIS process: {answer['error']}\n{answer['traceback']}")
