"""`qpert export`: checkpoint → graphs → bundle.

checkpoint ─ trace ─ fold weights ─ passes ─┬─ onnx/*.onnx (+ weights written once)
                                            ├─ tokenizer.json
           └─ PyTorch reference ────────────┴─ samples.safetensors, manifest.json
"""

from __future__ import annotations

import datetime
import importlib.metadata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qpert.exporter.checkpoints.open import Checkpoint, open_checkpoint
from qpert.exporter.checkpoints.tokenizer import build_tokenizer, save_tokenizer
from qpert.exporter.checkpoints.tokenizer_source import find_tokenizer
from qpert.exporter.families.blip2.architecture import ArchitectureOptions
from qpert.exporter.families.blip2.graph_specs import Limits, signatures
from qpert.exporter.references.boxes import box_samples
from qpert.exporter.references.eager import TorchReference
from qpert.exporter.references.recording import CAPTIONS, InputMaker, record
from qpert.exporter.tracing.onnx_files import check_graph, write_graphs
from qpert.exporter.tracing.trace import PRECISIONS, hollow_model, trace
from qpert.exporter.tracing.weights import WeightedGraph, fold_weights
from qpert.graphs.families.blip2.model import GraphPerturbation
from qpert.graphs.passes import run_passes
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.manifest import MANIFEST_NAME, GraphSpec, Manifest, TokenizerSpec
from qpert.runtime.bundle.staging import check_target, staged_folder
from qpert.runtime.errors import InputError, QpertWarning
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.images import ImagePreprocessing
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import Tokenizer
from qpert.runtime.progress import Progress, Silent, byte_listener
from qpert.runtime.retrieval.scores import SCORE_FORMULAS

