"""Recognises a checkpoint by its tensors: format, family and every dimension that shapes show.

Shapes do not show head counts and LayerNorm eps: see `infer_missing`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch

from qpert.exporter.checkpoints.files import TensorInfo, shorten
from qpert.exporter.checkpoints.parameters import Origin
from qpert.graphs.families.blip2.config import (
    BERT_QFORMER,
    CLIP_VIT_L,
    EVA_VIT_G,
    Blip2Config,
    QFormerConfig,
    VisionConfig,
    VisionFamily,
)
from qpert.graphs.families.blip2.model import Blip2Retrieval
from qpert.runtime.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ArchitectureOptions:
    """Facts about a checkpoint that its tensors do not show, set by the user; None leaves them to be inferred.

    `vision_checkpoint`: the file of the vision backbone, for LAVIS checkpoints that were saved without it.
    `vision_layers`: how many of that file's blocks are used.
    """

    vision_heads: int | None = None
    qformer_heads: int | None = None
    vision_eps: float | None = None
    ln_vision_eps: float | None = None
    qformer_eps: float | None = None
    vision_layers: int | None = None
    vision_checkpoint: Path | None = None


@dataclass(frozen=True)
class VisionNames:
    """The tensors that show a vision family's dimensions: patterns of LAVIS names, and axes."""

    blocks: str
    norm: str
    fc1: str
    patch: str
    positions: str
    positions_axis: int
    known: VisionConfig
    head_size: int


VISION_NAMES: dict[VisionFamily, VisionNames] = {
    "eva": VisionNames(
        "visual_encoder.blocks.",
        "norm1.weight",
        "mlp.fc1.weight",
        "visual_encoder.patch_embed.proj.weight",
        "visual_encoder.pos_embed",
        1,
        EVA_VIT_G,
        88,
    ),
    "clip": VisionNames(
        "visual_encoder.transformer.resblocks.",
        "ln_1.weight",
        "mlp.c_fc.weight",
        "visual_encoder.conv1.weight",
        "visual_encoder.positional_embedding",
        0,
        CLIP_VIT_L,
        64,
    ),
}

QFORMER_LAYER = "Qformer.bert.encoder.layer."

FOREIGN: tuple[tuple[str, str], ...] = (
    (
        r"language_model\..+|language_projection\..+|(opt|t5|llm)_(model|proj)\..+",
        "a BLIP-2 with a language model (Blip2ForConditionalGeneration, Blip2OPT, Blip2T5 or InstructBLIP), which has "
        "no ITC and ITM heads; expected a retrieval checkpoint: coco, pretrain, or Salesforce/blip2-itm-vit-g",
    ),
    (
        r"text_encoder\.(encoder|bert|embeddings)\..+|text_decoder\..+",
        "a BLIP (first generation) or ALBEF model, which has no Q-Former; expected BLIP-2",
    ),
    (
        r"text_model\..+|visual\.(transformer|trunk|conv1)\..+|token_embedding\.weight|logit_scale",
        "a CLIP or SigLIP model, which has no Q-Former; expected BLIP-2",
    ),
    (
        r"(vit|deit)\.(embeddings|encoder)\..+|blocks\.\d+\..+|transformer\.resblocks\..+|patch_embed\..+",
        "a vision transformer alone; expected BLIP-2. If it is the backbone of a LAVIS checkpoint, pass that "
        "checkpoint as --checkpoint and this file as --vision-checkpoint",
    ),
)
"""Other models that users may pass, by the names of their tensors."""


def format_of(names: Mapping[str, TensorInfo], source: str) -> str:
    """`lavis` or `huggingface`.

    Raises:
        CheckpointError: it is another model, named in the message if it is a known one.
    """
    lavis = any(name.startswith("Qformer.bert.") for name in names)
    has_qformer = lavis or any(name.startswith("qformer.") for name in names)
    retrieval = has_qformer and any(name.startswith("itm_head.") for name in names)
    for pattern, what in FOREIGN:
        signs = [name for name in names if re.fullmatch(pattern, name)]
        if signs and not retrieval:
            raise CheckpointError(
                f"{source} is {what} (recognised by its tensor names: {shorten(signs, 3)})",
                code="checkpoint-other-model",
            )
    if lavis:
        return "lavis"
    if any(name.startswith(("qformer.", "vision_model.")) for name in names):
        return "huggingface"
    raise CheckpointError(
        f"{source} has an unknown architecture: none of its {len(names)} tensors has a BLIP-2 name "
        f"({shorten(sorted(names), 5)}); expected LAVIS Blip2Qformer or Blip2ITM, or Hugging Face "
        "Blip2ForImageTextRetrieval",
        code="checkpoint-unknown",
    )


def has_vision(names: Mapping[str, TensorInfo]) -> bool:
    return any(name.startswith("visual_encoder.") for name in names)


