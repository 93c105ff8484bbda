"""Graphs declared as data: names, slots, dtypes, shapes and ranges, named alike in every family.

Tracing, dummy inputs, engine profiles, session checks and the manifest all follow from these declarations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qpert.runtime.bundle import roles
from qpert.runtime.bundle.graph_spec import AxisRange, GraphSpec, TensorSpec
from qpert.runtime.errors import InputError

GRAPH_NAMES: Mapping[str, str] = {
    roles.IMAGE_TOWER: "vision",
    roles.QUERY_HEAD: "image_query",
    roles.TEXT_TOWER: "text",
    roles.PAIR_SCORER: "itm",
    roles.PREPROCESS: "preprocess",
    roles.BOXES: "boxes",
}
"""The name of each role's graph, in files and messages."""

TENSOR_NAMES: Mapping[str, str] = {
    roles.PIXELS: "pixel_values",
    roles.IMAGE_TOKENS: "image_embeds",
    roles.OBJECT_MASKS: "object_masks",
    roles.BOX_WEIGHTS: "box_weights",
    roles.TOKEN_IDS: "input_ids",
    roles.TOKEN_MASK: "attention_mask",
    roles.IMAGE_VECTORS: "query_embeds",
    roles.TEXT_VECTORS: "text_embeds",
    roles.PAIR_SCORES: "itm_scores",
    roles.PICTURE: "image",
    roles.BOX_CORNERS: "boxes",
    roles.IMAGE_SIZE: "image_size",
}

FEATURE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "float32"}
"""dtype of image tokens between graphs. NumPy has no bfloat16, so a bf16 bundle passes its features as float32."""


@dataclass(frozen=True)
class Limits:
    """Upper limits for one call: images, boxes per image, texts, tokens per text.

    `length` None: the family's default.
    """

    batch: int = 8
    boxes: int = 32
    texts: int = 64
    length: int | None = None

    def check(self) -> None:
        """Raises InputError for a limit that no graph supports."""
        for option, value, least in (
            ("--max-batch", self.batch, 1),
            ("--max-boxes", self.boxes, 1),
            ("--max-text", self.texts, 1),
            ("--max-length", self.length, 3),
        ):
            if value is not None and value < least:
                raise InputError(f"{option} is {value}, expected at least {least}", code="export-limit")

    def text_length(self, usual: int, most: int) -> int:
        """Tokens of the longest text: the requested limit, else `usual`.

        Raises:
            InputError: the limit exceeds the checkpoint's `most` positions.
        """
        length = usual if self.length is None else self.length
        if length > most:
            raise InputError(
                f"--max-length is {length}, expected at most the checkpoint's {most} position embeddings",
                code="export-limit",
            )
        return length

    def ranges(self, length: int, shortest: int = 2) -> dict[str, AxisRange]:
        """Ranges by axis name. L starts at the number of special tokens around an empty text."""
        return {
            "B": AxisRange(1, self.batch),
            "I": AxisRange(1, self.batch),
            "O": AxisRange(0, self.boxes),
            "T": AxisRange(1, self.texts),
            "L": AxisRange(shortest, length),
        }


def tensor(slot: str, dtype: str, *shape: int | str, shared: bool = False) -> TensorSpec:
    """The tensor of a slot, under its usual name; `shared` as in `TensorSpec`."""
    return TensorSpec(TENSOR_NAMES[slot], slot, dtype, shape, shared)


def box_tensors(axis: str, tokens: int) -> tuple[TensorSpec, ...]:
    """`object_masks` [axis, O, tokens] and `box_weights` [axis, O]."""
    return (
        tensor(roles.OBJECT_MASKS, "float32", axis, "O", tokens),
        tensor(roles.BOX_WEIGHTS, "float32", axis, "O"),
    )


def token_tensors(*shape: int | str) -> tuple[TensorSpec, ...]:
    """`input_ids` and `attention_mask`."""
    return tensor(roles.TOKEN_IDS, "int64", *shape), tensor(roles.TOKEN_MASK, "int64", *shape)


def graph(
    role: str,
    inputs: Sequence[TensorSpec],
    output: TensorSpec,
    ranges: Mapping[str, AxisRange],
    flops: Mapping[str, int] | None = None,
) -> GraphSpec:
    """The graph of a role, with the `ranges` of its own axes."""
    axes = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    name = GRAPH_NAMES[role]
    used = {axis: ranges[axis] for axis in sorted(axes)}
    return GraphSpec(name, role, f"onnx/{name}.onnx", tuple(inputs), (output,), used, dict(flops or {}))
