"""`qpert serve` in a process of its own, as users run it."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

WAIT = 120.0
"""Seconds until a start or a stop has failed: far more than either takes, on a loaded machine too."""


class RunningService:
    """One process; `client` speaks to it. What it writes on stderr is in `lines`."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "qpert.runtime.cli", "serve", *map(str, arguments), "--port", "0"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
        self.lines: list[str] = []
        self._bound = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._bound.wait(WAIT) or not self.url:
            self.kill()
            raise RuntimeError("the service did not start:\n" + "".join(self.lines))
        self.client = httpx.Client(base_url=self.url, timeout=WAIT, trust_env=False)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if " on http://" in line:
                self._bound.set()
        self._bound.set()

    @property
    def url(self) -> str:
        found = re.search(r" on (http://\S+)", "".join(self.lines))
        return "" if found is None else found[1]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait_until_ready(self) -> RunningService:
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health/ready").status_code == 200:
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.kill()
        raise RuntimeError("the service did not become ready:\n" + "".join(self.lines))

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WAIT)
        self.client.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where it is not there yet."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.client.get("/metrics").text.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and wanted <= set((found[2] or "").split(",")):
                return float(found[3])
        return 0.0


@contextlib.contextmanager
def running(*arguments: object, environment: dict[str, str] | None = None) -> Iterator[RunningService]:
    """A service that is ready, and is stopped at the end."""
    service = RunningService(*arguments, environment=environment)
    try:
        yield service.wait_until_ready()
    finally:
        if service.process.poll() is None:
            service.stop()


def data_uri(picture: Path | bytes) -> str:
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def array_of(entry: dict) -> np.ndarray:
    """The float32 numbers of one embedding of an answer, in either encoding."""
    if isinstance(entry["embedding"], str):
        return np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").reshape(entry["shape"])
    return np.array(entry["embedding"], np.float64).astype(np.float32)
