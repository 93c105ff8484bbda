"""`make web`: the page, ONNX Runtime, a bundle and a gallery in one folder that any static server serves.

    python examples/web/build.py [--out build/web] [--bundle DIR] [--webgpu]

Without --bundle the demonstration for small objects is exported first. The gallery is the first scenes of the
demonstration's test split; with which of them the page begins, and with which sentences, is chosen here by what their
boxes change. Nothing in the folder refers to another server.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from attention import write_attention_graph

from qpert.runtime import Boxes, Retriever
from qpert.runtime.bundle.manifest import read_manifest
from qpert.runtime.cli import run
from qpert.runtime.errors import BundleError, QpertError
from qpert.runtime.inputs.datasets import RetrievalDataset, read_dataset
from qpert.runtime.inputs.images import image_size
from qpert.runtime.progress import Terminal
from qpert.runtime.scenes import write_dataset

HERE = Path(__file__).resolve().parent
CHECKPOINT = "demo-small-objects"
SCENES, SEED = 30, 0
SENTENCES = 8
SOURCES = ("model.mjs", "worker.mjs", "pictures.mjs", "heat.mjs", "stage.mjs", "looks.mjs", "ranks.mjs", "main.mjs")
LIBRARY = ("bundle.mjs", "retriever.mjs")
RUNTIMES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
"""Of onnxruntime-web: the module, the glue that it loads, and the program."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/web"), help="the folder to make (replaced)")
    parser.add_argument("--bundle", type=Path, help="a bundle to use; default: the demonstration, exported now")
    parser.add_argument("--webgpu", action="store_true", help="add WebGPU (27 MB), which ?provider=webgpu turns on")
    arguments = parser.parse_args()
    packages = HERE / "node_modules"
    if not packages.is_dir():
        print(f"error: {packages} is missing; run sh tools/web_env.sh first", file=sys.stderr)
        return 3
    try:
        return build(arguments.out, arguments.bundle, packages, webgpu=arguments.webgpu)
    except QpertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def build(out: Path, bundle: Path | None, packages: Path, *, webgpu: bool) -> int:
    """Everything is put together beside `out` and moved there when it is whole."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if bundle is None:
        code = run(["export", "blip2", "--checkpoint", CHECKPOINT, "--out", str(part / "bundle")])
        if code:
            return code
    else:
        shutil.copytree(bundle, part / "bundle", ignore=shutil.ignore_patterns("engines", "reports"))
        for path in part.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    copy_page(part)
    page: dict[str, Any] = {"providers": copy_runtimes(part, packages, webgpu=webgpu)}
    page |= {"attention": add_attention(part), **gallery(part)}
    page["sizes"] = {
        str(path.relative_to(part).as_posix()): path.stat().st_size for path in part.rglob("*") if path.is_file()
    }
    (part / "page.json").write_text(json.dumps(page), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.0f} MB. To look at it: python3 -m http.server --bind 127.0.0.1 --directory {out}")
    return 0


def copy_page(out: Path) -> None:
    for name in ("index.html", "style.css"):
        shutil.copy(HERE / name, out / name)
    (out / "lib").mkdir()
    for name in SOURCES:
        copy_module(HERE / name, out / name)
    for name in LIBRARY:
        copy_module(HERE.parent / "node" / name, out / "lib" / name)
    index = out / "index.html"
    index.write_text(index.read_text(encoding="utf-8").replace("main.mjs", "main.js"), encoding="utf-8")


def copy_module(source: Path, target: Path) -> None:
    """As .js: many servers, Debian's nginx among them, do not know .mjs, and browsers then refuse the module."""
    text = source.read_text(encoding="utf-8")
    target.with_suffix(".js").write_text(text.replace(".mjs'", ".js'"), encoding="utf-8")


