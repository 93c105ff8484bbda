"""YOLOX as it is published in ONNX: the raw grid outputs are decoded, scored and suppressed inside the graph.

Source: YOLOX `yolox/models/yolo_head.py` (`decode_outputs`), `yolox/utils/boxes.py` (`postprocess`: the best class of
each place, its score times objectness, suppression within a class) and `demo/ONNXRuntime/onnx_inference.py` (BGR,
0–255, letterbox at the top left filled with 114).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qpert.exporter.detectors.coco import COCO_CLASSES
from qpert.exporter.detectors.opened import INPUTS, OUTPUTS, Detections, OpenedDetector
from qpert.exporter.tracing.readable import IR_VERSION, require_onnxruntime
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.detection.geometry import DetectorGeometry
from qpert.runtime.errors import CheckpointError
from qpert.runtime.files import sha256_of
from qpert.runtime.inputs.lines import text_lines

if TYPE_CHECKING:
    from PIL.Image import Image

STRIDES = (8, 16, 32)
DETECTIONS = 300
"""Most detections of a picture; fewer where the network has fewer places."""
SCORE_FLOOR = 0.01
SUPPRESSION = 0.65
"""YOLOX's own values for evaluation (`yolox/exp/yolox_base.py`: `test_conf`, `nmsthre`)."""
LICENCE = "unknown (an ONNX file states none; the published YOLOX weights are Apache-2.0)"


