"""`qpert inspect`: the contents of a bundle, with every hash checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qpert.runtime.bundle.folder import Bundle, FileState, GraphManifest, HashedFolder
from qpert.runtime.bundle.graph_spec import TensorSpec
from qpert.runtime.bundle.manifest import Manifest, is_detector, manifest_values, read_manifest
from qpert.runtime.cli.options import bundle_argument, json_option, print_result
from qpert.runtime.detection.bundle import DetectorBundle, DetectorManifest, read_detector_manifest
from qpert.runtime.errors import BundleError
from qpert.runtime.report.model import UNDEFINED, Report, Section, Table, paragraphs
from qpert.runtime.sessions.tensorrt.engines import ENGINES, EngineRecord, changed_sources, engine_folders, read_engine

LABELS = 12
"""Labels of a detector that are named."""


@click.command("inspect", short_help="what is in a bundle, hashes checked")
@bundle_argument
@json_option
def command(bundle: Path, as_json: bool) -> int:
    """Show the contents of BUNDLE and its engines, and check the hash of every file. Exits 1 if one differs."""
    opened = described(bundle)
    states = opened.check_files()
    engines = [examine_engine(bundle, opened.manifest, folder) for folder in engine_folders(bundle)]
    files_ok = all(state.ok for state in states) and all(engine.ok for engine in engines)
    listed = [engine.to_dict() for engine in engines]
    document = opened.manifest.to_dict() | {"engines": listed, "files_ok": files_ok}
    print_result(document, lambda: bundle_report(opened, states, engines), as_json=as_json)
    return 0 if files_ok else 1


def described(folder: Path) -> Bundle | DetectorBundle:
    """The bundle or detector by its manifest, its files not yet checked."""
    if is_detector(manifest_values(folder)):
        return DetectorBundle(folder, read_detector_manifest(folder))
    return Bundle(folder, read_manifest(folder))


@dataclass(frozen=True)
class ExaminedEngine:
    """One folder of engines: its record and the state of its files, or why it cannot be read."""

    folder: str
    record: EngineRecord | None
    states: tuple[FileState, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems and all(state.ok for state in self.states)

    def to_dict(self) -> dict[str, Any]:
        record = self.record.to_dict() if self.record else None
        return {"folder": self.folder, "files_ok": self.ok, "problems": list(self.problems), "record": record}


def examine_engine(bundle: Path, manifest: GraphManifest, folder: Path) -> ExaminedEngine:
    """Read the record and hash every engine; an engine of a graph that has changed since is a problem too."""
    name = f"{ENGINES}/{folder.name}"
    try:
        engine = read_engine(bundle, folder)
    except BundleError as error:
        return ExaminedEngine(name, None, (), (str(error),))
    changed = changed_sources(engine.record, manifest)
    problems = (f"built from other graphs than the bundle's: {', '.join(changed)} differs",) if changed else ()
    return ExaminedEngine(name, engine.record, tuple(engine.check()), problems)


def bundle_report(bundle: Bundle | DetectorBundle, states: list[FileState], engines: list[ExaminedEngine]) -> Report:
    """The manifest and the files, in readable form."""
    lines = detector_summary(bundle.manifest) if isinstance(bundle, DetectorBundle) else summary(bundle.manifest)
    built = Section("Engines", paragraphs(*map(engine_summary, engines)))
    files = [*states, *(state for examined in engines for state in examined.states)]
    blocks = (
        *paragraphs(*lines),
        Section("Graphs", (graph_table(bundle.manifest),)),
        *((built,) if engines else ()),
        Section("Files", (file_table(bundle, files),)),
    )
    return Report("qpert inspect", str(bundle.folder), blocks)


def graph_table(manifest: GraphManifest) -> Table:
    def tensors(specs: tuple[TensorSpec, ...]) -> str:
        return "\n".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in specs)

    rows = (
        (
            graph.name,
            tensors(graph.inputs),
            tensors(graph.outputs),
            "\n".join(f"{axis} {length.min}–{length.max}" for axis, length in graph.ranges.items()),
        )
        for graph in manifest.all_graphs.values()
    )
    return Table(("graph", "inputs", "outputs", "lengths"), tuple(rows), words=4)


def file_table(bundle: HashedFolder, states: list[FileState]) -> Table:
    rows = []
    for state in states:
        path = bundle.folder / state.path
        verdict = "ok" if state.ok else "missing" if state.found is None else f"ALTERED: {state.found}"
        size = f"{path.stat().st_size:,}" if path.is_file() else UNDEFINED
        rows.append((state.path, verdict, size))
    return Table(("file", "SHA-256", "bytes"), tuple(rows), words=2)


def engine_summary(examined: ExaminedEngine) -> str:
    """`engine       sm89-rtx1.7.1.116: TensorRT-RTX 1.7.1.116 for sm89, fp16, …`, in one line."""
    problems = "; ".join(examined.problems)
    if examined.record is None:
        return f"engine       {examined.folder}: {problems}"
    record = examined.record
    size = sum(item.bytes for item in record.graphs.values())
    where = f"on {record.gpu}" if record.gpu else "on a machine without a GPU"
    line = (
        f"engine       {examined.folder}: {record.title} for {record.target}, {record.precision}, "
        f"{', '.join(record.graphs)}, {size / 2**20:,.1f} MiB, built {record.created} {where}"
    )
    return f"{line}: {problems}" if problems else line


def summary(manifest: Manifest) -> list[str]:
    checkpoint, verification = manifest.checkpoint, manifest.verification
    verdict = f"{verification['verdict']} against {verification['reference']}" if verification else "not verified yet"
    return [
        f"model        {manifest.family}, {manifest.patches[0]}×{manifest.patches[1]} patches",
        f"checkpoint   {checkpoint.name} ({checkpoint.format}), {checkpoint.source}, licence {checkpoint.license}",
        f"             sha256 {checkpoint.sha256}",
        f"precision    {manifest.precision}, images {manifest.preprocessing.size} px",
        f"perturbation {json.dumps(manifest.perturbation.to_dict())}",
        f"exported     {manifest.created} by: {manifest.command}",
        f"verification {verdict}",
        *(f"note         {note}" for note in manifest.notes),
    ]


def detector_summary(manifest: DetectorManifest) -> list[str]:
    checkpoint, geometry, options = manifest.checkpoint, manifest.preprocessing, manifest.defaults
    found = manifest.verification or {}
    limits = f"boxes {found.get('box_difference', 0):.1e}, scores {found.get('score_difference', 0):.1e}"
    verdict = f"{found['verdict']} against {found['reference']} ({limits})" if found else "not verified"
    labels = ", ".join(manifest.labels[:LABELS]) + (" …" if len(manifest.labels) > LABELS else "")
    classes = "all" if options.classes is None else ", ".join(options.classes)
    return [
        f"model        {manifest.architecture}, a detector of {len(manifest.labels)} labels: {labels}",
        f"checkpoint   {checkpoint.name} ({checkpoint.format}), {checkpoint.source}, licence {checkpoint.license}",
        f"             sha256 {checkpoint.sha256}",
        f"precision    {manifest.precision}, pictures {geometry.fit} to {geometry.width}×{geometry.height}, "
        f"{geometry.channels.upper()}",
        f"defaults     score above {options.threshold:g}, at most {options.max_boxes} boxes, classes {classes}, "
        f"suppression above IoU {options.suppression:g}",
        f"decoding     {json.dumps(manifest.decoding)}",
        f"exported     {manifest.created} by: {manifest.command}",
        f"verification {verdict}",
        *((f"quantization {json.dumps(manifest.quantization)}",) if manifest.quantization else ()),
        *(f"note         {note}" for note in manifest.notes),
    ]
