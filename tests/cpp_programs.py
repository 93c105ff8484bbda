"""Builds `examples/cpp` for the tests, once for all processes, and runs its two programs."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
ONNXRUNTIME = Path(onnxruntime.__file__).parent / "capi"
"""The folder of the wheel's libonnxruntime.so.1.x."""

SANITIZERS = {
    # Oniguruma keeps its tables, and ONNX Runtime's library is not built for the sanitizer: neither is a leak of ours.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        assert self.code in (0, 1), self.err
        return json.loads(self.out)


@dataclass(frozen=True)
class Programs:
    """The folder of one build."""

    folder: Path
    library: Path = ONNXRUNTIME

    def _run(self, name: str, arguments: tuple, environment: dict[str, str] | None = None) -> Ended:
        command = [str(self.folder / name), *map(str, arguments)]
        variables = {**os.environ, **SANITIZERS, "QPERT_ONNXRUNTIME": str(self.library), **(environment or {})}
        ended = subprocess.run(command, capture_output=True, env=variables, check=False)
        return Ended(ended.returncode, ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace"))

    def score(self, *arguments, environment: dict[str, str] | None = None) -> Ended:
        """`qpert-cpp`."""
        return self._run("qpert-cpp", arguments, environment)

    def check(self, *arguments) -> Ended:
        """`qpert-cpp-check`, which must succeed."""
        ended = self._run("qpert-cpp-check", arguments)
        assert ended.code == 0, f"{arguments[0]} ended with {ended.code}: {ended.err[-3000:]}"
        return ended

    def decode(self, picture: Path, raw: Path) -> np.ndarray | None:
        """The picture as uint8 [H,W,3]; None where it is refused with exit code 2."""
        ended = self._run("qpert-cpp-check", ("decode", picture, raw))
        if ended.code == 2:
            assert ended.err.startswith("error: "), ended.err
            return None
        assert ended.code == 0, ended.err
        width, height = map(int, ended.out.split())
        return np.fromfile(raw, np.uint8).reshape(height, width, 3)


def built(*, sanitize: bool) -> Programs:
    """The programs, up to date. The test is skipped where `make test-cpp` has not set up what they need."""
    missing = subprocess.run(["sh", str(ROOT / "tools" / "cpp_env.sh"), "--check"], capture_output=True, text=True)
    if missing.returncode:
        pytest.skip(f"examples/cpp cannot be built here: {missing.stdout.strip()}")
    folder = ROOT / ".cache" / ("cpp-sanitized" if sanitize else "cpp")
    folder.parent.mkdir(exist_ok=True)
    configure = ["cmake", "-S", str(ROOT / "examples" / "cpp"), "-B", str(folder)]
    if sanitize:
        configure += ["-DQPERT_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1"]
    with FileLock(f"{folder}.lock"):
        for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}"
    return Programs(folder)