def copy_runtimes(out: Path, packages: Path, *, webgpu: bool) -> dict[str, dict[str, str]]:
    """ONNX Runtime and the tokenizer's library, with their licences; where each provider's files are."""
    vendor = out / "vendor"
    vendor.mkdir()
    shutil.copy(packages / "@huggingface/tokenizers/dist/tokenizers.min.mjs", vendor / "tokenizers.js")
    shutil.copy(packages / "@huggingface/tokenizers/LICENSE", vendor / "tokenizers.LICENSE")
    found = {}
    for provider in ("wasm", "webgpu") if webgpu else ("wasm",):
        names = {}
        for what, name in zip(("module", "glue", "wasm"), RUNTIMES[provider], strict=True):
            file = f"vendor/{name}".replace(".mjs", ".js")
            shutil.copy(packages / "onnxruntime-web" / "dist" / name, out / file)
            names[what] = file
        found[provider] = names
    return found


def add_attention(out: Path) -> dict[str, Any] | None:
    """The query head with its attention as an output; None, and said, where it has none over the picture."""
    head = read_manifest(out / "bundle").query_head
    file = "attention/query_head.onnx"
    (out / "attention").mkdir()
    try:
        return {"file": file, "output": write_attention_graph(out / "bundle", head, out / file)}
    except BundleError as error:
        if error.code != "no-cross-attention":
            raise
        print(f"the page shows no attention: {error}", file=sys.stderr)
        return None


@dataclass(frozen=True)
class Effect:
    """A caption of the smallest object, its picture, and the picture's rank (from 1) without and with that box."""

    caption: int
    picture: int
    before: int
    after: int


def gallery(out: Path) -> dict[str, Any]:
    """Draws the scenes, and chooses what the page begins with."""
    write_dataset(out / "scenes", "test", SCENES, SEED, captions="smallest", progress=Terminal())
    dataset = read_dataset(out / "scenes", "test")
    boxes = [dataset.boxes_of(i, image_size(path)) for i, path in enumerate(dataset.images)]
    found = effects(out / "bundle", dataset, boxes)
    best = sorted(found, key=lambda one: (-(one.before / one.after), -one.before, one.caption))
    chosen = list({one.picture: one for one in reversed(best)}.values())[::-1][:SENTENCES]
    pictures = []
    (out / "gallery").mkdir()
    for path, given in zip(dataset.images, boxes, strict=True):
        shutil.copy(path, out / "gallery" / path.name)
        width, height = given.size
        corners = [[round(value) for value in box] for box in given.xyxy.tolist()]
        picture = {"name": path.stem, "file": f"gallery/{path.name}", "width": width, "height": height}
        pictures.append({**picture, "boxes": corners})
    shutil.rmtree(out / "scenes")
    start = chosen[0]
    return {
        "pictures": pictures,
        "sentences": [dataset.captions[one.caption] for one in sorted(chosen, key=lambda one: one.caption)],
        "start": {
            "picture": start.picture,
            "sentence": dataset.captions[start.caption],
            "box": pictures[start.picture]["boxes"][smallest(boxes[start.picture])],
        },
    }


def smallest(boxes: Boxes) -> int:
    return int(np.argmin(boxes.areas))


def effects(bundle: Path, dataset: RetrievalDataset, boxes: list[Boxes]) -> list[Effect]:
    """For every caption: its picture's rank by ITC among all pictures without boxes, and with the one small box."""
    with Retriever.open(bundle) as retriever:
        texts = retriever.encode_texts(dataset.captions)
        plain = retriever.encode_images(dataset.images).query_sets.itc_scores(texts)  # [B, T]
        if not retriever.encoder.manifest.query_head.takes_boxes:
            boxed = plain
        else:
            one = [Boxes(given.xyxy[[smallest(given)]].round(), given.size) for given in boxes]
            boxed = retriever.encode_images(dataset.images, one).query_sets.itc_scores(texts)
    result = []
    for caption, picture in enumerate(map(int, dataset.image_of_caption)):
        before = 1 + int((plain[:, caption] > plain[picture, caption]).sum())
        others = np.delete(plain[:, caption], picture)
        result.append(Effect(caption, picture, before, 1 + int((others > boxed[picture, caption]).sum())))
    return result


if __name__ == "__main__":
    sys.exit(main())
