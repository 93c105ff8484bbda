"""Translates Hugging Face's tensor names to LAVIS's, and checks that no tensor is missing or unused.

Works on names and shapes only; no values are read. Sources: LAVIS `blip2_qformer.py`, transformers
`modeling_blip_2.py` (Blip2ForImageTextRetrieval).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qpert.exporter.checkpoints import files
from qpert.exporter.checkpoints.files import TensorInfo, shorten
from qpert.exporter.checkpoints.parameters import Origin
from qpert.runtime.errors import CheckpointError

PLACEHOLDERS = {"{i}": r"(\d+)", "{wb}": r"(weight|bias)", "{qkv}": r"(query|key|value)"}


@dataclass(frozen=True)
class Pair:
    """One kind of tensor under its two names. `third`: the LAVIS tensor is that third of the rows of Hugging Face's."""

    lavis: str
    hugging_face: str
    third: int | None = None


_BLOCK, _LAYER = "visual_encoder.blocks.{i}.", "vision_model.encoder.layers.{i}."
_BERT, _QFORMER = "Qformer.bert.encoder.layer.{i}.", "qformer.encoder.layer.{i}."

# EVA has no key bias. Hugging Face stores cat(q, 0, v) as one `qkv.bias`; its middle third is ignored, because
# a key bias adds the same q·b to every score of a row, and softmax cancels such a constant.
HUGGING_FACE_NAMES: tuple[Pair, ...] = (
    Pair("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    Pair("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    Pair("visual_encoder.patch_embed.proj.{wb}", "vision_model.embeddings.patch_embedding.{wb}"),
    Pair(_BLOCK + "norm1.{wb}", _LAYER + "layer_norm1.{wb}"),
    Pair(_BLOCK + "norm2.{wb}", _LAYER + "layer_norm2.{wb}"),
    Pair(_BLOCK + "attn.qkv.weight", _LAYER + "self_attn.qkv.weight"),
    Pair(_BLOCK + "attn.q_bias", _LAYER + "self_attn.qkv.bias", third=0),
    Pair(_BLOCK + "attn.v_bias", _LAYER + "self_attn.qkv.bias", third=2),
    Pair(_BLOCK + "attn.proj.{wb}", _LAYER + "self_attn.projection.{wb}"),
    Pair(_BLOCK + "mlp.fc1.{wb}", _LAYER + "mlp.fc1.{wb}"),
    Pair(_BLOCK + "mlp.fc2.{wb}", _LAYER + "mlp.fc2.{wb}"),
    Pair("ln_vision.{wb}", "vision_model.post_layernorm.{wb}"),
    Pair("query_tokens", "query_tokens"),
    Pair("Qformer.bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    Pair("Qformer.bert.embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight"),
    Pair("Qformer.bert.embeddings.LayerNorm.{wb}", "qformer.layernorm.{wb}"),
    Pair(_BERT + "attention.self.{qkv}.{wb}", _QFORMER + "attention.attention.{qkv}.{wb}"),
    Pair(_BERT + "attention.output.dense.{wb}", _QFORMER + "attention.output.dense.{wb}"),
    Pair(_BERT + "attention.output.LayerNorm.{wb}", _QFORMER + "attention.output.LayerNorm.{wb}"),
    Pair(_BERT + "crossattention.self.{qkv}.{wb}", _QFORMER + "crossattention.attention.{qkv}.{wb}"),
    Pair(_BERT + "crossattention.output.dense.{wb}", _QFORMER + "crossattention.output.dense.{wb}"),
    Pair(_BERT + "crossattention.output.LayerNorm.{wb}", _QFORMER + "crossattention.output.LayerNorm.{wb}"),
    Pair(_BERT + "intermediate.dense.{wb}", _QFORMER + "intermediate.dense.{wb}"),
    Pair(_BERT + "output.dense.{wb}", _QFORMER + "output.dense.{wb}"),
    Pair(_BERT + "output.LayerNorm.{wb}", _QFORMER + "output.LayerNorm.{wb}"),
    Pair(_BERT + "intermediate_query.dense.{wb}", _QFORMER + "intermediate_query.dense.{wb}"),
    Pair(_BERT + "output_query.dense.{wb}", _QFORMER + "output_query.dense.{wb}"),
    Pair(_BERT + "output_query.LayerNorm.{wb}", _QFORMER + "output_query.LayerNorm.{wb}"),
    Pair("vision_proj.{wb}", "vision_projection.{wb}"),
    Pair("text_proj.{wb}", "text_projection.{wb}"),
    Pair("itm_head.{wb}", "itm_head.{wb}"),
)

UNUSED: dict[str, tuple[str, ...]] = {
    # The training temperature, the language-model head, and a buffer with 0, 1, 2, …
    "lavis": (r"temp", r"Qformer\.cls\..+", r"Qformer\.bert\.embeddings\.position_ids"),
    "huggingface": (r"embeddings\.position_ids", r"temp"),
}
"""Tensors that a complete checkpoint has and retrieval does not need, as patterns of whole names."""

VISION_FILE_UNUSED = (r"(norm|fc_norm|head|lm_head|ln_post)\.(weight|bias)", r"mask_token", r"proj", r"temp")
"""Tensors after the last block in the vision backbones' files, which LAVIS does not load."""

VISION_FILE_BLOCK = re.compile(r"(?:blocks|transformer\.resblocks)\.(\d+)\..+")


def to_pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for placeholder, expression in PLACEHOLDERS.items():
        pattern = pattern.replace(placeholder, expression)
    return re.compile(pattern)


def fill(template: str, values: tuple[str, ...]) -> str:
    """The template with its placeholders replaced by `values`, in order."""
    rest = iter(values)
    return re.sub(r"\{\w+\}", lambda _: next(rest), template)


_FROM_HUGGING_FACE = tuple((to_pattern(pair.hugging_face), pair) for pair in HUGGING_FACE_NAMES)
_FROM_LAVIS = tuple((to_pattern(pair.lavis), pair) for pair in HUGGING_FACE_NAMES)


def lavis_origins(form: str, names: Iterable[str]) -> dict[str, Origin]:
    """LAVIS names → locations, for every tensor that has a LAVIS name; `check_names` finds the others."""
    if form == "lavis":
        return {name: Origin(name) for name in names}
    origins: dict[str, Origin] = {}
    for name in names:
        for pattern, pair in _FROM_HUGGING_FACE:
            if match := pattern.fullmatch(name):
                origins[fill(pair.lavis, match.groups())] = Origin(name, pair.third)
    return origins


def name_in(form: str, lavis_name: str) -> str:
    """The LAVIS parameter's name in a checkpoint of this format, for messages."""
    if form == "lavis":
        return lavis_name
    for pattern, pair in _FROM_LAVIS:
        if match := pattern.fullmatch(lavis_name):
            return fill(pair.hugging_face, match.groups())
    return lavis_name


def is_unused(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def unused_in_vision_file(names: Mapping[str, TensorInfo], layers: int) -> set[str]:
    """Tensors in a vision backbone's file that BLIP-2 does not use: blocks after the first `layers`, and heads."""
    late = {name for name in names if (m := VISION_FILE_BLOCK.fullmatch(name)) and int(m[1]) >= layers}
    return late | {name for name in names if is_unused(name, VISION_FILE_UNUSED)}


FLOATING = ("float32", "float16", "bfloat16", "float64")

PARTS: dict[str, tuple[str, ...]] = {
    "lavis": ("visual_encoder", "ln_vision", "Qformer", "query_tokens", "vision_proj", "text_proj", "itm_head"),
    "huggingface": (
        *("vision_model", "qformer", "embeddings", "query_tokens"),
        *("vision_projection", "text_projection", "itm_head"),
    ),
}
"""The parts of the network, by the first component of their names."""


def foreign_extras(form: str, names: Iterable[str]) -> list[str]:
    """`files.foreign_extras` of a format, without the tensors that are known to be unused."""
    return [name for name in files.foreign_extras(names, PARTS[form]) if not is_unused(name, UNUSED[form])]


def check_names(
    source: str, form: str, entries: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Origin]:
    """Check that all expected parameters exist with their shapes and known dtypes, and that no part has others.

    Args:
        source: the checkpoint's name in messages.
        entries: the checkpoint's tensors, under its own names.
        expected: LAVIS names and shapes (of `Blip2Retrieval.state_dict()`).

    Returns:
        The location of each expected parameter.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape or dtype; all in one message.
    """
    origins = lavis_origins(form, entries)
    found = {name: origins[name] for name in expected if name in origins}
    missing = sorted({name_in(form, name) for name in expected if name not in found})
    used = {origin.name for origin in found.values()}
    foreign = set(foreign_extras(form, entries))
    extra = sorted(n for n in entries if n not in used and n not in foreign and not is_unused(n, UNUSED[form]))
    shapes = [
        f"{origin.name} {list(entries[origin.name].shape)}, expected {_whole(origin, expected[name])}"
        for name, origin in found.items()
        if origin.shape(entries) != expected[name] or (origin.third is not None and entries[origin.name].shape[0] % 3)
    ]
    dtypes = [f"{name} {entries[name].dtype}" for name in sorted(used) if entries[name].dtype not in FLOATING]
    problems = {
        "missing": missing,
        "unexpected": extra,
        "of the wrong shape": list(dict.fromkeys(shapes)),
        f"of a dtype other than {', '.join(FLOATING)}": dtypes,
    }
    if any(problems.values()):
        lines = [f"  {len(names)} {what}: {shorten(names)}" for what, names in problems.items() if names]
        raise CheckpointError(
            f"{source} does not hold exactly the tensors of a BLIP-2 retrieval model ({len(expected)} parameters):\n"
            + "\n".join(lines)
            + "\nExpected a whole checkpoint of LAVIS Blip2Qformer or Blip2ITM, or of Hugging Face "
            "Blip2ForImageTextRetrieval",
            code="checkpoint-tensors",
        )
    return found


def _whole(origin: Origin, shape: tuple[int, ...]) -> list[int]:
    """The checkpoint's shape, of which `shape` may be a third."""
    return [shape[0] * 3, *shape[1:]] if origin.third is not None else list(shape)
