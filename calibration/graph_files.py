"""Read the ONNX files of a bundle with their weights, also where a data file is a link.

The onnx library refuses external data behind a symbolic link or with several hard links as a possible attack. Hugging
Face's cache, `cp --link` and file systems without duplicates make such files, and a bundle's files are hashed when it
is opened, so they are copied to a temporary folder and read there.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import onnx


def load_graph(path: Path) -> onnx.ModelProto:
    """A graph with its weights in memory and all shapes inferred.

    Raises:
        onnx.checker.ValidationError, OSError, ValueError: the file or its weights cannot be read.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_model(path, load_external_data=False))
    files = [path.parent / name for name in data_files(model)]
    if not any(is_link(file) for file in files):
        onnx.load_external_data_for_model(model, str(path.parent))
        return model
    with tempfile.TemporaryDirectory(prefix="qpert-linked-") as folder:
        for name in data_files(model):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / name, Path(folder) / name)
        onnx.load_external_data_for_model(model, folder)
    return model


def copy_graph(path: Path, folder: Path) -> Path:
    """Copy a graph and its data files, links followed, into `folder`; files that are there already stay.

    Returns:
        The graph's file there.
    """
    for name in (path.name, *data_files(onnx.load_model(path, load_external_data=False))):
        if not (folder / name).exists():
            shutil.copyfile(path.parent / name, folder / name)
    return folder / path.name


def data_files(model: onnx.ModelProto) -> list[str]:
    """The names of the files that hold a graph's weights, relative to the graph's folder."""
    return sorted(
        {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    )


def is_link(file: Path) -> bool:
    return file.is_symlink() or (file.is_file() and file.stat().st_nlink > 1)
