"""Size of the wheel and time of `import qpert.runtime`, in fresh processes, beside `import numpy` in the same run.

    python benchmarks/package.py            prints them
    python benchmarks/package.py --write    and writes results/package.json

The wheel is built from the working tree. Processes alternate, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from qpert.runtime.benchmark.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "package.json"
PROGRAMS = {
    "python": "pass",
    "numpy": "import numpy",
    "qpert.runtime": "import qpert.runtime",
    "Retriever": "from qpert.runtime import Retriever",
    "qpert --help": "from qpert.runtime.cli import run; run(['--help'])",
}
ROUNDS = 9


def seconds(program: str) -> tuple[float, float]:
    """Of a clock, and of the processor: the second is hardly changed by other work on the machine."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wheel() -> dict[str, Any]:
    """Bytes of the wheel, and of what is in it by folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "-w", folder, str(ROOT)], check=True)
        (built,) = Path(folder).glob("*.whl")
        parts: dict[str, int] = {}
        for item in zipfile.ZipFile(built).infolist():
            name = "/".join(item.filename.split("/")[:2])
            parts[name] = parts.get(name, 0) + item.compress_size
        largest = sorted(parts.items(), key=lambda part: -part[1])
        return {"bytes": built.stat().st_size, "compressed_bytes_by_folder": dict(largest[:6])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(ROUNDS):
        for name, program in PROGRAMS.items():
            taken[name].append(seconds(program))
    bare = statistics.median(cpu for _, cpu in taken["python"])
    found = {
        "what": "seconds of a fresh process, medians; `cpu_above_python` is less what an empty program takes",
        "rounds": ROUNDS,
        "processes": {
            name: {
                "wall": round(statistics.median(wall for wall, _ in measured), 4),
                "cpu": round(statistics.median(cpu for _, cpu in measured), 4),
                "cpu_above_python": round(statistics.median(cpu for _, cpu in measured) - bare, 4),
            }
            for name, measured in taken.items()
        },
        "wheel": wheel(),
        "machine": describe_machine(),
        "note": "a shared machine with two cores, busy with other work",
    }
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    print(text)
    if options.write:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
