"""Bundles whose files are links, as Hugging Face's cache and `cp --link` make them: the onnx library refuses those."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from evaluation_sets import write_set

from qpert.calibration.graph_files import copy_graph, data_files, load_graph
from qpert.calibration.perturbation.split_graph import split_query_head
from qpert.calibration.quantization.build import QuantizeRequest, quantize_bundle
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import QUERY_HEAD

LINKS: dict[str, Callable[[str, str], None]] = {"hard": os.link, "symbolic": os.symlink}


@pytest.fixture(params=LINKS)
def linked(request, tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of links to the files of a copy, laid out as in the hub's cache."""
    repository = tmp_path / "models--someone--something"
    blobs, folder = repository / "blobs", repository / "snapshots" / "1234abcd"
    shutil.copytree(tiny_bundle, blobs)
    shutil.copytree(blobs, folder, copy_function=LINKS[request.param])
    return folder


def weights(model: onnx.ModelProto) -> dict[str, bytes]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}


def test_weights_behind_links_are_read(linked: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    path = linked / "onnx" / "image_query.onnx"
    with pytest.raises(onnx.checker.ValidationError, match="link"):
        onnx.load(path)  # what this is about; if onnx ever reads links, graph_files.py can go
    shutil.copytree(tiny_bundle / "onnx", tmp_path / "plain")
    plain = onnx.load(tmp_path / "plain" / "image_query.onnx")
    assert data_files(onnx.load_model(path, load_external_data=False)) == ["qformer.data"]
    assert weights(load_graph(path)) == weights(plain)
    (tmp_path / "copied").mkdir()
    assert weights(onnx.load(copy_graph(path, tmp_path / "copied"))) == weights(plain)


def test_a_linked_bundle_is_quantised_and_its_query_head_cut(linked: Path, tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", 16, split="val")
    out = tmp_path / "int8"
    request = QuantizeRequest(linked, out, graphs=("vision",), dataset=str(data), samples=16, sensitivity=False)
    made = quantize_bundle(replace(request, max_drop=100.0, min_agreement=0.0))
    assert all(state.ok for state in made.check_files())
    head = Bundle.open(linked).manifest.graph(QUERY_HEAD)
    (tmp_path / "parts").mkdir()
    split_query_head(linked / "onnx" / "image_query.onnx", head, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.onnx"))) == 3
