"""A float detector to INT8: the backbone's convolutions in 8 bits, judged by the detections that stay the same.

The rest stays in float: class and box heads, the decoder's products, top-k and reference points lose objects in 8 bits.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import version_converter

from qpert.calibration.detectors.gate import Agreement, DetectorAccuracyError, agreement
from qpert.calibration.graph_files import load_graph
from qpert.calibration.quantization.candidates import Candidate
from qpert.calibration.quantization.data import Feed
from qpert.calibration.quantization.request import MIN_SAMPLES, RANGES, TARGETS
from qpert.calibration.quantization.static import FORMATS, HISTOGRAM_CALLS, Reader, make_calibrator, quantize_all
from qpert.runtime.bundle.manifest import MANIFEST_NAME
from qpert.runtime.bundle.staging import check_target, staged_folder
from qpert.runtime.detection.bundle import DetectorBundle, DetectorManifest
from qpert.runtime.detection.detector import Detector
from qpert.runtime.detection.geometry import image_sizes
from qpert.runtime.errors import InputError
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.images import load_image
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.scenes import draw_scene, sample_scene

if TYPE_CHECKING:
    from PIL.Image import Image

CONVOLUTION = "Conv"
BACKBONE = "/backbone/"
"""In the names that the exporter gives to the nodes of a Hugging Face model's backbone."""
LOWEST_OPSET = 13
"""The first whose QuantizeLinear has a scale for each channel."""
RAISED_OPSET = 17


@dataclass(frozen=True)
class DetectorQuantizeRequest:
    """One call of `qpert quantize` for a detector.

    dataset: pictures, as for `qpert index`, or `demo` for generated scenes. samples: pictures to measure ranges on; as
    many others judge the gate. min_agreement: percent of detections that must stay (F1 of the two sets).
    """

    bundle: Path
    out: Path
    dataset: str = "demo"
    samples: int = 64
    target: str = "cpu"
    ranges: str = "minmax"
    reduce_range: bool = False
    min_agreement: float = 90.0
    force: bool = False
    command: str = ""

    def check(self) -> None:
        """Raises InputError for options that are wrong for any detector."""
        for name, value, allowed in (("--target", self.target, TARGETS), ("--ranges", self.ranges, RANGES)):
            if value not in allowed:
                raise InputError(f"{name} is {value!r}, expected one of {', '.join(allowed)}", code="quantize-option")
        if self.samples < MIN_SAMPLES:
            raise InputError(
                f"--samples is {self.samples}, expected at least {MIN_SAMPLES}: ranges of a few images "
                "clip the activations of others",
                code="samples-too-few",
            )
        if not 0 <= self.min_agreement <= 100:
            raise InputError(
                f"--min-agreement is {self.min_agreement}; expected a percentage from 0 to 100", code="gate-percent"
            )
        check_target(self.out, force=self.force)


def quantize_detector(request: DetectorQuantizeRequest, progress: Progress | None = None) -> DetectorBundle:
    """Write the INT8 detector.

    Raises:
        InputError: the request is invalid, the detector is not fp32, or too few pictures are given.
        DetectorAccuracyError: it finds other objects than the float one; nothing is written.
    """
    progress = progress or Silent()
    request.check()
    bundle = DetectorBundle.open(request.bundle)
    if bundle.manifest.precision != "fp32":
        raise InputError(
            f"{bundle.folder} is a {bundle.manifest.precision} detector; give the fp32 one that it was made from",
            code="bundle-quantized",
        )
    pictures = Pictures.of(request)
    with Detector(bundle) as detector, staged_folder(request.out, force=request.force) as folder:
        with progress.stage("measuring ranges", total=request.samples) as advance:
            feeds = list(feeds_of(detector, pictures.load(0)))
            advance(len(feeds))
            made, candidates = quantized(bundle, feeds, request, folder)
        path = folder / bundle.manifest.graph.file
        path.parent.mkdir()
        onnx.save(made, path)
        manifest = described(bundle.manifest, request, folder, candidates)
        with Detector(DetectorBundle(folder, manifest)) as other:
            found = judge(detector, other, pictures, progress)
        progress.say(
            f"{found.percent:.1f} % of {found.float_boxes} and {found.quantized_boxes} detections are the same"
        )
        require_agreement(found, request)
        assert manifest.quantization is not None
        gate = found.to_dict() | {"min_agreement": request.min_agreement}
        manifest = replace(manifest, quantization=manifest.quantization | {"gate": gate})
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return DetectorBundle.just_written(request.out)


@dataclass(frozen=True)
class Pictures:
    """The pictures, in turns for the ranges (half 0) and the gate (half 1); files, or None for scenes."""

    count: int
    files: tuple[Path, ...] | None

    @classmethod
    def of(cls, request: DetectorQuantizeRequest) -> Pictures:
        """Raises InputError where there are fewer than twice `samples`."""
        if request.dataset == "demo":
            return cls(request.samples, None)
        from qpert.runtime.gallery.entries import read_entries

        files = tuple(entry.path for entry in read_entries(Path(request.dataset)))
        if len(files) < 2 * request.samples:
            raise InputError(
                f"--dataset {request.dataset} has {len(files)} pictures; expected {2 * request.samples}: "
                f"{request.samples} to measure ranges (--samples) and as many others for the gate",
                code="pictures-too-few",
            )
        return cls(request.samples, files)

    def load(self, half: int) -> Iterator[Image]:
        for place in range(half, 2 * self.count, 2):
            if self.files is None:
                yield draw_scene(sample_scene(f"detector quantize {place}")).convert("RGB")
            else:
                yield load_image(self.files[place])


