"""How long examples/cpp takes beside the Python runtime on the same graphs, in the same library, on the same machine.

    make cpp-env
    python benchmarks/embedding_cpp.py --bundle BUNDLE --out benchmarks/results/embedding_cpp.json

Both sides do the same: a JPEG file to pixels, a picture to features, a text to its vector, a pair to its match logit,
one at a time and with one thread. They take turns in short rounds, so that a busy machine is busy for both; each figure
is the median of the rounds' medians, in wall time. A ratio above 1 means that C++ is faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, features

from qpert.runtime import Retriever
from qpert.runtime.benchmark.machine import cpu_name
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image, preprocess_images, resize

ROOT = Path(__file__).parents[1]
ONNXRUNTIME = Path(onnxruntime.__file__).parent / "capi"
TEXT = "a red box on a wooden table beside a cup"


def build(folder: Path) -> Path:
    """A release build of examples/cpp."""
    configure = ["cmake", "-S", str(ROOT / "examples" / "cpp"), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """One run more than `repeats`, of which the first is not counted."""
    times = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        work()
        if turn:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def python_times(retriever: Retriever, file: Path, repeats: int) -> dict[str, float]:
    """What `qpert-cpp-check time` measures, under the same names; and PIL's resize alone."""
    picture, manifest = load_image(file), retriever.encoder.manifest
    width, height = picture.size
    corners = np.array([[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 0.9]]) * [width, height, width, height]
    boxes = Boxes(corners, (width, height))
    found = retriever.encode_images([picture], boxes=[boxes])
    size = manifest.preprocessing.size
    works: dict[str, Callable[[], object]] = {
        "decode": lambda: load_image(file),
        "pil_resize": lambda: resize(picture, (size, size)),
        "pixels": lambda: preprocess_images([picture], manifest.preprocessing),
        "encode_image": lambda: retriever.encode_images([picture]),
        "encode_image_2_boxes": lambda: retriever.encode_images([picture], boxes=[boxes]),
        "encode_text": lambda: retriever.encode_texts([TEXT]),
        "itm": lambda: retriever.itm_scores(found, [TEXT]),
        "tokenize": lambda: retriever.encoder.tokenizer.encode([TEXT]),
    }
    return {name: median_ms(work, repeats) for name, work in works.items()}


def cpp_times(program: Path, bundle: Path, file: Path, repeats: int) -> dict[str, float]:
    command = [program, "time", bundle, ONNXRUNTIME, repeats, 1, file, TEXT]
    found = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    times: dict[str, float] = json.loads(found.stdout)
    return times


def compare(program: Path, bundle: Path, file: Path, rounds: int, repeats: int) -> dict[str, Any]:
    """Rows of one picture: milliseconds of both sides and the ratio."""
    cpp: list[dict[str, float]] = []
    python: list[dict[str, float]] = []
    with Retriever.open(bundle, threads=1) as retriever:
        for _ in range(rounds):
            cpp.append(cpp_times(program, bundle, file, repeats))
            python.append(python_times(retriever, file, repeats))

    def middle(found: list[dict[str, float]], name: str) -> float:
        return statistics.median(one[name] for one in found)

    same = ("decode", "encode_image", "encode_image_2_boxes", "encode_text", "itm", "tokenize")
    pairs = {name: (name, name) for name in same}
    pairs |= {
        "pixels, native beside Python's preprocessing (PIL and table)": ("pixels_native", "pixels"),
        "pixels, native with resize and table beside PIL's resize alone": ("pixels_native", "pil_resize"),
        "pixels, native with 2 threads beside Python's preprocessing": ("pixels_native_2_threads", "pixels"),
        "pixels, preprocess.onnx in C++ beside Python's preprocessing": ("pixels_graph", "pixels"),
    }
    width, height = load_image(file).size
    rows = {}
    for title, (ours, theirs) in pairs.items():
        a, b = middle(cpp, ours), middle(python, theirs)
        ratios = [q[theirs] / p[ours] for p, q in zip(cpp, python, strict=True)]
        rows[title] = {
            "cpp_ms": round(a, 4),
            "python_ms": round(b, 4),
            "ratio": round(b / a, 2),
            "ratio_of_rounds": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return {"picture": f"{file.name}, {width}x{height}", "rows": rows}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the program, as built and without its symbols."""
    with tempfile.TemporaryDirectory() as scratch:
        stripped = Path(scratch) / "stripped"
        subprocess.run(["strip", "-o", str(stripped), str(folder / "qpert-cpp")], check=True)
        return {"built": (folder / "qpert-cpp").stat().st_size, "stripped": stripped.stat().st_size}


def large_picture(folder: Path) -> Path:
    """A photograph at the size of a telephone's."""
    file = folder / "coffee-large.jpg"
    with Image.open(ROOT / "examples" / "photos" / "coffee.jpg") as image:
        image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(file, quality=90)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--build", type=Path, default=ROOT / ".cache" / "cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folder = build(options.build)
    program = folder / "qpert-cpp-check"
    with tempfile.TemporaryDirectory() as scratch:
        files = [ROOT / "examples" / "photos" / "rocket.jpg", large_picture(Path(scratch))]
        pictures = [compare(program, options.bundle, file, options.rounds, options.repeats) for file in files]
    result = {
        "what": "examples/cpp beside the Python runtime: the same graphs, library and machine, one thread, in turns; "
        "ratio = Python's time over C++'s",
        "pictures": pictures,
        "program_bytes": sizes(folder),
        "rounds": options.rounds,
        "repeats": options.repeats,
        "bundle": json.loads((options.bundle / "manifest.json").read_text())["command"],
        "machine": cpu_name(),
        "note": "a shared machine: read the ratios, and their range over the rounds",
        "versions": {
            **{name: version(name) for name in ("onnxruntime", "pillow", "numpy")},
            "python": platform.python_version(),
            "libjpeg-turbo of Pillow": features.version("libjpeg_turbo"),
            "compiler": subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[0],
        },
        "when": datetime.date.today().isoformat(),
    }
    options.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
