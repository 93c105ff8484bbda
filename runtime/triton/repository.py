"""Writing a model repository from a bundle."""

from __future__ import annotations

import mmap
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import MANIFEST_NAME
from qpert.runtime.bundle.staging import scratch_folder, swap_in
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.files import write_atomically
from qpert.runtime.sessions.tensorrt.engines import Engine, changed_sources, find_engines
from qpert.runtime.triton.config import ModelConfig, graph_inputs, graph_outputs
from qpert.runtime.triton.plan import HOST_MODELS, HostPlan, batch_limit

Backend = Literal["onnxruntime", "tensorrt", "python"]
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "tensorrt", "python")
VERSION = "1"
MODEL_FILE = "model.onnx"

MODEL_PY = '''"""Written by `qpert package`. Triton's Python needs: pip install 'qpert[cpu]'"""

from qpert.runtime.triton.models import {name} as TritonPythonModel
'''


@dataclass(frozen=True)
class Repository:
    """What was written: the models by name, and how many bytes shared weights save as hard links."""

    folder: Path
    backend: Backend
    models: tuple[str, ...]
    bytes: int
    linked_bytes: int


def write_repository(
    bundle: Bundle, out: Path, *, backend: Backend = "onnxruntime", gpu: bool = False, threads: int = 1
) -> Repository:
    """Write a model repository for Triton; `out` appears whole or not at all.

    Args:
        bundle: it is copied; the repository needs it no more.
        out: the repository's folder, which may not exist.
        backend: what runs the graphs. `onnxruntime` and `tensorrt` are in NVIDIA's image; `python` runs ONNX Runtime in
            Triton's Python, wherever qpert is installed there.
        gpu: graphs run on GPUs (`tensorrt` always does).
        threads: CPU threads of an operator.

    Weights that graphs share are one file with several names (hard links) inside the repository, never with a file
    of the bundle: the onnx library refuses to read weights that have other names, so a link to the bundle would make it
    unusable for export tools. Where the file system has no hard links, they are copied.

    Raises:
        InputError: `out` exists, or a tensor's type is none of Triton's.
        UnavailableError: `tensorrt`, and the bundle has no engine of TensorRT for its graphs.
    """
    if out.exists():
        raise InputError(f"{out} exists; delete it, or choose another --out", code="out-exists")
    engines = classic_engines(bundle) if backend == "tensorrt" else []
    host = HostPlan(bundle.manifest)
    with scratch_folder(out) as staging:
        writer = _Writer(bundle, staging)
        for graph in bundle.manifest.graphs.values():
            writer.graph(graph, backend, engines, gpu=gpu or backend == "tensorrt", threads=threads)
        for model in host.models():
            writer.host(model)
        swap_in(staging, out)
    names = tuple(sorted(path.name for path in out.iterdir()))
    return Repository(out, backend, names, writer.copied, writer.linked)


def classic_engines(bundle: Bundle) -> list[Engine]:
    """The bundle's engines that Triton's backend can load, the oldest first.

    Raises:
        UnavailableError: there is none of the graphs as they are now.
    """
    found = [engine for engine in find_engines(bundle) if engine.record.flavor == "classic"]
    graphs = set(bundle.manifest.graphs)
    fitting = [e for e in found if graphs <= set(e.record.graphs) and not changed_sources(e.record, bundle.manifest)]
    if not fitting:
        raise UnavailableError(
            f"{bundle.folder} has no TensorRT engines of all its graphs (Triton's backend loads those of classic "
            "TensorRT, of the version in its image); build them with: qpert build … --flavor classic, or package it "
            "with --backend onnxruntime",
            code="engine-missing",
        )
    return sorted(fitting, key=lambda engine: engine.record.created)


class _Writer:
    """Models into a folder; `copied` and `linked` count bytes."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.copied = self.linked = 0
        self._placed: dict[Path, Path] = {}

    def graph(self, graph: GraphSpec, backend: Backend, engines: list[Engine], *, gpu: bool, threads: int) -> None:
        config = ModelConfig(
            graph.name, backend, batch_limit(graph), graph_inputs(graph), graph_outputs(graph), on_gpu=gpu
        )
        version = self._model(graph.name)
        if backend == "tensorrt":
            config = self._engines(config, graph, engines, version)
        else:
            self._onnx(graph, version)
        if backend == "onnxruntime":
            threading = {} if gpu else {"intra_op_thread_count": str(threads)}
            config = replace(config, file=MODEL_FILE, parameters=threading)
        if backend == "python":
            provider = "cuda" if gpu else "cpu"
            config = replace(config, parameters={"provider": provider, "threads": str(threads)})
            self._python(version, "Graph")
        write_atomically(self.folder / graph.name / "config.pbtxt", config.text())

    def host(self, model: ModelConfig) -> None:
        version = self._model(model.name)
        if model.name in HOST_MODELS:
            self._python(version, "".join(word.capitalize() for word in model.name.split("_")))
            tokenizer = self.bundle.manifest.tokenizer.file
            self._place(self.bundle.path(tokenizer), version / Path(tokenizer).name)
        write_atomically(self.folder / model.name / "config.pbtxt", model.text())

    def _model(self, name: str) -> Path:
        version = self.folder / name / VERSION
        version.mkdir(parents=True)
        return version

    def _python(self, version: Path, name: str) -> None:
        write_atomically(version / "model.py", MODEL_PY.format(name=name))
        self._place(self.bundle.folder / MANIFEST_NAME, version / MANIFEST_NAME)

    def _onnx(self, graph: GraphSpec, version: Path) -> None:
        source = self.bundle.graph_path(graph)
        self._place(source, version / MODEL_FILE)
        for name in self.bundle.manifest.files:
            weights = self.bundle.path(name)
            if weights.parent == source.parent and weights.suffix != ".onnx" and mentions(source, weights.name):
                self._place(weights, version / weights.name)

    def _engines(self, config: ModelConfig, graph: GraphSpec, engines: list[Engine], version: Path) -> ModelConfig:
        """One engine a GPU architecture, the newest; requests are limited to what the narrowest takes."""
        files: dict[str, str] = {}
        most = config.most
        for engine in engines:
            target = f"{engine.record.target}.plan"
            self._place(engine.require(graph.name), version / target)
            files |= {compute_capability(name): target for name in engine.record.architectures}
            largest = engine.record.graphs[graph.name].profile[graph.inputs[-1].name][-1]
            most = min(most, largest[0])
        return replace(config, most=most, file=next(reversed(files.values())), files=files)

    def _place(self, source: Path, target: Path) -> None:
        """A copy of a file of the bundle; a hard link to the first copy where there is one already."""
        size = source.stat().st_size
        first = self._placed.setdefault(source, target)
        if first != target:
            try:
                os.link(first, target)
            except OSError:  # a file system without hard links
                pass
            else:
                self.linked += size
                return
        shutil.copyfile(source, target)
        target.chmod(0o644)
        self.copied += size


def mentions(onnx_file: Path, name: str) -> bool:
    """Whether an ONNX file names a file of external data: protobuf stores strings as they are."""
    with onnx_file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


def compute_capability(architecture: str) -> str:
    """`sm89` → `8.9`, `sm120` → `12.0`."""
    digits = architecture.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"