def feeds_of(detector: Detector, pictures: Iterator[Image]) -> Iterator[Feed]:
    """The graph's inputs, picture by picture."""
    pixels, sizes = detector.manifest.graph.input_names
    for picture in pictures:
        values = detector.manifest.preprocessing.pixel_values([picture])
        yield {pixels: values, sizes: image_sizes([picture])}


def quantized(
    bundle: DetectorBundle, feeds: Sequence[Feed], request: DetectorQuantizeRequest, folder: Path
) -> tuple[onnx.ModelProto, tuple[Candidate, ...]]:
    """The graph with its candidates in 8 bits. `folder`: for working files, which are deleted."""
    path = folder / "float.onnx"
    model = load_graph(bundle.graph_path(bundle.manifest.graph))
    if next(entry.version for entry in model.opset_import if not entry.domain) < LOWEST_OPSET:
        model = version_converter.convert_version(model, RAISED_OPSET)
    onnx.save(model, path)
    candidates = convolutions(model)
    if not candidates:
        raise InputError(
            f"{bundle.folder} has no convolution that could be quantised; use it in fp32", code="quantize-nothing"
        )
    outputs = request.target == "cpu"  # ONNX Runtime runs 8-bit convolutions only between quantised tensors
    results = {node.name: node.output[0] for node in model.graph.node}
    wanted = {candidate.activation for candidate in candidates}
    wanted |= {results[candidate.node] for candidate in candidates} if outputs else set()
    symmetric = FORMATS[request.target].symmetric
    calibrator = make_calibrator(
        path, wanted, method=request.ranges, symmetric=symmetric, folder=folder, operators=(CONVOLUTION,)
    )
    step = len(feeds) if request.ranges == "minmax" else HISTOGRAM_CALLS
    with redirect_stdout(sys.stderr):  # the histograms' progress; stdout is for results
        for start in range(0, len(feeds), step):
            calibrator.collect_data(Reader(feeds[start : start + step]))
        measured = calibrator.compute_data()
    made = quantize_all(
        load_graph(path),
        measured,
        candidates,
        target=request.target,
        reduce_range=request.reduce_range,
        operators=(CONVOLUTION,),
        outputs=outputs,
    )
    made.producer_name = "qpert"
    for file in chain(folder.glob("*.onnx"), folder.glob("*.data")):
        file.unlink()
    return made, candidates


def convolutions(model: onnx.ModelProto) -> tuple[Candidate, ...]:
    """The backbone's convolutions, where the graph names them; else all that another convolution follows.

    The last on each way, which no other follows, give class scores and boxes themselves.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    found = [node for node in model.graph.node if node.op_type == CONVOLUTION and node.input[1] in weights]
    chosen = [node for node in found if BACKBONE in node.name] or [node for node in found if is_followed(model, node)]
    return tuple(Candidate(node.name, node.input[0], node.input[1], "backbone") for node in chosen)


def is_followed(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether another convolution takes what `node` gives, directly or through other operators."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for other in model.graph.node:
        for name in other.input:
            users.setdefault(name, []).append(other)
    waiting, seen = list(node.output), set(node.output)
    while waiting:
        for user in users.get(waiting.pop(), ()):
            if user.op_type == CONVOLUTION:
                return True
            waiting += [name for name in user.output if name not in seen]
            seen.update(user.output)
    return False


def described(
    manifest: DetectorManifest, request: DetectorQuantizeRequest, folder: Path, candidates: Sequence[Candidate]
) -> DetectorManifest:
    """The manifest of the quantised detector, without the gate's result."""
    file = manifest.graph.file
    quantization = {
        "target": request.target,
        "ranges": request.ranges,
        "dataset": request.dataset,
        "samples": request.samples,
        "reduce_range": request.reduce_range,
        "convolutions": len(candidates),
        "float_graph": manifest.files[file],
    }
    return replace(
        manifest,
        precision="int8",
        files={file: sha256_of(folder / file)},
        command=request.command,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        verification=None,
        quantization=quantization,
    )


def judge(detector: Detector, other: Detector, pictures: Pictures, progress: Progress) -> Agreement:
    """Both detectors, with the defaults of their bundle, on the pictures that no range was measured on."""
    reference, found = [], []
    with progress.stage("comparing detections", total=pictures.count) as advance:
        for picture in pictures.load(1):
            reference += detector.boxes([picture])
            found += other.boxes([picture])
            advance(1)
    return agreement(reference, found)


def require_agreement(found: Agreement, request: DetectorQuantizeRequest) -> None:
    if not found.float_boxes:
        raise InputError(
            f"the float detector finds nothing in the {found.pictures} pictures of the gate, so that there is nothing "
            "to compare; give pictures of what it detects with --dataset",
            code="gate-without-boxes",
        )
    if found.percent < request.min_agreement:
        raise DetectorAccuracyError(
            f"in INT8 {found.percent:.1f} % of the detections stay ({found.same} are the same, of {found.float_boxes} "
            f"in float and {found.quantized_boxes} in INT8); {request.min_agreement:g} % are required, so that "
            "nothing was written. Try --ranges percentile, more pictures with --samples, or use it in fp32",
            code="detector-accuracy",
        )
