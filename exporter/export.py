"""`qpert export`: checkpoint → graphs → bundle.

checkpoint ─ trace ─ fold weights ─ passes ─┬─ onnx/*.onnx (+ weights written once)
           └─ geometry, settings ───────────┼─ onnx/preprocess.onnx, onnx/boxes.onnx
                                            ├─ tokenizer.json
           └─ PyTorch reference ────────────┴─ samples.safetensors, manifest.json
"""

from __future__ import annotations

import datetime
import importlib.metadata
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.checkpoint import Checkpoint
from qpert.exporter.checkpoints.locate import FILE_SUFFIXES
from qpert.exporter.families import find_family
from qpert.exporter.families.base import Family, Host
from qpert.exporter.families.declare import Limits
from qpert.exporter.host_graphs.tokenizer import self_contained
from qpert.exporter.host_graphs.write import write_host_graphs
from qpert.exporter.perturbation import graph_perturbation
from qpert.exporter.references.boxes import box_samples
from qpert.exporter.references.eager import TorchReference
from qpert.exporter.references.recording import CAPTIONS, InputMaker, record
from qpert.exporter.tracing.onnx_files import check_graph, write_graphs
from qpert.exporter.tracing.processes import TraceJob, traced_stages
from qpert.exporter.tracing.readable import require_onnxruntime
from qpert.exporter.tracing.shared_rows import name_shared_rows
from qpert.exporter.tracing.trace import PRECISIONS
from qpert.exporter.tracing.weights import WeightedGraph, fold_weights
from qpert.graphs.passes import run_passes
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.runtime.bundle import Bundle
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from qpert.runtime.bundle.roles import QUERY_HEAD
from qpert.runtime.bundle.staging import check_target, staged_folder
from qpert.runtime.errors import InputError, QpertWarning
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import Tokenizer
from qpert.runtime.inputs.token_grid import TokenGrid
from qpert.runtime.progress import Advance, Progress, Silent, byte_listener

TOOLS = ("qpert", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "tokenizers", "pillow", "numpy")


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for. `options`: the family's own. `samples`: distinct images recorded from PyTorch."""

    family: str
    checkpoint: str
    out: Path | None = None
    image_size: int | None = None
    tokenizer: str | None = None
    precision: str = "fp32"
    perturbation: Perturbation = field(default_factory=Perturbation)
    limits: Limits = field(default_factory=Limits)
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 2
    force: bool = False
    command: str = ""
    calibration: dict[str, Any] | None = None

    @property
    def target(self) -> Path:
        """The bundle's folder: `--out`, else `qpert-<family>-<checkpoint>-<precision>` in the working folder."""
        path = Path(self.checkpoint)
        stem = path.stem if path.suffix in FILE_SUFFIXES else path.name
        return self.out or Path(f"qpert-{self.family}-{stem}-{self.precision}")

    def check(self) -> None:
        """Raises InputError for what can be checked before any work is done."""
        if self.precision not in PRECISIONS:
            raise InputError(
                f"got precision {self.precision!r}, expected one of {', '.join(PRECISIONS)}", code="precision-unknown"
            )
        if self.samples < 2:
            raise InputError(
                f"got {self.samples} samples, expected at least 2: samples of one image cannot show rows mixed up",
                code="samples-too-few",
            )
        if self.image_size is not None and self.image_size < 1:
            raise InputError(
                f"got image size {self.image_size}, expected at least 1 pixel; leave it out for the checkpoint's own",
                code="export-image-size",
            )
        self.limits.check()
        stages = find_family(self.family).card.stages
        if self.perturbation.stages not in stages:
            raise InputError(
                f"--perturb is {self.perturbation.stages}, expected {' or '.join(stages)}: {self.family} "
                f"{'takes no boxes' if stages == ('none',) else 'has no other stage for boxes'}",
                code="perturb-unsupported",
            )
        check_target(self.target, force=self.force)

    @property
    def graph_perturbation(self) -> GraphPerturbation | None:
        return graph_perturbation(self.perturbation)


def export_bundle(request: ExportRequest, progress: Progress | None = None) -> Bundle:
    """Export one checkpoint to one bundle.

    Raises:
        InputError: the request is invalid, or the target exists.
        CheckpointError: the checkpoint cannot be read or is another architecture.
        UnavailableError: a download without a network, or a missing library.
    """
    progress = progress or Silent()
    request.check()
    require_onnxruntime()  # now, not after the tracing
    family = find_family(request.family)
    with open_with_progress(family, request, progress) as checkpoint:
        for note in checkpoint.notes:
            progress.say(note)
        with staged_folder(request.target, force=request.force) as folder:
            _Export(family, request, checkpoint, progress).write(folder)
    return Bundle.just_written(request.target)


@dataclass(frozen=True)
class RecordedProgress:
    """Forwards progress and keeps its messages, for the manifest."""

    progress: Progress
    lines: list[str] = field(default_factory=list)

    def stage(self, what: str, total: int | None = None, *, unit: str = "") -> AbstractContextManager[Advance]:
        return self.progress.stage(what, total, unit=unit)

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.progress.say(line)


