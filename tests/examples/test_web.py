"""The page of `make web` in headless Chromium: it gives what the Python runtime gives, and it can be used.

Needs Node, the packages of examples/web and Chromium, which `make test-web` (or `make test-all`) installs; skips
elsewhere, with the reason. Screenshots go to a temporary folder, or to the one that QPERT_SCREENSHOTS names.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from qpert.exporter.families import find_family
from qpert.exporter.perturbation import graph_perturbation
from qpert.exporter.references.eager import TorchReference
from qpert.exporter.references.reopening import reopened
from qpert.runtime import Boxes, Retriever
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.errors import BundleError
from qpert.runtime.retrieval.scores import ranking

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "web"
PACKAGES = EXAMPLE / "node_modules"
CHROMIUM = shutil.which(os.environ.get("QPERT_CHROMIUM", "chromium"))
SCORES = 1e-5
"""Cosines of float32 vectors; WebAssembly sums in another order than the CPU's own kernels: 3e-7 on query vectors."""
SENTENCE = "A small red star in the upper left corner."


@pytest.fixture(scope="module")
def modules() -> Iterator[Callable]:
    """Imports the scripts of examples/web."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def bundle(made_once: Callable) -> Path:
    """The demonstration that the page shows. Not to be written to."""
    from qpert.runtime.cli import run

    command = ["export", "blip2", "--checkpoint", "demo-small-objects", "--out"]  # the command's own: calibrated
    return made_once("small-objects-bundle", lambda folder: run([*command, str(folder)]))


@pytest.fixture(scope="module")
def site(made_once: Callable, bundle: Path, modules: Callable) -> Path:
    """What `make web` makes, and WebGPU's files."""
    if shutil.which("node") is None:
        pytest.skip("Node is not on this machine")
    if not (PACKAGES / ".qpert").exists():
        pytest.skip("the packages of examples/web are not installed: run `make test-web`")
    build = modules("build").build
    return made_once("web-page", lambda out: build(out, bundle, PACKAGES, webgpu=True))


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    """The page on a server that does nothing but send files."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def box(site: Path) -> tuple[float, ...]:
    """Around the small thing that the page begins with, in shares of the picture's sides."""
    page = json.loads((site / "page.json").read_text())
    picture = page["pictures"][page["start"]["picture"]]
    sides = (picture["width"], picture["height"]) * 2
    return tuple(corner / side for corner, side in zip(page["start"]["box"], sides, strict=True))


