"""A detector whose raw outputs are known numbers (see `raw_yolox`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from raw_yolox import export_raw_yolox


@pytest.fixture(scope="session")
def known_detector(made_once: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In every picture a cup and a star in one place (IoU 1), and a bus. Not to be written to."""
    work = tmp_path_factory.mktemp("raw-yolox")
    return made_once("known-detector", lambda out: export_raw_yolox(work, out))


@pytest.fixture
def four_pictures(tmp_path: Path) -> Path:
    """A folder of pictures of 64×64, 128×64, 64×128 and 32×32 pixels, one in a folder below it."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size in {"a.png": (64, 64), "b.png": (128, 64), "c.png": (64, 128), "more/a.png": (32, 32)}.items():
        Image.new("RGB", size, (40, 90, 200)).save(folder / name)
    return folder
