"""Cold start: a fresh process from its start to its first search result, and its peak memory.

    python -m qpert.runtime.benchmark.cold BUNDLE PROVIDER

is that process; it prints one JSON object. `measure_cold_start` runs it. Hashing is not included, because the files are
already hashed: that happens once per bundle, not at every start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from qpert.runtime.errors import UnavailableError


def measure_cold_start(bundle: Path, provider: str, *, threads: int = 0) -> dict[str, float]:
    """Seconds to import, to open, to the first result and in all, and the peak of resident memory in MB.

    Raises:
        UnavailableError: the process failed; the end of its stderr is in the message.
    """
    command = [sys.executable, "-m", "qpert.runtime.benchmark.cold", str(bundle), provider, str(threads)]
    before = time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - before
    if answer.returncode:
        raise UnavailableError(
            f"a fresh process with {bundle} and provider {provider!r} exited with {answer.returncode}: "
            f"{answer.stderr.strip()[-500:]}; run `qpert verify` on the bundle first",
            code="cold-start-failed",
        )
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found | {"process_seconds": took}


def first_search(bundle: Path, provider: str, threads: int) -> dict[str, float]:
    """Import, open, encode one picture and search it once."""
    began = time.perf_counter()
    from qpert.runtime.retriever import Gallery, Retriever

    imported = time.perf_counter()
    with Retriever.open(bundle, provider, threads=threads) as retriever:
        opened = time.perf_counter()
        samples = retriever.encoder.bundle.samples()
        pictures = [samples.pictures[0][0]]
        retriever.search(samples.captions[0][0], Gallery(("a picture",), retriever.encode_images(pictures)))
        searched = time.perf_counter()
    return {
        "import_seconds": imported - began,
        "open_seconds": opened - imported,
        "first_search_seconds": searched - opened,
        "peak_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> float:
    """The peak resident memory of this process, as the kernel counts it, in MB.

    Linux's `ru_maxrss` is not usable: a process inherits it from its parent, even across `exec`.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError as error:
        raise UnavailableError(
            "this system does not report a process's peak memory; run bench on Linux", code="peak-memory"
        ) from error
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    print(json.dumps(first_search(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
