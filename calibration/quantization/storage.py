"""Write graphs to files in the layout of an export: weights in separate files, shared weights stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx

from qpert.calibration.graph_files import data_files

SMALL = 256
"""Largest constant, in bytes, that stays inside its graph's file."""
PAGE, CACHE_LINE = 4096, 64
LARGE = 1 << 18
"""Bytes from which a weight starts on its own page. Smaller ones are packed: a page per bias would take a twentieth of
a small bundle."""


def write_models(folder: Path, models: Mapping[str, onnx.ModelProto], locations: Mapping[str, str]) -> None:
    """Write `folder/<name>.onnx` and the data files that `locations` names for each graph.

    The models are changed: their weights then point to the files.
    """
    folder.mkdir(exist_ok=True)
    for location in dict.fromkeys(locations[name] for name in models):
        mine = [model for name, model in models.items() if locations[name] == location]
        with (folder / location).open("wb") as stream:
            store(stream, location, mine)
    for name, model in models.items():
        model.producer_name = "qpert"
        del model.graph.value_info[:]
        onnx.save_model(model, folder / f"{name}.onnx")
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)


def store(stream: BinaryIO, location: str, models: list[onnx.ModelProto]) -> None:
    """Move the weights of several graphs into one file; equal weights are stored once."""
    stored: dict[bytes, tuple[int, int]] = {}
    for model in models:
        for tensor in model.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) <= SMALL:
                continue
            key = hashlib.sha256(data).digest()
            if key not in stored:
                stream.write(b"\0" * (-stream.tell() % (PAGE if len(data) >= LARGE else CACHE_LINE)))
                stored[key] = (stream.tell(), len(data))
                stream.write(data)
            point_to(tensor, location, *stored[key])


def point_to(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    kept.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        kept.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(kept)


def data_location(path: Path) -> str:
    """The data file of a graph's weights."""
    found = data_files(onnx.load_model(path, load_external_data=False))
    if len(found) != 1:
        raise ValueError(f"{path} keeps its weights in {found}, expected one file")
    return found[0]