def lavis_shapes(origins: Mapping[str, Origin], entries: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    return {name: origin.shape(entries) for name, origin in origins.items()}


def dimension(shapes: Mapping[str, Shape], name: str, axis: int, default: int) -> int:
    """The length of `axis` in most tensors named `name` (`*` for a number).

    The majority decides, so that a single wrong tensor is reported as wrong. `default` is used if there is none, so
    that the check of names can report the missing tensor together with all other faults.
    """
    pattern = re.compile(re.escape(name).replace(r"\*", r"\d+"))
    lengths = Counter(s[axis] for n, s in shapes.items() if len(s) > axis and pattern.fullmatch(n))
    return lengths.most_common(1)[0][0] if lengths else default


def count_layers(shapes: Mapping[str, Shape], prefix: str, default: int) -> int:
    numbers = {int(n.removeprefix(prefix).split(".")[0]) for n in shapes if re.match(re.escape(prefix) + r"\d+\.", n)}
    return max(numbers) + 1 if numbers else default


def measure(shapes: Mapping[str, Shape], *, name: str) -> Blip2Config:
    """Every dimension that shapes (by LAVIS name) show. `infer_missing` replaces heads (1 here) and eps (LAVIS's here).

    Raises:
        CheckpointError: the number of patches is not a square, or cross-attention layers are not evenly spaced.
    """
    qformer = measure_qformer(shapes)
    embed_dim = dimension(shapes, "vision_proj.weight", 0, 256)
    return Blip2Config(name, measure_vision(shapes), qformer, embed_dim)


def measure_vision(shapes: Mapping[str, Shape]) -> VisionConfig:
    clip = any(n.startswith(("visual_encoder.transformer.", "visual_encoder.conv1.")) for n in shapes)
    family: VisionFamily = "clip" if clip else "eva"
    names = VISION_NAMES[family]
    known = names.known
    patch = dimension(shapes, names.patch, 2, known.patch_size)
    positions = dimension(shapes, names.positions, names.positions_axis, known.tokens)
    grid = isqrt(max(positions - 1, 0))
    if grid < 1 or grid**2 + 1 != positions:
        raise CheckpointError(
            f"{names.positions} holds {positions} positions; expected one for CLS and a square number of patches, "
            f"for example {known.tokens} at {known.image_size} px",
            code="checkpoint-positions",
        )
    return VisionConfig(
        family=family,
        image_size=grid * patch,
        patch_size=patch,
        width=dimension(shapes, f"{names.blocks}*.{names.norm}", 0, known.width),
        layers=count_layers(shapes, names.blocks, known.layers),
        heads=1,
        mlp_width=dimension(shapes, f"{names.blocks}*.{names.fc1}", 0, known.mlp_width),
        layer_norm_eps=known.layer_norm_eps,
        qkv_bias=clip or any(n.endswith((".attn.q_bias", ".attn.v_bias")) for n in shapes),
    )


def measure_qformer(shapes: Mapping[str, Shape]) -> QFormerConfig:
    known = BERT_QFORMER
    layers = count_layers(shapes, QFORMER_LAYER, known.layers)
    return QFormerConfig(
        width=dimension(shapes, f"{QFORMER_LAYER}*.attention.output.LayerNorm.weight", 0, known.width),
        layers=layers,
        heads=1,
        mlp_width=dimension(shapes, f"{QFORMER_LAYER}*.intermediate_query.dense.weight", 0, known.mlp_width),
        cross_attention_frequency=cross_attention_frequency(shapes, layers),
        queries=dimension(shapes, "query_tokens", 1, known.queries),
        vocab_size=dimension(shapes, "Qformer.bert.embeddings.word_embeddings.weight", 0, known.vocab_size),
        max_positions=dimension(shapes, "Qformer.bert.embeddings.position_embeddings.weight", 0, known.max_positions),
        layer_norm_eps=known.layer_norm_eps,
    )


def cross_attention_frequency(shapes: Mapping[str, Shape], layers: int) -> int:
    """f, if exactly the layers 0, f, 2f, … attend to the image."""
    pattern = re.compile(re.escape(QFORMER_LAYER) + r"(\d+)\.crossattention\..+")
    cross = sorted({int(match[1]) for name in shapes if (match := pattern.fullmatch(name))})
    if not cross:
        raise CheckpointError(
            "no Q-Former layer has cross-attention; expected it in layer 0 and every f-th layer after it",
            code="checkpoint-cross-attention",
        )
    frequency = cross[1] if len(cross) > 1 else layers
    if cross != list(range(0, layers, frequency)):
        raise CheckpointError(
            f"the Q-Former layers {', '.join(map(str, cross))} of {layers} have cross-attention; expected 0, f, 2f, … "
            "(0, 2, 4, 6, 8, 10 of 12): tensors of a layer are missing, or this is another architecture",
            code="checkpoint-cross-attention",
        )
    return frequency


def backbone_layers(entries: Mapping[str, TensorInfo], layers: int | None, source: str) -> tuple[int, tuple[str, ...]]:
    """How many blocks of a vision backbone's file BLIP-2 uses, and notes on assumptions.

    `layers` if given, else the number in the published model of that width, else all.

    Raises:
        CheckpointError: the file is not a vision backbone, or has fewer blocks than `layers`.
    """
    shapes = {f"visual_encoder.{name}": info.shape for name, info in entries.items()}
    clip = "visual_encoder.conv1.weight" in shapes
    names = VISION_NAMES["clip" if clip else "eva"]
    there = count_layers(shapes, names.blocks, 0)
    if not there:
        raise CheckpointError(
            f"{source} is not a vision backbone: it has no tensor named blocks.0.… (EVA) or transformer.resblocks.0.… "
            f"(CLIP), but {shorten(sorted(entries), 5)}; expected LAVIS's eva_vit_g.pth or clip_vit_L.pth",
            code="vision-checkpoint-unknown",
        )
    width = dimension(shapes, f"{names.blocks}*.{names.norm}", 0, 0)
    wanted = layers or (names.known.layers if width == names.known.width else there)
    if wanted > there and layers is not None:
        raise CheckpointError(
            f"{source} has {there} blocks, expected at least {wanted}; pass the right backbone",
            code="vision-checkpoint-blocks",
        )
    used = min(wanted, there)
    note = f"vision layers: {used} of the {there} blocks in {source} (--vision-layers overrides)"
    return used, () if layers else (note,)


def parameter_shapes(config: Blip2Config) -> dict[str, Shape]:
    """Names and shapes of all parameters of the network, without allocation."""
    with torch.device("meta"):
        model = Blip2Retrieval(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
