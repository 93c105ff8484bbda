"""A real tritonserver 2.51 on loopback, from the environment that `tools/triton_env.sh` makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from urllib.error import URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = Path(os.environ.get("QPERT_TRITON_ENV") or ROOT / ".cache" / "triton")
CLIENT = Path(__file__).parent / "triton_client.py"
WAIT = 300.0
"""Seconds until a start or a stop has failed: far more than either takes, on a loaded machine too."""


def require_triton() -> None:
    """Skip the test where the environment is not there."""
    if not (ENVIRONMENT / "qpert-triton.stamp").is_file():
        pytest.skip(f"no Triton in {ENVIRONMENT}; `make triton-env` puts it there")


def python() -> str:
    return str(ENVIRONMENT / "bin" / "python")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class TritonServer:
    """One server process over a model repository; `models` is its own index of them: name → state and reason."""

    def __init__(self, repository: Path, log: Path) -> None:
        home = Path(subprocess.check_output([python(), "-c", "import pytriton; print(pytriton.__file__)"], text=True))
        packages = home.parents[1]
        libraries = subprocess.check_output(
            [python(), "-c", "import sysconfig as s; print(s.get_config_var('LIBDIR'))"]
        )
        prefix = subprocess.check_output([python(), "-c", "import sys; print(sys.base_prefix)"], text=True).strip()
        self.http, self.grpc, metrics = free_ports(3)
        self.log = log
        command = [str(home.parent / "tritonserver" / "bin" / "tritonserver"), f"--model-repository={repository}"]
        command += [f"--backend-directory={ENVIRONMENT / 'backends'}", "--exit-on-error=false"]
        for kind, port in (("http", self.http), ("grpc", self.grpc), ("metrics", metrics)):
            command += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
        variables = os.environ | {
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
            "PYTHONHOME": prefix,
            "LD_LIBRARY_PATH": f"{libraries.decode().strip()}:{packages / 'nvidia_pytriton.libs'}",
            "OMP_NUM_THREADS": "1",
        }
        # The backend's Python reads no PYTHONPATH; it finds qpert because the working folder is on its path.
        self.process = subprocess.Popen(
            command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=variables, cwd=ROOT / "src"
        )

    def __enter__(self) -> TritonServer:
        end = time.monotonic() + WAIT
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urlopen(f"http://127.0.0.1:{self.http}/v2/health/live", timeout=5):
                    return self
            except (URLError, OSError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"tritonserver did not start:\n{self.log.read_text(errors='replace')[-8000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def models(self) -> dict[str, tuple[str, str]]:
        answer = self.call({"index": True})
        return {entry["name"]: (entry.get("state", ""), entry.get("reason", "")) for entry in answer["index"]}

    def call(self, request: dict, arrays: Path | None = None) -> dict:
        """Run `triton_client.py` in the environment: `request` in, JSON out; arrays go and come as .npz files."""
        command = [python(), str(CLIENT), str(self.http), str(self.grpc), *([] if arrays is None else [str(arrays)])]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout)


if __name__ == "__main__":
    with TritonServer(Path(sys.argv[1]), Path(sys.argv[2])) as server:
        print(json.dumps(server.models, indent=1))