@dataclass(frozen=True)
class YoloxDetector(OpenedDetector):
    """A published YOLOX file. grid: column, row and stride of each place, float32 [N,3]."""

    reference_name: ClassVar[str] = "the published graph in ONNX Runtime, decoded and suppressed in NumPy"

    file: Path
    grid: np.ndarray

    def write(self, path: Path) -> bool:
        """Write the graph, for one picture a call where the network fixes its batch."""
        for dynamic in (True, False):
            onnx.save(extended(onnx.load(self.file), self.grid, self.preprocessing, dynamic=dynamic), path)
            if dynamic and rows_are_independent(path, self.preprocessing):
                return True
        return False

    def reference(self, images: Sequence[Image]) -> list[Detections]:
        """The published file's own outputs, picture by picture, with a decoding that shares nothing with the graph."""
        session = require_onnxruntime().InferenceSession(str(self.file), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return [
            decoded(
                session.run(None, {name: self.preprocessing.pixel_values([image])})[0][0],
                self.grid,
                min(self.preprocessing.width / image.width, self.preprocessing.height / image.height),
            )
            for image in images
        ]


def open_yolox(
    path: Path, labels: Path | None, source: str, progress: Callable[[str, int, int | None], None]
) -> YoloxDetector:
    """Open a YOLOX .onnx file.

    Args:
        labels: a text file with a label name a line; None for COCO's 80 classes.

    Raises:
        CheckpointError: not ONNX, or not a graph of YOLOX; as many labels as it has classes are not known.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's errors have no common base
        raise CheckpointError(
            f"{path} cannot be read as ONNX ({error}); download it again", code="checkpoint-unreadable"
        ) from error
    height, width, classes, grid = signature(model, path)
    names = COCO_CLASSES if labels is None else tuple(line for line in text_lines(labels, f"--labels {labels}") if line)
    if len(names) != classes:
        raise CheckpointError(
            f"{path} has {classes} classes, and {'COCO has' if labels is None else f'{labels} names'} {len(names)}; "
            f"pass --labels FILE with {classes} names, one a line",
            code="detector-labels",
        )
    geometry = DetectorGeometry(width, height, "letterbox", "bgr", 1.0, (0, 0, 0), (1, 1, 1), "bilinear", 114)
    detections = min(DETECTIONS, len(grid))
    decoding = {
        "scores": "objectness times the best class",
        "top_k": detections,
        "suppression": {"iou": SUPPRESSION, "within": "class", "score_above": SCORE_FLOOR},
    }
    record = CheckpointRecord(path.stem, source, "yolox-onnx", sha256_of(path), LICENCE)
    progress("hashing the checkpoint", path.stat().st_size, path.stat().st_size)
    return YoloxDetector("yolox", record, names, geometry, decoding, detections, (), path, grid)


def signature(model: onnx.ModelProto, path: Path) -> tuple[int, int, int, np.ndarray]:
    """Height, width, number of classes and grid of a YOLOX graph.

    Raises:
        CheckpointError: its input and output are not those of YOLOX.
    """

    def shape(value: onnx.ValueInfoProto) -> list[int]:
        return [dim.dim_value for dim in value.type.tensor_type.shape.dim]

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [shape(value) for value in model.graph.input if value.name not in weights]
    outputs = [shape(value) for value in model.graph.output]
    if len(inputs) == len(outputs) == 1 and len(inputs[0]) == 4 and len(outputs[0]) == 3:
        _, channels, height, width = inputs[0]
        _, places, columns = outputs[0]
        grid = grid_of(height, width)
        if channels == 3 and columns > 5 and height % 32 == width % 32 == 0 and places == len(grid) > 0:
            return height, width, columns - 5, grid
    raise CheckpointError(
        f"{path} has inputs {inputs} and outputs {outputs}; expected YOLOX's: one picture [B,3,H,W], H and W multiples "
        "of 32, and raw outputs [B,N,5+classes] with N = H·W/64 + H·W/256 + H·W/1024, not yet decoded. Detectors in "
        "other forms come in by their box files: see the README",
        code="detector-architecture",
    )


def grid_of(height: int, width: int) -> np.ndarray:
    """Column, row and stride of each of the N places, float32 [N,3]."""
    levels = []
    for stride in STRIDES:
        rows, columns = np.mgrid[: height // stride, : width // stride]
        levels.append(np.stack([columns.ravel(), rows.ravel(), np.full(rows.size, stride)], axis=1))
    return np.concatenate(levels).astype(np.float32)


def extended(model: onnx.ModelProto, grid: np.ndarray, geometry: DetectorGeometry, *, dynamic: bool) -> onnx.ModelProto:
    """The published graph with decoding, suppression and top-k behind it."""
    graph = gs.import_onnx(model)
    graph.name = "detector"
    batch: str | int = "B" if dynamic else 1
    if dynamic:
        loosen_batch(graph)
    (pixels,), (raw,) = graph.inputs, graph.outputs
    pixels.name, pixels.shape = INPUTS[0], [batch, 3, geometry.height, geometry.width]
    sizes = gs.Variable(INPUTS[1], np.float32, [batch, 2])
    graph.inputs.append(sizes)
    build = Builder(graph)
    boxes, scores, labels = build.detections(raw, sizes, grid, geometry)
    most = min(DETECTIONS, len(grid))
    shapes = ([batch, most, 4], [batch, most], [batch, most])
    for tensor, name, shape in zip((boxes, scores, labels), OUTPUTS, shapes, strict=True):
        tensor.name, tensor.shape = name, shape
        tensor.dtype = np.int64 if tensor is labels else np.float32
    graph.outputs = [boxes, scores, labels]
    for tensor in graph.tensors().values():  # shapes between were stated for the old batch
        if isinstance(tensor, gs.Variable) and all(tensor is not kept for kept in (*graph.inputs, *graph.outputs)):
            tensor.shape = None
    graph.cleanup().toposort()
    made = gs.export_onnx(graph)
    made.producer_name, made.ir_version = "qpert", min(max(made.ir_version, 8), IR_VERSION)
    return made


def loosen_batch(graph: gs.Graph) -> None:
    """Let reshapes that write a batch of 1 copy the batch of what they reshape (0 in ONNX)."""
    for node in graph.nodes:
        if node.op != "Reshape" or not isinstance(node.inputs[1], gs.Constant):
            continue
        lengths = node.inputs[1].values
        if len(lengths) and lengths[0] == 1:
            copied = np.concatenate([[0], lengths[1:]]).astype(np.int64)
            node.inputs[1] = gs.Constant(f"{node.outputs[0].name}.shape", copied)


class Builder:
    """Appends operators to a graph. Each method returns the node's only output unless it says otherwise."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.count = 0

    def constant(self, values: Any, dtype: Any = np.float32) -> gs.Constant:
        self.count += 1
        return gs.Constant(f"decode.constant{self.count}", np.array(values, dtype))

    def add(self, op: str, inputs: Sequence[Any], attributes: dict[str, Any] | None = None, outputs: int = 1) -> Any:
        """A node; its output, or all of them where there are several."""
        self.count += 1
        made = [gs.Variable(f"decode.{op.lower()}{self.count}.{place}") for place in range(outputs)]
        node = gs.Node(op, f"decode.{op.lower()}{self.count}", attributes or {}, list(inputs), made)
        self.graph.nodes.append(node)
        return made[0] if outputs == 1 else made

    def columns(self, raw: Any, start: int, stop: int) -> Any:
        """Columns `start` to `stop` of [B,N,D]."""
        ends = [self.constant([value], np.int64) for value in (start, stop, 2)]
        return self.add("Slice", [raw, *ends])

    def detections(self, raw: Any, sizes: Any, grid: np.ndarray, geometry: DetectorGeometry) -> tuple[Any, Any, Any]:
        """Raw outputs [B,N,5+C] → boxes [B,K,4], scores [B,K] and label ids [B,K], the best first.

        Rows behind the last detection have score 0, which no threshold keeps.
        """
        boxes = self.boxes(raw, sizes, grid, geometry)  # [B,N,4]
        last = np.iinfo(np.int64).max
        class_scores = self.columns(raw, 5, last)  # [B,N,C]
        best = self.reduce("ReduceMax", class_scores, 2, keep=True)
        scores = self.add("Mul", [best, self.columns(raw, 4, 5)])  # [B,N,1]
        labels = self.add("ArgMax", [class_scores], {"axis": 2, "keepdims": 1})  # [B,N,1]
        by_class = self.scores_by_class(scores, labels, class_scores)  # [B,C,N]
        kept = self.suppressed(boxes, by_class)  # [B,N]
        top = self.constant([min(DETECTIONS, len(grid))], np.int64)
        found, places = self.add("TopK", [kept, top], {"axis": 1}, outputs=2)  # [B,K]
        rows = self.add("Unsqueeze", *self.axes([places], 2))
        index = self.add("Expand", [rows, self.constant([1, 1, 4], np.int64)])
        chosen = self.add("GatherElements", [boxes, index], {"axis": 1})
        flat = self.add("Squeeze", *self.axes([labels], 2))
        return chosen, found, self.add("GatherElements", [flat, places], {"axis": 1})

    def axes(self, inputs: list[Any], axis: int, moved: int = 13) -> tuple[list[Any], dict[str, Any]]:
        """Inputs and attributes of an operator whose axes moved from an attribute to an input in opset `moved`."""
        if self.graph.opset >= moved:
            return [*inputs, self.constant([axis], np.int64)], {}
        return inputs, {"axes": [axis]}

    def reduce(self, op: str, tensor: Any, axis: int, *, keep: bool) -> Any:
        inputs, attributes = self.axes([tensor], axis, moved=18)
        return self.add(op, inputs, attributes | {"keepdims": int(keep)})

    def boxes(self, raw: Any, sizes: Any, grid: np.ndarray, geometry: DetectorGeometry) -> Any:
        """Corners [B,N,4] in pixels of the picture: the letterbox's ratio is undone."""
        stride = self.constant(grid[None, :, 2:])
        shifted = self.add("Add", [self.columns(raw, 0, 2), self.constant(grid[None, :, :2])])
        middle = self.add("Mul", [shifted, stride])
        size = self.add("Mul", [self.add("Exp", [self.columns(raw, 2, 4)]), stride])
        half = self.add("Mul", [size, self.constant(0.5)])
        corners = self.add("Concat", [self.add("Sub", [middle, half]), self.add("Add", [middle, half])], {"axis": 2})
        ratios = self.add("Div", [self.constant([[geometry.width, geometry.height]]), sizes])  # [B,2]
        ratio = self.reduce("ReduceMin", ratios, 1, keep=True)  # [B,1]
        return self.add("Div", [corners, self.add("Unsqueeze", *self.axes([ratio], 2))])

    def scores_by_class(self, scores: Any, labels: Any, class_scores: Any) -> Any:
        """[B,C,N]: the score of each place in the row of its best class, 0 elsewhere."""
        shape = self.add("Shape", [class_scores])
        empty = self.add("ConstantOfShape", [shape], {"value": gs.Constant("decode.zero", np.zeros(1, np.float32))})
        placed = self.add("ScatterElements", [empty, labels, scores], {"axis": 2})
        return self.add("Transpose", [placed], {"perm": [0, 2, 1]})

    def suppressed(self, boxes: Any, by_class: Any) -> Any:
        """[B,N]: the score of each place that suppression within its class leaves, else 0."""
        limits = [self.constant([DETECTIONS], np.int64), self.constant([SUPPRESSION]), self.constant([SCORE_FLOOR])]
        selected = self.add("NonMaxSuppression", [boxes, by_class, *limits])  # [M,3]: picture, class, place
        values = self.add("GatherND", [by_class, selected])  # [M]
        shape = self.add("Shape", [by_class])
        empty = self.add("ConstantOfShape", [shape], {"value": gs.Constant("decode.zero2", np.zeros(1, np.float32))})
        left = self.add("ScatterND", [empty, selected, values])
        return self.reduce("ReduceMax", left, 1, keep=False)


def rows_are_independent(path: Path, geometry: DetectorGeometry) -> bool:
    """Whether the graph takes 3 pictures at once and finds in each what it finds in it alone."""
    generator = np.random.default_rng(0)
    pixels = generator.uniform(0, 255, (3, 3, geometry.height, geometry.width)).astype(np.float32)
    sizes = np.array([[100, 80], [50, 60], [300, 200]], np.float32)
    runtime = require_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what is wrong comes as an exception, which is an answer here
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        together = session.run(None, dict(zip(INPUTS, (pixels, sizes), strict=True)))
    except Exception:  # noqa: BLE001  ONNX Runtime's exceptions have no common base; a network that fixes its batch
        return False
    for row in range(3):
        alone = session.run(None, dict(zip(INPUTS, (pixels[row : row + 1], sizes[row : row + 1]), strict=True)))
        # the same arithmetic in another blocking: float32 sums differ in the last digits
        if not np.allclose(together[1][row], alone[1][0], rtol=0, atol=1e-5):
            return False
    return True


def decoded(raw: np.ndarray, grid: np.ndarray, ratio: float) -> Detections:
    """Raw outputs [N,5+C] of one picture, decoded, suppressed within classes and sorted, in NumPy."""
    raw = raw.astype(np.float64)
    middle = (raw[:, :2] + grid[:, :2]) * grid[:, 2:]
    size = np.exp(raw[:, 2:4]) * grid[:, 2:]
    boxes = np.concatenate([middle - size / 2, middle + size / 2], axis=1) / ratio
    labels = raw[:, 5:].argmax(axis=1)
    scores = raw[:, 4] * raw[:, 5:].max(axis=1)
    left = np.flatnonzero(scores > SCORE_FLOOR)
    left = left[np.argsort(-scores[left], kind="stable")]
    kept: list[int] = []
    while len(left) and len(kept) < DETECTIONS:
        first, left = left[0], left[1:]
        kept.append(int(first))
        low, high = np.maximum(boxes[first, :2], boxes[left, :2]), np.minimum(boxes[first, 2:], boxes[left, 2:])
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        overlap = shared / (areas[first] + areas[left] - shared)
        left = left[(labels[left] != labels[first]) | (overlap <= SUPPRESSION)]
    return Detections(boxes[kept].astype(np.float32), scores[kept].astype(np.float32), labels[kept])
