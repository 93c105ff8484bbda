"""What the whole suite shares. Tracing takes long, so bundles are exported once; tests that damage one take a copy.

`make test` runs the suite in several processes (pytest-xdist, whole files at a time). `made_once` is what they share.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the workers share the cores

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from tiny_model import OPTIONS, THRESHOLD, VOCABULARY, tiny_checkpoint

settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")
"""Hypothesis's 200 ms for each example, and its limit on drawing them, depend on the machine's load."""

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


OTHER_ENVIRONMENTS = {"lavis_folder", "open_clip_python", "postgres"}
"""Fixtures that skip where an environment of its own is missing (`make lavis-env` and the like)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs an environment that `make test` does not make is slow: `make test-all` makes it first."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        needs = OTHER_ENVIRONMENTS & {*getattr(item, "fixturenames", ())}
        marked = item.get_closest_marker("lavis") or item.get_closest_marker("open_clip")
        if needs or marked or any(isinstance(one, str) and one == "postgresql" for one in parameters):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def quiet_torch() -> None:
    """torch.export writes thousands of lines for tools that are not here; a failing test would print them all."""
    import torch  # noqa: F401, sets the logger up

    logging.getLogger("torch.__trace").disabled = True


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that the user has cached is read or written."""
    before = os.environ.get("QPERT_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["QPERT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["QPERT_CACHE"]
    else:
        os.environ["QPERT_CACHE"] = before


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: the path that `make(path)` filled, in whichever process of this run came first."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            done = root / f"{name}.done"
            if not done.exists():
                shutil.rmtree(root / name, ignore_errors=True)  # of a process that failed halfway
                make(root / name)
                done.touch()
        return root / name

    return make_once


@pytest.fixture(scope="session")
def demo_bundle(made_once: Callable) -> Path:
    """The demonstration checkpoint with default settings. Not to be written to."""
    from qpert.exporter.export import ExportRequest, export_bundle

    return made_once("demo-bundle", lambda folder: export_bundle(ExportRequest("blip2", "demo", folder)))


@pytest.fixture(scope="session")
def both_bundle(made_once: Callable) -> Path:
    """The demonstration checkpoint with `--perturb both`. Not to be written to."""
    from qpert.exporter.export import ExportRequest, export_bundle
    from qpert.exporter.families.declare import Limits
    from qpert.runtime.inputs.perturbation import Perturbation

    limits = Limits(batch=3, boxes=8, texts=9)  # verification takes as long as the largest batch is large
    settings = {"perturbation": Perturbation(stages="both"), "limits": limits}
    return made_once("both-bundle", lambda folder: export_bundle(ExportRequest("blip2", "demo", folder, **settings)))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.pth")


@pytest.fixture(scope="session")
def traced(own_cache: Path, tiny_weights: Path) -> Iterator[dict]:
    """The graphs of every export of the tiny model with keys as they are, by stages and precision."""
    import qpert.exporter.export as module

    found, trace_graphs = {}, module.trace_graphs

    def recorder(family, request, *arguments):
        graphs = trace_graphs(family, request, *arguments)
        if request.checkpoint == str(tiny_weights) and not request.perturbation.centre_keys:
            found[request.perturbation.stages, request.precision] = graphs
        return graphs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace_graphs", recorder)
        yield found


@pytest.fixture(scope="session")
def export_tiny(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, traced: dict) -> Callable[..., Path]:
    """Exports the tiny model with the given fields of `ExportRequest` into a new folder."""
    from qpert.exporter.export import ExportRequest, export_bundle
    from qpert.exporter.families.declare import Limits

    def export(**fields) -> Path:
        settings = {"limits": Limits(3, 4, 6, 12), "tokenizer": str(VOCABULARY), "options": OPTIONS} | fields
        out = tmp_path_factory.mktemp("tiny-bundle") / "bundle"
        return export_bundle(ExportRequest("blip2", str(tiny_weights), out, **settings)).folder

    return export


@pytest.fixture(scope="session")
def tiny_bundle(export_tiny: Callable[..., Path]) -> Path:
    """The tiny model, `--perturb both`, with small limits: quick to verify. Not to be written to."""
    from qpert.runtime.inputs.perturbation import Perturbation

    return export_tiny(perturbation=Perturbation(stages="both", threshold=THRESHOLD))


@pytest.fixture(scope="session")
def export_again(tiny_bundle: Path, tiny_weights: Path, traced: dict) -> Callable[..., Path]:
    """Exports what `tiny_bundle` is once more to a given folder, without tracing once more: the rest is quick."""
    import qpert.exporter.export as module
    from qpert.exporter.families.declare import Limits
    from qpert.runtime.inputs.perturbation import Perturbation

    graphs = traced["both", "fp32"]

    def export(out: Path, **fields) -> Path:
        settings = {"limits": Limits(3, 4, 6, 12), "tokenizer": str(VOCABULARY), "options": OPTIONS} | fields
        perturbation = Perturbation(stages="both", threshold=THRESHOLD)
        request = module.ExportRequest("blip2", str(tiny_weights), out, perturbation=perturbation, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "trace_graphs", lambda *arguments: graphs)
            return module.export_bundle(request).folder

    return export


@pytest.fixture(scope="session")
def half_bundle(export_tiny: Callable[..., Path]) -> Path:
    """The tiny model in fp16 with `--perturb both --preserve-norm`. Not to be written to."""
    from qpert.runtime.inputs.perturbation import Perturbation

    perturbation = Perturbation(stages="both", threshold=THRESHOLD, preserve_norm=True)
    return export_tiny(precision="fp16", perturbation=perturbation)


@dataclass(frozen=True)
class CommandResult:
    """What one command line did."""

    code: int
    out: str
    err: str
    folder: Path


@pytest.fixture(scope="session")
def stock_export(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> CommandResult:
    """`qpert export blip2 --perturb none --json` of the tiny model, and the bundle that it made."""
    import contextlib
    import io

    from qpert.runtime.cli import run

    folder = tmp_path_factory.mktemp("stock") / "bundle"
    out, err = io.StringIO(), io.StringIO()
    arguments = ["export", "blip2", "--checkpoint", str(tiny_weights), "--tokenizer", str(VOCABULARY)]
    arguments += ["--vision-heads", "2", "--qformer-heads", "2", "--perturb", "none", "--max-batch", "3"]
    arguments += ["--max-text", "6", "--max-length", "12", "--out", str(folder), "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    return CommandResult(code, out.getvalue(), err.getvalue(), folder)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a bundle, to be damaged."""

    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="session")
def edit_manifest() -> Callable[..., None]:
    """Changes a bundle's manifest: `edit(folder, lambda values: …)`."""

    def edit(folder: Path, change: Callable[[dict], object]) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    return sorted(PHOTOS.glob("*.jpg"))


@pytest.fixture(scope="session")
def photo_boxes(photos: list[Path]) -> list:
    """The boxes of the photographs, made by hand, as `Boxes`."""
    from PIL import Image

    from qpert.runtime.inputs.box_files import read_box_file

    table = read_box_file(PHOTOS / "boxes.jsonl")
    return [table.for_image(photo.name, Image.open(photo).size) for photo in photos]


@pytest.fixture(scope="session")
def random_pictures() -> Callable[[int], list[np.ndarray]]:
    """So many different small pictures."""

    def make(count: int) -> list[np.ndarray]:
        rng = np.random.default_rng(3)
        return [rng.integers(0, 256, (40 + 3 * i, 60 - 2 * i, 3), dtype=np.uint8) for i in range(count)]

    return make
