"""Detectors of Hugging Face folders: stock transformers models, traced with their decoding into one graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx
import torch
from torch import Tensor, nn

from qpert.exporter.checkpoints.files import hash_files, open_folder
from qpert.exporter.checkpoints.hub_folder import license_of
from qpert.exporter.checkpoints.json_files import read_json_object
from qpert.exporter.detectors.opened import INPUTS, OUTPUTS, Detections, OpenedDetector
from qpert.exporter.detectors.processor import read_geometry
from qpert.exporter.hub.stock import load_stock
from qpert.exporter.tracing.readable import IR_VERSION
from qpert.runtime.bundle.manifest import CheckpointRecord
from qpert.runtime.errors import CheckpointError
from qpert.runtime.libraries import turn_off_telemetry

if TYPE_CHECKING:
    from PIL.Image import Image

OPSET = 17
"""Of the traced graph: the lowest with LayerNormalization as one operator, which half precision needs whole."""

MODELS: Mapping[str, str] = {
    "rt_detr": "RTDetrForObjectDetection",
    "rt_detr_v2": "RTDetrV2ForObjectDetection",
    "d_fine": "DFineForObjectDetection",
    "deimv2": "Deimv2ForObjectDetection",
}
"""`model_type` of a config.json → class of transformers. All four have one image processor, and so one decoding."""


class Decoded(nn.Module):
    """A stock model with the decoding of its image processor, for the trace.

    Source: transformers `RTDetrImageProcessor.post_process_object_detection` with its default `use_focal_loss`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,3,H,W] and widths and heights [B,2] → boxes [B,K,4] in pixels, scores [B,K], label ids [B,K]; K queries.

        The K best of all pairs of a query and a class, the best first: a query can give several detections.
        """
        output = self.model(pixel_values, return_dict=True)
        logits, centred = output.logits, output.pred_boxes
        queries, classes = logits.shape[1:]
        scores, places = logits.sigmoid().flatten(1).topk(queries, dim=1)
        labels = places % classes
        rows = torch.div(places, classes, rounding_mode="floor")
        middle, size = centred[..., :2], centred[..., 2:]
        corners = torch.cat([middle - size / 2, middle + size / 2], dim=-1)
        chosen = corners.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4))
        return chosen * image_sizes.repeat(1, 2).unsqueeze(1), scores, labels


@dataclass(frozen=True)
class HubDetector(OpenedDetector):
    """A detector of transformers, with its stock model."""

    reference_name: ClassVar[str] = "stock transformers: model, image processor and post_process_object_detection"

    folder: Path
    model: nn.Module

    def write(self, path: Path) -> bool:
        """Trace the model into `path`, with the batch axis dynamic."""
        height, width = self.preprocessing.height, self.preprocessing.width
        example = (torch.rand(2, 3, height, width), torch.tensor([[width, height]] * 2, dtype=torch.float32))
        with quiet_exporter(), torch.no_grad():
            torch.onnx.export(
                Decoded(self.model).eval(),  # the exporter leaves a model in the mode that it came in
                example,
                str(path),
                dynamo=False,  # the newer exporter writes the example's batch into these models without an error
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_axes={name: {0: "B"} for name in (*INPUTS, *OUTPUTS)},
            )
        model = onnx.load(path)
        model.producer_name, model.ir_version = "qpert", min(model.ir_version, IR_VERSION)
        state_output_shapes(model, self.detections)
        onnx.save(model, path)
        return True

    @torch.no_grad()
    def reference(self, images: Sequence[Image]) -> list[Detections]:
        """All K detections of the stock model, with the folder's stock image processor and its post-processing."""
        turn_off_telemetry()
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(str(self.folder), backend="pil")
        found = []
        for image in images:
            output = self.model(processor(images=image, return_tensors="pt")["pixel_values"])
            (each,) = processor.post_process_object_detection(
                output, threshold=-1.0, target_sizes=torch.tensor([[image.height, image.width]])
            )
            found.append(Detections(each["boxes"].numpy(), each["scores"].numpy(), each["labels"].numpy()))
        return found


def state_output_shapes(model: onnx.ModelProto, detections: int) -> None:
    """Write the fixed lengths of the outputs, which the trace leaves as names."""
    for output, lengths in zip(model.graph.output, ((detections, 4), (detections,), (detections,)), strict=True):
        dims = output.type.tensor_type.shape.dim
        for dim, length in zip(list(dims)[1:], lengths, strict=True):
            dim.dim_value = length


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what the legacy exporter says about itself and about shapes that are fixed here on purpose."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def open_hub_detector(
    folder: Path, name: str, source: str, progress: Callable[[str, int, int | None], None]
) -> HubDetector:
    """Open the folder of a detector that transformers saved.

    Raises:
        CheckpointError: another architecture, tensors that are missing or of another shape, an image processor that is
            not supported, labels without names.
        UnavailableError: transformers is not installed.
    """
    config = read_json_object(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r} ({', '.join(map(str, config.get('architectures') or ())) or '?'})"
            f", which is no detector that qpert knows; expected {', '.join(MODELS)} (RT-DETR, RT-DETRv2, D-FINE, "
            "DEIMv2), or a YOLOX .onnx file",
            code="detector-architecture",
        )
    prepared = read_geometry(folder)
    store = open_folder(folder)
    try:
        digest = hash_files(store.files, progress)
    finally:
        store.close()
    model = load_stock(MODELS[kind], folder)
    labels = label_names(folder, model)
    licence = license_of(folder)
    record = CheckpointRecord(name, source, "huggingface", digest, licence)
    queries = int(model.config.num_queries)  # type: ignore[union-attr, arg-type]
    notes = (*store.notes, *prepared.notes)
    decoding = {"scores": "sigmoid", "top_k": queries, "suppression": None}
    return HubDetector(kind, record, labels, prepared.geometry, decoding, queries, notes, folder, model)


def label_names(folder: Path, model: Any) -> tuple[str, ...]:
    """The names of the label ids 0, 1, …, as config.json gives them."""
    names = {int(key): str(value) for key, value in model.config.id2label.items()}
    if sorted(names) != list(range(len(names))) or not names:
        raise CheckpointError(
            f"{folder / 'config.json'} has id2label with the ids {sorted(names)[:5]} …; expected 0, 1, … without gaps",
            code="detector-labels",
        )
    return tuple(names[place] for place in range(len(names)))
