"""What hostile inputs are given to: each function takes one input and may raise a `QpertError`, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qpert.runtime import Retriever
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.inputs.box_files import read_box_file
from qpert.runtime.inputs.datasets import read_dataset
from qpert.runtime.retrieval.encoder import Encoder
from soak import inputs

SIZE = (31, 24)


@dataclass(frozen=True)
class Target:
    """One kind of input: how it is made up, and what it is given to."""

    name: str
    strategy: st.SearchStrategy[Any]
    run: Callable[[Any], object]


class Bench:
    """The targets over one small bundle, opened once. Files are written into `folder`."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.retriever = Retriever.open(bundle, threads=1)
        self.folder = folder
        self.picture = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        self.features = self.retriever.encode_images([self.picture])
        self.wrong = Path(shutil.copytree(bundle, folder / "bundle"))
        self.dataset = folder / "dataset"
        (self.dataset / "annotations").mkdir(parents=True)
        (self.dataset / "images").mkdir()
        for name in ("a.jpg", "b.jpg"):
            (self.dataset / "images" / name).write_bytes(inputs.picture_files()[0])

    def targets(self) -> list[Target]:
        manifest = (self.wrong / "manifest.json").read_bytes()
        return [
            Target("image files", inputs.mutations(inputs.picture_files()), self.image_file),
            Target("image arrays", inputs.ARRAYS, self.image_array),
            Target("box files", inputs.box_documents(), self.box_file),
            Target("captions", st.lists(inputs.TEXT | inputs.JSON, max_size=4), self.captions),
            Target("annotations", inputs.ANNOTATIONS, self.annotation),
            Target("manifests", inputs.manifests(manifest), self.manifest),
        ]

    def image_file(self, data: bytes) -> None:
        path = self.folder / "picture"
        path.write_bytes(data)
        features = self.retriever.encode_images([path])
        assert np.isfinite(features.query_embeds).all()

    def image_array(self, array: np.ndarray) -> None:
        assert np.isfinite(self.retriever.encode_images([array]).query_embeds).all()

    def box_file(self, document: tuple[str, bytes]) -> None:
        extension, data = document
        path = self.folder / f"boxes{extension}"
        path.write_bytes(data)
        table = read_box_file(path)
        for name in ("a.jpg", *table.images[:2]):
            features = self.retriever.encode_images([self.picture], [table.for_image(name, SIZE)])
            assert np.isfinite(features.query_embeds).all()

    def captions(self, texts: list[Any]) -> None:
        assert np.isfinite(self.retriever.encode_texts(texts)).all()
        assert np.isfinite(self.retriever.itm_scores(self.features, texts)).all()

    def annotation(self, data: bytes) -> None:
        (self.dataset / "annotations" / "test.json").write_bytes(data)
        found = read_dataset(self.dataset, "test", entities=False)
        assert len(found.captions) == len(found.image_of_caption) >= len(found) >= 1

    def manifest(self, data: bytes) -> None:
        (self.wrong / "manifest.json").write_bytes(data)
        encoder = Encoder(Bundle.open(self.wrong), "cpu", threads=1)
        try:
            encoder.encode_images([self.picture])
            encoder.encode_texts(["a dog"])
        finally:
            encoder.close()

    def close(self) -> None:
        self.retriever.close()