@pytest.fixture(scope="module")
def browse(url: str, box: tuple[float, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Does one of the tasks of web_probe.mjs."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; QPERT_CHROMIUM can name one")
    folder = Path(os.environ.get("QPERT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)

    def run(task: str, **request: object) -> dict:
        given = {"task": task, "url": url, "chromium": CHROMIUM, "folder": str(folder), "box": box, **request}
        script = str(Path(__file__).with_name("web_probe.mjs"))
        done = subprocess.run(["node", script], input=json.dumps(given), capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def retriever(site: Path) -> Iterator[Retriever]:
    with Retriever.open(site / "bundle") as opened:
        yield opened


@pytest.fixture(scope="module")
def files(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Photographs, one of them lying on its side by EXIF, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = folder / "turned.jpg"
    Image.open(photos[0]).resize((300, 200)).save(turned, exif=exif, quality=92)
    cut, words = folder / "cut.jpg", folder / "words.png"
    cut.write_bytes(photos[0].read_bytes()[:30_000])
    words.write_text("no picture")
    return {"photographs": [*map(str, photos), str(turned)], "damaged": [str(cut), str(words)]}


@pytest.fixture(scope="module")
def used(browse: Callable, files: dict[str, list[str]]) -> dict:
    """One visit: a box drawn, the strength changed, a second box by keys, a sentence typed, photographs added."""
    return browse("use", sentence=SENTENCE, **files)


def gallery_file(site: Path, name: str) -> Path:
    (found,) = [one for one in (site / "gallery").iterdir() if one.stem == name]
    return found


def python_scores(
    retriever: Retriever, site: Path, seen: dict, files: dict | None = None, alpha: float | None = None
) -> np.ndarray:
    """What the Python runtime gives for everything that the page shows: ITC [pictures, sentences]."""
    added = {Path(file).name: Path(file) for file in files["photographs"]} if files else {}
    paths = [added.get(name) or gallery_file(site, name) for name in seen["names"]]
    boxes: list[Boxes | None] = [None] * len(paths)
    if seen["boxes"]:
        place = seen["names"].index(seen["picture"])
        with Image.open(paths[place]) as image:
            boxes[place] = Boxes(seen["boxes"], image.size)
    if alpha is not None:
        settings = replace(retriever.encoder.manifest.perturbation, alpha=alpha)
        with Retriever.open(site / "bundle", perturbation=settings) as other:
            return other.encode_images(paths, boxes).query_sets.itc_scores(other.encode_texts(seen["texts"]))
    return retriever.encode_images(paths, boxes).query_sets.itc_scores(retriever.encode_texts(seen["texts"]))


def assert_as_python(seen: dict, wanted: np.ndarray) -> None:
    """Scores, and the two lists as they stand on the page."""
    np.testing.assert_allclose(seen["scores"], wanted, atol=SCORES, rtol=0)
    row, column = wanted[seen["names"].index(seen["picture"])], wanted[:, seen["texts"].index(seen["sentence"])]
    assert [text for text, _, _ in seen["sentences"]] == [seen["texts"][i] for i in ranking(row)]
    order = [seen["names"][i] for i in ranking(column)]
    shown = [name for name, _ in seen["tiles"]]
    assert shown[:-1] == order[: len(shown) - 1]
    assert shown[-1] in (order[len(shown) - 1], seen["picture"])


def test_scores_and_order_are_those_of_python_before_a_box_is_drawn(used, retriever, site) -> None:
    assert used["stock"]["boxes"] == []
    assert_as_python(used["stock"], python_scores(retriever, site, used["stock"]))


def test_a_box_drawn_with_the_mouse_changes_the_order_as_python_says(used, retriever, site, box) -> None:
    drawn = used["drawn"]
    ((x1, y1, x2, y2),) = drawn["boxes"]
    with Image.open(gallery_file(site, drawn["picture"])) as image:
        width, height = image.size
    wanted = np.array(box) * [width, height, width, height]
    np.testing.assert_allclose([x1, y1, x2, y2], wanted, atol=1)  # the pointer is at a whole pixel of the screen
    assert_as_python(drawn, python_scores(retriever, site, drawn))
    assert [name for name, _ in drawn["tiles"]] != [name for name, _ in used["stock"]["tiles"]]
    assert "without boxes" in drawn["place"]
    changed = np.abs(np.subtract(drawn["scores"], used["stock"]["scores"])).max(axis=1) > SCORES
    assert [name for name, moved in zip(drawn["names"], changed, strict=True) if moved] == [drawn["picture"]]


def test_the_strength_is_the_alpha_of_python(used, retriever, site) -> None:
    alpha = used["stock"]["alpha"]
    assert used["weaker"]["alpha"] == alpha / 2
    assert_as_python(used["weaker"], python_scores(retriever, site, used["weaker"], alpha=alpha / 2))
    np.testing.assert_allclose(used["none"]["scores"], used["stock"]["scores"], atol=SCORES)


def test_keys_move_resize_and_remove_boxes_and_a_click_draws_none(used, retriever, site) -> None:
    first, second = used["two"]["boxes"]
    assert_as_python(used["two"], python_scores(retriever, site, used["two"]))
    step = 2  # a hundredth of the longer side of 240 pixels, rounded
    assert used["keys"]["boxes"] == [
        first,
        [second[0] + step, second[1] + step, second[2] + 2 * step, second[3] + 2 * step],
    ]
    assert used["deleted"]["boxes"] == [first]
    ((x1, y1, x2, y2),) = used["moved"]["boxes"]
    assert (x2 - x1, y2 - y1, y1) == (first[2] - first[0], first[3] - first[1], first[1])
    assert x1 < first[0] - 10
    assert used["clicked"]["boxes"] == used["moved"]["boxes"]


def test_a_typed_sentence_and_pairs_are_scored_as_python_does(used, retriever, site) -> None:
    typed = used["typed"]
    assert typed["sentence"] == SENTENCE
    assert_as_python(typed, python_scores(retriever, site, typed))
    path = gallery_file(site, typed["picture"])
    with Image.open(path) as image:
        features = retriever.encode_images([path], [Boxes(typed["boxes"], image.size)])
    wanted = retriever.itm_scores(features, typed["texts"])[0]
    np.testing.assert_allclose(used["itm"], wanted, atol=2e-5, rtol=0)  # logits of up to 10: float32 steps of 1e-6


def test_photographs_are_read_as_python_reads_them(used, retriever, site, files) -> None:
    """Colour profiles are not applied, EXIF orientation is."""
    seen = used["photographs"]
    assert seen["names"][-5:] == [Path(file).name for file in files["photographs"]]
    seen = {**seen, "picture": used["typed"]["picture"], "boxes": used["typed"]["boxes"]}
    np.testing.assert_allclose(seen["scores"], python_scores(retriever, site, seen, files), atol=SCORES, rtol=0)


def test_what_cannot_be_used_is_said_and_changes_nothing(used, files) -> None:
    cut, words = files["damaged"]
    assert used["notes"][cut] == "cut.jpg is cut off: its end is missing. Take the whole file"
    assert used["notes"][words].startswith("words.png is broken or no picture that this browser can read")
    assert "49999 characters; expected at most 10000" in used["notes"]["10,000 words"]
    assert used["after"]["names"] == used["photographs"]["names"]
    assert used["after"]["texts"] == used["typed"]["texts"]


def test_loading_shows_progress_and_nothing_comes_from_elsewhere(used, url) -> None:
    shares = [share for text, share in used["steps"] if text == "Getting the model…" and share is not None]
    assert len({round(share, 2) for share in shares}) >= 5
    assert shares == sorted(shares)
    assert {text for text, _ in used["steps"]} >= {"Getting the model…", "Looking at the pictures…"}
    assert {one for one in used["requests"] if not one.startswith((url, "blob:", "data:"))} == set()
    assert used["errors"] == []
    assert used["isolated"] is False, "no special headers were needed"


def test_attention_is_what_the_graph_gives(used, site, retriever) -> None:
    """The page's two figures: the share of attention on the box without and with it, over layers, heads and queries."""
    drawn = used["drawn"]
    path = gallery_file(site, drawn["picture"])
    with Image.open(path) as image:
        boxes = Boxes(drawn["boxes"], image.size)
    features = retriever.encode_images([path], [boxes])
    slots = retriever.encoder.box_slots([boxes])
    session = attention_session(site)
    mask = slots["object_masks"][0, 0]
    shares = []
    for weights in (np.zeros_like(slots["box_weights"]), slots["box_weights"]):
        inputs = {"image_embeds": features.image_embeds, "object_masks": slots["object_masks"], "box_weights": weights}
        (attention,) = session.run(["attention"], inputs)
        shares.append(float((attention[0].mean(axis=(0, 1, 2)) * mask).sum()))
    np.testing.assert_allclose(drawn["shares"], shares, atol=1e-5)
    assert abs(shares[1] - shares[0]) > 1e-3
    assert used["match"]["shares"] != drawn["shares"]


def attention_session(site: Path) -> onnxruntime.InferenceSession:
    page = json.loads((site / "page.json").read_text())
    options = onnxruntime.SessionOptions()
    folder = str(site / "bundle" / "onnx")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    graph = (site / page["attention"]["file"]).read_bytes()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def test_the_attention_graph_gives_pytorchs_probabilities_and_the_same_vectors(site, bundle, retriever, photos) -> None:
    """Against softmax(qKᵀ/√d) of the PyTorch model's own queries and keys, with the perturbation of the float64 oracle;
    5e-5: logits of up to 100, since boxes of weight 8 lengthen queries, carry float32 errors of 1e-5."""
    slots = retriever.encoder.box_slots([some_boxes(photo) for photo in photos[:2]])
    inputs = {"image_embeds": retriever.encode_images(photos[:2]).image_embeds, **slots}
    attention, vectors = torch_attention(retriever.encoder.manifest, inputs)
    session = attention_session(site)
    found, query_embeds = session.run(["attention", "query_embeds"], inputs)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(query_embeds, vectors, atol=2e-5)
    np.testing.assert_allclose(found, attention, atol=5e-5)
    graph = onnxruntime.InferenceSession(bundle / "onnx" / "image_query.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(graph.run(["query_embeds"], inputs)[0], query_embeds, atol=1e-6)


def test_a_graph_without_cross_attention_is_refused(bundle, modules, retriever, tmp_path) -> None:
    head = replace(retriever.encoder.manifest.query_head, file="onnx/text.onnx")
    with pytest.raises(BundleError, match="no softmax of 16 queries over 65 image tokens"):
        modules("attention").write_attention_graph(bundle, head, tmp_path / "attention.onnx")
    assert not (tmp_path / "attention.onnx").exists()


def some_boxes(photo: Path) -> Boxes:
    with Image.open(photo) as image:
        width, height = image.size
    return Boxes([[10, 20, width / 3, height / 2], [width / 2, 5, width - 3, height / 4]], (width, height))


def torch_attention(manifest: Manifest, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[B, layers, heads, Q, N] and query vectors [B, Q, E] of the PyTorch model, from the checkpoint itself."""
    found: list[torch.Tensor] = []

    def kernel(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        found.append(torch.softmax(queries.double() @ keys.double().mT / keys.shape[-1] ** 0.5, dim=-1))
        return found[-1].to(values.dtype) @ values

    family = find_family(manifest.family)
    with reopened(family, manifest, None) as checkpoint:
        settings = graph_perturbation(manifest.perturbation)
        reference = TorchReference.open(family, checkpoint, manifest.graphs, settings)
        for layer in reference.network.Qformer.cross_attentions:
            layer.kernel = kernel
        vectors = reference.run(manifest.query_head.name, inputs)
    return torch.stack(found, dim=1).numpy(), vectors["query_embeds"]


def test_a_telephone_shows_everything_and_takes_a_finger(browse, retriever, site) -> None:
    seen = browse("phone")
    assert seen["overflow"] == [0, 0]
    assert seen["small"] == [], "targets for a finger are at least 24 pixels high"
    assert len(seen["drawn"]["boxes"]) == 1
    assert_as_python(seen["drawn"], python_scores(retriever, site, seen["drawn"]))
    assert seen["errors"] == []


def test_failures_are_said_and_can_be_tried_again(browse, site) -> None:
    manifest = (site / "bundle" / "manifest.json").read_text()
    failures = {
        "missing": {"file": "bundle/onnx/qformer.data", "status": 404, "body": ""},
        "damaged": {"file": "bundle/onnx/qformer.data", "status": 200, "body": "x" * 100},
        "newer": {
            "file": "bundle/manifest.json",
            "status": 200,
            "body": manifest.replace('"schema_version": 2', '"schema_version": 9'),
        },
        "offline": {"file": "vendor/*.wasm", "status": 0, "body": ""},
    }
    seen = browse("failures", failures=failures, retry="missing")
    assert {one["state"] for name, one in seen.items() if name in failures} == {"failed"}
    assert "bundle/onnx/qformer.data could not be loaded (the server says 404)" in seen["missing"]["text"]
    assert seen["missing"]["again"] is True
    assert "onnx/qformer.data of the bundle is damaged" in seen["damaged"]["text"]
    assert "schema version 9, this program reads up to 2" in seen["newer"]["text"]
    assert ".wasm could not be loaded" in seen["offline"]["text"]


def test_webgpu_gives_the_same_where_there_is_an_adapter(browse, retriever, site) -> None:
    """1e-4: an adapter may use other instructions, SwiftShader differs by 4e-6 on image tokens."""
    seen = browse("webgpu")
    if not seen["adapter"]:
        pytest.skip("this Chromium has no WebGPU adapter, not even SwiftShader's")
    assert seen["state"] == "ready", seen.get("text")
    np.testing.assert_allclose(
        seen["drawn"]["scores"], python_scores(retriever, site, seen["drawn"]), atol=1e-4, rtol=0
    )
