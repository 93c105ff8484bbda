"""The inputs and outputs of the four graphs, declared once as data.

Tracing, dummy inputs, engine profiles, session checks and the manifest all follow from `signatures`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.bundle.manifest import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.errors import InputError

FEATURE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "float32"}
"""dtype of `image_embeds` between graphs. NumPy has no bfloat16, so a bf16 bundle hands its features on in float32."""


@dataclass(frozen=True)
class Limits:
    """The upper ends of the profile: images, boxes an image, texts, tokens a text, of one call."""

    batch: int = 8
    boxes: int = 32
    texts: int = 64
    length: int = 35

    def check(self, max_positions: int) -> None:
        """Raises InputError for a limit that no graph can have."""
        for name, value, least in (
            ("--max-batch", self.batch, 1),
            ("--max-boxes", self.boxes, 1),
            ("--max-text", self.texts, 1),
            ("--max-length", self.length, 3),
        ):
            if value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        if self.length > max_positions:
            raise InputError(
                f"--max-length is {self.length}, expected at most the checkpoint's {max_positions} position embeddings"
            )

    def ranges(self) -> dict[str, AxisRange]:
        """By axis name; L starts at 2 for [CLS] [SEP]."""
        return {
            "B": AxisRange(1, self.batch),
            "I": AxisRange(1, self.batch),
            "O": AxisRange(0, self.boxes),
            "T": AxisRange(1, self.texts),
            "L": AxisRange(2, self.length),
        }


def signatures(config: Blip2Config, *, precision: str, stages: str, limits: Limits) -> dict[str, GraphSpec]:
    """The four graphs of a bundle.

    Args:
        config: the architecture.
        precision: `fp32`, `fp16` or `bf16`.
        stages: `itc`, `both` or `none`: where boxes are taken.
        limits: the upper ends of the dynamic axes.
    """
    vision, qformer = config.vision, config.qformer
    features = FEATURE_DTYPES[precision]

    def embeds(axis: str) -> TensorSpec:
        return TensorSpec("image_embeds", features, (axis, vision.tokens, vision.width))

    def boxes(axis: str) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("object_masks", "float32", (axis, "O", vision.tokens)),
            TensorSpec("box_weights", "float32", (axis, "O")),
        )

    def tokens(*axes: str) -> tuple[TensorSpec, ...]:
        return TensorSpec("input_ids", "int64", axes), TensorSpec("attention_mask", "int64", axes)

    pixels = TensorSpec("pixel_values", "float32", ("B", 3, vision.image_size, vision.image_size))
    query_embeds = TensorSpec("query_embeds", "float32", ("B", qformer.queries, config.embed_dim))
    text_embeds = TensorSpec("text_embeds", "float32", ("T", config.embed_dim))
    itm_scores = TensorSpec("itm_scores", "float32", ("I", "T"))
    itc_boxes = boxes("B") if stages in ("itc", "both") else ()
    itm_boxes = boxes("I") if stages == "both" else ()
    declared = {
        "vision": ((pixels,), embeds("B")),
        "image_query": ((embeds("B"), *itc_boxes), query_embeds),
        "text": (tokens("T", "L"), text_embeds),
        "itm": ((embeds("I"), *tokens("I", "T", "L"), *itm_boxes), itm_scores),
    }
    ranges = limits.ranges()
    return {
        name: GraphSpec(name, f"onnx/{name}.onnx", inputs, (output,), used_ranges(inputs, ranges))
        for name, (inputs, output) in declared.items()
    }


def used_ranges(inputs: tuple[TensorSpec, ...], ranges: dict[str, AxisRange]) -> dict[str, AxisRange]:
    axes = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    return {axis: ranges[axis] for axis in sorted(axes)}