TOOLS = ("qpert", "torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "tokenizers", "pillow", "numpy")


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for. `samples`: distinct pictures recorded from PyTorch, 2 at least."""

    checkpoint: str = "demo"
    out: Path | None = None
    image_size: int | None = None
    tokenizer: str | None = None
    precision: str = "fp32"
    perturbation: Perturbation = field(default_factory=Perturbation)
    limits: Limits = field(default_factory=Limits)
    options: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    samples: int = 2
    force: bool = False
    command: str = ""

    @property
    def target(self) -> Path:
        """Where the bundle goes: `--out`, else `qpert-blip2-<checkpoint>-<precision>` in the working folder."""
        stem = Path(self.checkpoint).name.removesuffix(".pth").removesuffix(".safetensors")
        return self.out or Path(f"qpert-blip2-{stem}-{self.precision}")

    def check(self) -> None:
        """Raises InputError for what can be refused before any work is done."""
        if self.precision not in PRECISIONS:
            raise InputError(f"got precision {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.samples < 2:
            raise InputError(f"got {self.samples} samples, expected at least 2: a row needs a neighbour that differs")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(
                f"got image size {self.image_size}, expected pixels; leave it out for the checkpoint's own"
            )
        check_target(self.target, force=self.force)

    @property
    def graph_perturbation(self) -> GraphPerturbation | None:
        if self.perturbation.stages == "none":
            return None
        return GraphPerturbation(self.perturbation.threshold, self.perturbation.preserve_norm)


def export_bundle(request: ExportRequest, progress: Progress | None = None) -> Bundle:
    """Export one checkpoint to one bundle.

    Raises:
        InputError: the request cannot be met as it stands, an existing target included.
        CheckpointError: the checkpoint cannot be read or is not this architecture.
        UnavailableError: a download without a network, or a missing library.
    """
    progress = progress or Silent()
    request.check()
    with open_with_progress(request, progress) as checkpoint:
        for note in checkpoint.notes:
            progress.say(note)
        request.limits.check(checkpoint.config.qformer.max_positions)
        with staged_folder(request.target, force=request.force) as folder:
            _write_bundle(folder, request, checkpoint, progress)
    return Bundle.just_written(request.target)


def open_with_progress(request: ExportRequest, progress: Progress) -> Checkpoint:
    with byte_listener(progress) as listen:
        return open_checkpoint(
            request.checkpoint, image_size=request.image_size, options=request.options, progress=listen
        )


def _write_bundle(folder: Path, request: ExportRequest, checkpoint: Checkpoint, progress: Progress) -> None:
    graphs = signatures(
        checkpoint.config,
        precision=request.precision,
        stages=request.perturbation.stages,
        limits=request.limits,
    )
    tokenizer = _write_tokenizer(folder, request, checkpoint, progress)
    traced = trace_graphs(request, checkpoint, graphs, progress)
    write_graphs(folder / "onnx", traced, checkpoint.tensors, progress)
    for spec in graphs.values():
        check_graph(folder / spec.file, spec)
    preprocessing = ImagePreprocessing(checkpoint.config.vision.image_size)
    _write_samples(folder, request, checkpoint, graphs, preprocessing, progress)
    manifest = Manifest(
        architecture=checkpoint.config.to_dict(),
        checkpoint=checkpoint.record,
        precision=request.precision,
        graphs=graphs,
        preprocessing=preprocessing,
        tokenizer=tokenizer,
        perturbation=request.perturbation,
        score=SCORE_FORMULAS,
        samples="samples.safetensors",
        tools=tool_versions(),
        command=request.command,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        notes=checkpoint.notes,
        files=hash_files(folder, progress),
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def trace_graphs(
    request: ExportRequest, checkpoint: Checkpoint, graphs: Mapping[str, GraphSpec], progress: Progress
) -> dict[str, WeightedGraph]:
    """Trace every stage, fold its weights and run the passes; no weight is read."""
    model = hollow_model(checkpoint.config, request.graph_perturbation, request.precision)
    traced = {}
    with progress.stage("tracing graphs", total=len(graphs)) as advance:
        for name, spec in graphs.items():
            folded = fold_weights(trace(model, spec))
            traced[name] = WeightedGraph(run_passes(folded.graph), folded.recipes)
            advance(1)
    return traced


def _write_tokenizer(folder: Path, request: ExportRequest, checkpoint: Checkpoint, progress: Progress) -> TokenizerSpec:
    vocab_size = checkpoint.config.qformer.vocab_size
    source = find_tokenizer(request.tokenizer, checkpoint.tokenizer, progress)
    save_tokenizer(build_tokenizer(source, vocab_size=vocab_size), folder / "tokenizer.json")
    return TokenizerSpec("tokenizer.json", request.limits.length, vocab_size)


def _write_samples(
    folder: Path,
    request: ExportRequest,
    checkpoint: Checkpoint,
    graphs: dict[str, GraphSpec],
    preprocessing: ImagePreprocessing,
    progress: Progress,
) -> None:
    from safetensors.numpy import save_file

    tokens = Tokenizer.open(folder / "tokenizer.json", max_length=request.limits.length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QpertWarning)  # these captions are not the user's: no matter if they are cut
        token_ids = tuple((caption, tokens.encode([caption]).input_ids[0]) for caption in CAPTIONS)
    perturbation = request.graph_perturbation or GraphPerturbation()
    with progress.stage("recording reference outputs from PyTorch"):
        reference = TorchReference.open(checkpoint, perturbation)
        maker = InputMaker(checkpoint.config, graphs, preprocessing)
        boxes = box_samples(
            request.perturbation, grid=checkpoint.config.vision.grid, image_size=checkpoint.config.vision.image_size
        )
        samples = record(reference, maker, images=request.samples, token_ids=token_ids, boxes=boxes)
    arrays, metadata = samples.to_arrays()
    path = folder / "samples.safetensors"
    save_file(arrays, str(path), metadata=metadata)
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def hash_files(folder: Path, progress: Progress) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with progress.stage("hashing", total=sum(path.stat().st_size for path in paths), unit="B") as advance:
        return {path.relative_to(folder).as_posix(): sha256_of(path, on_bytes=advance) for path in paths}


def tool_versions() -> dict[str, str]:
    """Versions of everything that shaped the bundle, as far as it is installed."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