def open_with_progress(family: Family, request: ExportRequest, progress: Progress) -> Checkpoint:
    with byte_listener(progress) as listen:
        return family.open(request.checkpoint, image_size=request.image_size, options=request.options, progress=listen)


@dataclass(frozen=True)
class _Export:
    """The export of one checkpoint."""

    family: Family
    request: ExportRequest
    checkpoint: Checkpoint
    progress: Progress

    def write(self, folder: Path) -> None:
        """Write the whole bundle, the manifest last."""
        request, checkpoint = self.request, self.checkpoint
        graphs = self.family.graphs(
            checkpoint.config,
            precision=request.precision,
            stages=request.perturbation.stages,
            limits=request.limits,
        )
        host = self.family.host(checkpoint, request.limits)
        grid = TokenGrid(*host.patches, host.patch_size, host.prefix_tokens, checkpoint.preprocessing)
        noted = RecordedProgress(self.progress)
        tokenizer = self_contained(self.family.tokenizer(checkpoint, request.tokenizer, noted), host.tokenizer)
        (folder / host.tokenizer.file).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        traced = trace_graphs(self.family, request, checkpoint, graphs, self.progress)
        weight_files = {name: self.family.card.weight_file(graph) for name, graph in graphs.items()}
        write_graphs(folder / "onnx", traced, weight_files, checkpoint.tensors, self.progress)
        for spec in graphs.values():
            check_graph(folder / spec.file, spec)
        head = next(spec for spec in graphs.values() if spec.role == QUERY_HEAD)
        host_graphs = write_host_graphs(folder, grid, request.perturbation, head)
        self.write_samples(folder, graphs, host, grid)
        manifest = self.manifest(folder, graphs, host, (*checkpoint.notes, *noted.lines))
        manifest = replace(manifest, host_graphs=host_graphs)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")

    def manifest(self, folder: Path, graphs: dict[str, GraphSpec], host: Host, notes: tuple[str, ...]) -> Manifest:
        request, checkpoint = self.request, self.checkpoint
        return Manifest(
            family=request.family,
            architecture=checkpoint.config.to_dict(),
            checkpoint=checkpoint.record,
            precision=request.precision,
            graphs=graphs,
            patches=host.patches,
            patch_size=host.patch_size,
            prefix_tokens=host.prefix_tokens,
            preprocessing=checkpoint.preprocessing,
            tokenizer=host.tokenizer,
            perturbation=request.perturbation,
            scores=host.scores,
            samples="samples.safetensors",
            tools=tool_versions(),
            command=request.command,
            calibration=request.calibration,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            notes=notes,
            files=hash_files(folder, self.progress),
        )

    def write_samples(self, folder: Path, graphs: dict[str, GraphSpec], host: Host, grid: TokenGrid) -> None:
        from safetensors.numpy import save_file

        request = self.request
        tokens = Tokenizer.open(folder / host.tokenizer.file, host.tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QpertWarning)  # these captions are not the user's and may be truncated
            token_ids = tuple((caption, tokens.encode([caption]).input_ids[0]) for caption in CAPTIONS)
        with self.progress.stage("recording reference outputs from PyTorch"):
            reference = TorchReference.open(self.family, self.checkpoint, graphs, request.graph_perturbation)
            maker = InputMaker(graphs, grid, host.tokenizer.vocab_size)
            boxes = box_samples(request.perturbation, grid)
            samples = record(reference, maker, images=request.samples, token_ids=token_ids, boxes=boxes)
        arrays, metadata = samples.to_arrays()
        path = folder / "samples.safetensors"
        save_file(arrays, str(path), metadata=metadata)
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def trace_graphs(
    family: Family,
    request: ExportRequest,
    checkpoint: Checkpoint,
    graphs: Mapping[str, GraphSpec],
    progress: Progress,
) -> dict[str, WeightedGraph]:
    """Trace every stage, fold its weights and run the passes; no weight is read."""
    job = TraceJob(request.family, checkpoint.config, request.graph_perturbation, request.precision, dict(graphs))
    with progress.stage("tracing graphs", total=len(graphs)) as advance:
        stages = traced_stages(job, family, advance)
    found = {}
    for name, spec in graphs.items():
        folded = fold_weights(stages[name].weighted())
        found[name] = WeightedGraph(name_shared_rows(run_passes(folded.graph), spec), folded.recipes)
    return found


def hash_files(folder: Path, progress: Progress) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with progress.stage("hashing", total=sum(path.stat().st_size for path in paths), unit="B") as advance:
        return {path.relative_to(folder).as_posix(): sha256_of(path, on_bytes=advance) for path in paths}


def tool_versions(*more: str) -> dict[str, str]:
    """Versions of the installed packages that shape the bundle; `more`: further packages."""
    found = {}
    for tool in (*TOOLS, *more):
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
