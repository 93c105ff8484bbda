"""Tensor names of open_clip's CoCa, and where each parameter of the network lies in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qpert.exporter.checkpoints.files import TensorInfo
from qpert.exporter.checkpoints.parameters import Origin
from qpert.exporter.hub.towers import Shape
from qpert.graphs.families.coca.config import CocaConfig
from qpert.graphs.transformer import EncoderConfig
from qpert.runtime.errors import CheckpointError

QUERY = "visual.attn_pool.query"
POSITIONS = "visual.positional_embedding"
PARTS = frozenset({"visual", "text"})
UNUSED_PARTS = ("text_decoder", "logit_scale", "logit_bias")
"""Not needed in retrieval: the caption decoder, and what changes all scores alike."""

POOLER = "visual.attn_pool.attn"
DIRECT = {
    "visual.embeddings.class_embedding": "visual.class_embedding",
    "visual.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "visual.embeddings.position_embedding.weight": POSITIONS,
    "pooler.query": QUERY,
    "proj": "visual.proj",
    "text.token_embedding.weight": "text.token_embedding.weight",
    "text.positional_embedding": "text.positional_embedding",
    "text.cls_emb": "text.cls_emb",
    "text.text_projection": "text.text_projection",
}
"""Parameter of the network → tensor; layers and blocks follow below."""
LAYERS = {
    "visual.ln_pre": "visual.ln_pre",
    "pooler.ln_q": "visual.attn_pool.ln_q",
    "pooler.ln_k": "visual.attn_pool.ln_k",
    "pooler.out_proj": f"{POOLER}.out_proj",
    "ln_post": "visual.ln_post",
    "text.ln_final": "text.ln_final",
}
BLOCK = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def origins(config: CocaConfig) -> dict[str, Origin]:
    """Parameter of `CocaRetrieval` → its tensor in the checkpoint, or the third of one."""
    found = {name: Origin(tensor) for name, tensor in DIRECT.items()}
    layers = dict(LAYERS)
    for tower, blocks in (("visual", config.vision.layers), ("text", config.text.layers)):
        for number in range(blocks):
            ours, theirs = f"{tower}.encoder.layers.{number}", f"{tower}.transformer.resblocks.{number}"
            layers |= {f"{ours}.{own}": f"{theirs}.{name}" for own, name in BLOCK.items()}
            for third, part in enumerate("qkv"):
                for kind in ("weight", "bias"):
                    found[f"{ours}.self_attn.{part}_proj.{kind}"] = Origin(f"{theirs}.attn.in_proj_{kind}", third)
    found |= {f"{own}.{kind}": Origin(f"{name}.{kind}") for own, name in layers.items() for kind in ("weight", "bias")}
    for third, part in enumerate("qkv"):
        found[f"pooler.{part}_proj.bias"] = Origin(f"{POOLER}.in_proj_bias", third)
        packed = Origin(f"{POOLER}.in_proj_weight", third)
        found[f"pooler.{part}_proj.weight"] = packed if is_packed(config) else Origin(f"{POOLER}.{part}_proj_weight")
    return found


def is_packed(config: CocaConfig) -> bool:
    """Whether the pooler has one matrix: `nn.MultiheadAttention` does where keys are as wide as queries."""
    return config.vision.width == config.embed_dim


def expected_shapes(config: CocaConfig, queries: int) -> dict[str, Shape]:
    """Every tensor of the two towers, by open_clip's names. `queries`: rows of the pooler's query, any number."""
    vision, text, width = config.vision, config.text, config.embed_dim
    shapes: dict[str, Shape] = {
        "visual.class_embedding": (vision.width,),
        "visual.conv1.weight": (vision.width, 3, vision.patch_size, vision.patch_size),
        POSITIONS: (config.tokens, vision.width),
        "visual.proj": (width, width),
        QUERY: (queries, width),
        f"{POOLER}.in_proj_bias": (3 * width,),
        f"{POOLER}.out_proj.weight": (width, width),
        f"{POOLER}.out_proj.bias": (width,),
        "text.cls_emb": (text.width,),
        "text.positional_embedding": (text.max_positions + 1, text.width),
        "text.text_projection": (text.width, width),
        "text.token_embedding.weight": (text.vocab_size, text.width),
    }
    if is_packed(config):
        shapes[f"{POOLER}.in_proj_weight"] = (3 * width, width)
    else:
        inputs = {"q": width, "k": vision.width, "v": vision.width}
        shapes |= {f"{POOLER}.{part}_proj_weight": (width, size) for part, size in inputs.items()}
    norms = {"visual.ln_pre": vision.width, "visual.attn_pool.ln_q": width, "visual.attn_pool.ln_k": vision.width}
    norms |= {"visual.ln_post": width, "text.ln_final": text.width}
    shapes |= {f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")}
    return shapes | _blocks("visual", vision) | _blocks("text", text)


def _blocks(tower: str, config: EncoderConfig) -> dict[str, Shape]:
    width, inner = config.width, config.mlp_width
    block: dict[str, Shape] = {"ln_1.weight": (width,), "ln_1.bias": (width,)}
    block |= {"ln_2.weight": (width,), "ln_2.bias": (width,)}
    for name, rows, columns in (
        ("attn.in_proj_", 3 * width, width),
        ("attn.out_proj.", width, width),
        ("mlp.c_fc.", inner, width),
        ("mlp.c_proj.", width, inner),
    ):
        block |= {f"{name}weight": (rows, columns), f"{name}bias": (rows,)}
    return {
        f"{tower}.transformer.resblocks.{number}.{name}": shape
        for number in range(config.layers)
        for name, shape in block.items()
    }


OTHERS = (
    ("visual.attn_pool_contrastive.", "a CoCa whose vision_cfg.attentional_pool is 'parallel' or 'cascade'", ""),
    ("visual.trunk.", "a model with a timm vision tower", ""),
    ("text.transformer.embeddings.", "a model with a Hugging Face text tower (coca_roberta)", ""),
    ("vision_model.", "a model in Hugging Face's form", ": pass its folder to `qpert export clip` or `siglip`"),
    ("Qformer.", "a BLIP-2 of LAVIS", ": use `qpert export blip2`"),
    ("qformer.", "a BLIP-2 of Hugging Face", ": use `qpert export blip2`"),
    ("token_embedding.", "a CLIP", ": `qpert export clip` takes it in Hugging Face's form"),
    ("text.token_embedding.", "a CLIP of open_clip", ": `qpert export clip` takes it in Hugging Face's form"),
)
"""The start of a tensor's name, what has such a name, and where it belongs."""


def check_kind(names: Iterable[str], source: str) -> None:
    """Raise unless these are the tensors of a CoCa with one pooler.

    Raises:
        CheckpointError: `coca-other-model`, naming a tensor that tells.
    """
    found = set(names)
    first, *others = OTHERS
    needed = [name for name in (QUERY, "text.cls_emb") if name not in found]
    for start, what, advice in (first, *(others if needed else ())):
        example = next((name for name in sorted(found) if name.startswith(start)), None)
        if example is not None:
            lacks = f" and no {', no '.join(needed)}" if needed else ""
            raise CheckpointError(
                f"{source} has {example}{lacks}: it is {what}, expected an open_clip CoCa of one pooler "
                f"(coca_ViT-L-14, coca_ViT-B-32){advice}",
                code="coca-other-model",
            )
    if needed:
        raise CheckpointError(
            f"{source} has no {', no '.join(needed)}; expected an open_clip CoCa checkpoint (coca_ViT-L-14, "
            "coca_ViT-B-32)",
            code="coca-other-model",
        )


def unknown_names(entries: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors outside the two towers that no CoCa has."""
    return sorted(name for name in entries if name.partition(".")[0] not in (*PARTS, *UNUSED_PARTS))
