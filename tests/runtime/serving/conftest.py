"""One service with a gallery of the photographs for the tests that change nothing, and the runtime beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_service import RunningService, running

from qpert.runtime import Retriever
from qpert.runtime.cli import run

CAPTIONS = ("a cup of coffee", "a rocket at night", "an astronaut in an orange suit", "a cat that looks at you")


@pytest.fixture(scope="session")
def photo_gallery(demo_bundle: Path, photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs with their boxes and one caption each, indexed by `qpert index`. Not to be written to."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "images").mkdir()
    for photo in photos:
        (folder / "images" / photo.name).write_bytes(photo.read_bytes())
    annotation = [
        {"image": f"images/{photo.name}", "caption": [text]} for photo, text in zip(photos, CAPTIONS, strict=True)
    ]
    (folder / "annotation.json").write_text(json.dumps(annotation))
    boxes = photos[0].parent / "boxes.jsonl"
    lines = [json.loads(line) for line in boxes.read_text().splitlines()]
    (folder / "boxes.jsonl").write_text(
        "\n".join(json.dumps(line | {"image": f"images/{line['image']}"}) for line in lines)
    )
    arguments = ["index", str(demo_bundle), str(folder / "annotation.json"), "--out", str(folder / "gallery")]
    assert run([*arguments, "--boxes", str(folder / "boxes.jsonl")]) == 0
    return folder / "gallery"


@pytest.fixture(scope="session")
def service(demo_bundle: Path, photo_gallery: Path) -> Iterator[RunningService]:
    with running(demo_bundle, "--gallery", photo_gallery) as found:
        yield found


@pytest.fixture(scope="session")
def retriever(demo_bundle: Path) -> Iterator[Retriever]:
    """The runtime in this process: what the service has to equal."""
    with Retriever.open(demo_bundle, threads=1) as found:
        yield found
