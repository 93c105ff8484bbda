"""`qpert export detector`: checkpoint → graph → gate → detector bundle."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qpert.exporter.checkpoints.locate import locate
from qpert.exporter.detectors.gate import TOLERANCE, compare, require_pass
from qpert.exporter.detectors.opened import GRAPH_FILE, OpenedDetector, graph_spec
from qpert.exporter.export import hash_files, tool_versions
from qpert.exporter.tracing.onnx_files import check_graph
from qpert.exporter.tracing.readable import require_onnxruntime
from qpert.runtime.bundle.manifest import MANIFEST_NAME
from qpert.runtime.bundle.staging import check_target, staged_folder
from qpert.runtime.detection.bundle import DetectorBundle, DetectorManifest
from qpert.runtime.detection.detector import Detector
from qpert.runtime.detection.options import DetectionOptions
from qpert.runtime.errors import CheckpointError, InputError, UnavailableError
from qpert.runtime.progress import Progress, Silent, byte_listener

DEMO = Path(__file__).with_name("demo")
"""The demonstration's detector: a Hugging Face folder."""
DEMO_NAME = "demo"
EXPECTED = "a folder or hub id of RT-DETR, RT-DETRv2, D-FINE or DEIMv2, or a YOLOX .onnx file"


@dataclass(frozen=True)
class DetectorRequest:
    """What the user asked for. labels: a file of label names, for .onnx files. options: the bundle's defaults."""

    checkpoint: str
    out: Path | None = None
    labels: Path | None = None
    options: DetectionOptions = field(default_factory=DetectionOptions)
    max_batch: int = 8
    tolerance: float = TOLERANCE
    force: bool = False
    command: str = ""

    @property
    def target(self) -> Path:
        """`--out`, else `qpert-detector-<checkpoint>` in the working folder."""
        return self.out or Path(f"qpert-detector-{Path(self.checkpoint).name.removesuffix('.onnx')}")

    def check(self) -> None:
        """Raises InputError for what can be checked before any work is done."""
        if self.max_batch < 1:
            raise InputError(f"--max-batch is {self.max_batch}; expected at least 1", code="limits")
        if not 0 < self.tolerance < 1:
            raise InputError(
                f"--tolerance is {self.tolerance}; expected a number above 0 and below 1, such as 1e-4",
                code="gate-tolerance",
            )
        check_target(self.target, force=self.force)


def export_detector(request: DetectorRequest, progress: Progress | None = None) -> DetectorBundle:
    """Export one detector. The written graph is compared with the stock implementation before the bundle exists.

    Raises:
        InputError: the request is invalid, or the target exists.
        CheckpointError: the checkpoint cannot be read, or is another architecture.
        UnavailableError: a download without a network, or a missing library.
        DetectorGateError: the graph does not find what the stock implementation finds.
    """
    progress = progress or Silent()
    request.check()
    require_onnxruntime()
    with byte_listener(progress) as listen:
        opened = open_detector(request.checkpoint, request.labels, listen)
    request.options.class_ids(opened.labels)  # raises for a class that it does not know
    for note in opened.notes:
        progress.say(note)
    with staged_folder(request.target, force=request.force) as folder:
        manifest = write_graph(folder, opened, request, progress)
        with progress.stage("comparing with the stock detector"):
            found = verify(folder, manifest, opened, request.tolerance)
        progress.say(
            f"{found['detections']} detections compared: largest differences {found['box_difference']:.1e} of the "
            f"picture (boxes), {found['score_difference']:.1e} (scores)"
        )
        manifest = replace(manifest, verification=found)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return DetectorBundle.just_written(request.target)


def open_detector(
    checkpoint: str, labels: Path | None, progress: Callable[[str, int, int | None], None]
) -> OpenedDetector:
    """Open what `--checkpoint` names. Errors: see `export_detector`."""
    if checkpoint == DEMO_NAME:
        if not (DEMO / "config.json").is_file():
            raise UnavailableError(
                f"the demonstration's detector is not in this installation ({DEMO} has no config.json); install "
                "qpert from its repository or a complete package, or pass another --checkpoint",
                code="detector-demo-missing",
            )
        return open_folder_detector(DEMO, DEMO_NAME, DEMO_NAME, labels, progress)
    path = Path(checkpoint)
    if path.suffix == ".onnx":
        from qpert.exporter.detectors.yolox import open_yolox

        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; expected {EXPECTED}", code="checkpoint-not-found")
        return open_yolox(path, labels, checkpoint, progress)
    located = locate(checkpoint, (DEMO_NAME,), EXPECTED)
    if located.folder is None:
        raise CheckpointError(f"{checkpoint} is a file; expected {EXPECTED}", code="checkpoint-not-folder")
    return open_folder_detector(located.folder, located.name, located.source, labels, progress)


def open_folder_detector(
    folder: Path, name: str, source: str, labels: Path | None, progress: Callable[[str, int, int | None], None]
) -> OpenedDetector:
    from qpert.exporter.detectors.huggingface import open_hub_detector

    if labels is not None:
        raise InputError("--labels is for .onnx files; a folder's config.json names its labels", code="labels-unused")
    return open_hub_detector(folder, name, source, progress)


def write_graph(folder: Path, opened: OpenedDetector, request: DetectorRequest, progress: Progress) -> DetectorManifest:
    """Write and check the graph; returns the manifest without its verification."""
    path = folder / GRAPH_FILE
    path.parent.mkdir()
    with progress.stage("writing the graph"):
        any_batch = opened.write(path)
    spec = graph_spec(opened.preprocessing, opened.detections, request.max_batch if any_batch else None)
    check_graph(path, spec)
    notes = opened.notes
    if not any_batch:
        notes = (*notes, "the network fixes its batch at 1: pictures go through the graph one by one")
        progress.say(notes[-1])
    return DetectorManifest(
        architecture=opened.architecture,
        checkpoint=opened.record,
        precision="fp32",
        graph=spec,
        labels=opened.labels,
        preprocessing=opened.preprocessing,
        defaults=request.options,
        decoding=opened.decoding,
        tools=tool_versions("transformers"),
        command=request.command,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        files=hash_files(folder, progress),
        notes=notes,
    )


def verify(folder: Path, manifest: DetectorManifest, opened: OpenedDetector, tolerance: float) -> dict[str, object]:
    """The record of the comparison. Raises DetectorGateError."""
    with Detector(DetectorBundle(folder, manifest)) as detector:
        found = compare(opened, detector, tolerance)
    require_pass(found)
    return found.to_dict()
