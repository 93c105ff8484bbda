"""A bundle in Node and in a browser beside Python: the same graphs on the same machine, and the first result.

    make web && python benchmarks/embedding_js.py --out benchmarks/results/embedding_js.json

Times are medians in milliseconds of rounds in turns (Python, Node, Python, Node, …), so that a busy machine slows both;
ratios are to Python in the same run. "First result" is a new process, or a new tab, up to the first ranking.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qpert.runtime import Boxes, Retriever
from qpert.runtime.benchmark.machine import describe_machine
from qpert.runtime.inputs.images import load_image, preprocess_images

ROOT = Path(__file__).parents[1]
TEXTS = [
    "A small yellow flower at the bottom.",
    "Three tiny red clocks.",
    "A black fish.",
    "A brown house on the left.",
]
FIRST = """
import sys
from qpert.runtime import Retriever
with Retriever.open(sys.argv[1]) as retriever:
    features = retriever.encode_images([sys.argv[2]])
    print(features.query_sets.itc_scores(retriever.encode_texts([sys.argv[3]])))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--site", type=Path, default=Path("build/web"), help="what `make web` made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15, help="runs of a graph in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    page = json.loads((arguments.site / "page.json").read_text())
    picture = page["pictures"][page["start"]["picture"]]
    given = {
        "bundle": str(arguments.site / "bundle"),
        "picture": str(arguments.site / picture["file"]),
        "boxes": [page["start"]["box"]],
        "texts": TEXTS,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
    }
    load = os.getloadavg()
    report = {
        "what": "the graphs of one bundle (demo-small-objects, fp32) by ONNX Runtime in Python, Node and Chromium",
        "note": "a shared machine of two cores that other work kept busy: trust the ratios, not the times",
        "graphs": graphs(given, arguments.rounds),
        "first_result_ms": first_results(given, arguments.rounds),
        "browser": in_browser(arguments.site, given, arguments.rounds),
        "threads": arguments.threads,
        "load_at_start": load,
        "machine": describe_machine(),
        "packages": packages(),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


def graphs(given: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """One row a graph: medians, and Node's ratio to Python."""
    calls = python_calls(given)
    times: dict[str, dict[str, list[float]]] = {name: {"python": [], "node": []} for name in calls}
    for number in range(rounds):
        progress(f"graphs, round {number + 1} of {rounds}")
        for name, call in calls.items():
            times[name]["python"] += timed(call, given["repeats"])
        for name, found in javascript({"task": "node", **given}).items():
            times[name]["node"] += found
    rows = []
    for name, found in times.items():
        python, node = (statistics.median(found[runtime]) for runtime in ("python", "node"))
        rows.append({"graph": name, "python_ms": r(python), "node_ms": r(node), "ratio": r(node / python)})
    return rows


def python_calls(given: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The graphs' sessions on the same inputs, without what the runtime does around them."""
    folder = Path(given["bundle"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given["threads"]
    with Retriever.open(folder) as retriever:
        manifest = retriever.encoder.manifest
        image = load_image(given["picture"])
        pixels = preprocess_images([image], manifest.preprocessing)
        tokens = retriever.encode_images([image]).image_embeds
        slots = retriever.encoder.box_slots([Boxes(given["boxes"], image.size)])
        none = retriever.encoder.box_slots([None])
        texts = retriever.encoder.tokenize(given["texts"])
    ids = {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask}
    sessions = {
        name: onnxruntime.InferenceSession(folder / graph.file, options, providers=["CPUExecutionProvider"])
        for name, graph in manifest.all_graphs.items()
    }
    inputs = {
        "preprocess": ("preprocess", {"image": np.asarray(image)}),
        "vision": ("vision", {"pixel_values": pixels}),
        "image_query, no boxes": ("image_query", {"image_embeds": tokens, **none}),
        "image_query, boxes": ("image_query", {"image_embeds": tokens, **slots}),
        "text": ("text", ids),
        "itm": ("itm", {"image_embeds": tokens, **{name: array[None] for name, array in ids.items()}}),
    }
    return {name: partial(sessions[graph].run, None, feeds) for name, (graph, feeds) in inputs.items()}


def first_results(given: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A new process up to one score, files hashed or remembered as each does it."""
    command = [given["bundle"], given["picture"], TEXTS[0]]
    cli = ["node", str(ROOT / "examples/node/cli.mjs"), command[0], "--image", command[1], "--text", command[2]]
    times: dict[str, list[float]] = {"python": [], "node": []}
    for number in range(rounds):
        progress(f"first results, round {number + 1} of {rounds}")
        for runtime, words in (("python", [sys.executable, "-c", FIRST, *command]), ("node", cli)):
            start = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True)
            times[runtime].append(1000 * (time.perf_counter() - start))
    python, node = (statistics.median(times[runtime]) for runtime in ("python", "node"))
    return {"python": r(python), "node": r(node), "ratio": r(node / python)}


def in_browser(site: Path, given: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The page with one picture: from opening it to the first ranking, and its stages."""
    chromium = shutil.which(os.environ.get("QPERT_CHROMIUM", "chromium"))
    if chromium is None:
        return {"skipped": "no chromium on this machine"}

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    found = []
    for number in range(rounds):
        progress(f"browser, round {number + 1} of {rounds}")
        found.append(javascript({"task": "browser", "url": url, "chromium": chromium, **given}))
    server.shutdown()
    stages = {name: [time for one in found for time in one["stages"][name]] for name in found[0]["stages"]}
    return {
        "version": found[0]["version"],
        "provider": "wasm, one thread, in a worker",
        "downloaded_mb": r(downloaded(site) / 1e6),
        "first_result_ms": r(statistics.median(one["first"] for one in found)),
        "again_ms": r(statistics.median(one["second"] for one in found)),
        "stages_ms": {name: r(statistics.median(times)) for name, times in stages.items()},
    }


def downloaded(site: Path) -> int:
    """Bytes of all that the page loads for one picture; most servers would compress some of it."""
    left_out = ("samples.safetensors", "gallery/", "webgpu", "asyncify", "LICENSE", "image_query.onnx")
    files = [path for path in site.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if not any(part in str(path) for part in left_out))


def javascript(request: dict[str, Any]) -> dict[str, Any]:
    script = str(Path(__file__).with_suffix(".mjs"))
    done = subprocess.run(["node", script], input=json.dumps(request), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def packages() -> dict[str, str]:
    found = {"node": subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()}
    for example in ("node", "web"):
        found |= json.loads((ROOT / "examples" / example / "package.json").read_text())["dependencies"]
    return found


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def r(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main())
