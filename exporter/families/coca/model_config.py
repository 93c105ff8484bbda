"""open_clip's configuration of a CoCa model: `model_cfg` and `preprocess_cfg` of `open_clip_config.json`.

Every field is used, restricted to the value that the network has, or known to be without effect in retrieval; any other
is refused by name, as open_clip itself refuses it.

Source: open_clip 3.3.0 `model.py` (`CLIPVisionCfg`, `CLIPTextCfg`), `coca_model.py`, `transform.py` (`PreprocessCfg`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.config_fields import dotted
from qpert.exporter.checkpoints.image_processor import Triple
from qpert.exporter.checkpoints.json_files import positive_number, read_json_object, whole_number
from qpert.graphs.families.coca.config import CONFIGS, HEAD_WIDTH, LAYER_NORM_EPS, CocaConfig
from qpert.graphs.transformer import TextConfig, VisionConfig
from qpert.runtime.errors import CheckpointError
from qpert.runtime.inputs.preprocessing import ImagePreprocessing

CONFIG_NAME = "open_clip_config.json"
ADVICE = "only the CoCa models of one pooler are supported, coca_ViT-L-14 and coca_ViT-B-32 for instance"

BLOCKS = {
    **{"ls_init_value": None, "act_kwargs": None, "norm_kwargs": None, "block_type": None, "qk_norm": False},
    **{"scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False, "scale_attn": False},
    **{"scale_fc": False, "mlp_ratio": 4.0},
}
"""Variants of transformer blocks, and the values that mean the usual one."""

VISION_USED = frozenset(
    {"layers", "width", "head_width", "patch_size", "image_size", "attn_pooler_heads", "attn_pooler_queries"}
)
VISION_ONLY = BLOCKS | {
    **{"attentional_pool": True, "no_ln_pre": False, "pos_embed_type": "learnable", "pool_type": "tok"},
    **{"timm_model_name": None},
}
VISION_FREE = frozenset(
    {"output_tokens", "patch_dropout", "final_ln_after_pool", "timm_model_pretrained", "timm_pool", "timm_proj"}
    | {"timm_proj_bias", "timm_drop", "timm_drop_path"}
)
TEXT_USED = frozenset({"context_length", "vocab_size", "width", "heads", "layers"})
TEXT_ONLY = BLOCKS | {
    **{"embed_cls": True, "pad_id": 0, "no_causal_mask": False, "proj_bias": False, "proj_type": "linear"},
    **{"hf_model_name": None, "hf_tokenizer_name": None, "tokenizer_mode": None, "tokenizer_kwargs": None},
    **{"correct_cls_mask": False, "use_pad_mask": False},
}
TEXT_FREE = frozenset(
    {"output_tokens", "final_ln_after_pool", "pool_type", "eos_id", "hf_model_pretrained", "hf_proj_type"}
    | {"hf_pooler_type"}
)
MODEL_USED = frozenset({"embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu"})
MODEL_FREE = frozenset({"custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "cast_dtype"})
PREPROCESS = frozenset({"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"})


@dataclass(frozen=True)
class ModelConfig:
    """A configuration as read. `model` and `preprocess`: open_clip's own dictionaries, for its own constructor."""

    config: CocaConfig
    preprocessing: ImagePreprocessing
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any] = field(default_factory=dict)


def published(name: str) -> ModelConfig:
    """The configuration of a published model."""
    config = CONFIGS[name]
    return ModelConfig(config, image_preprocessing("", {}, config.vision.image_size, None), model_cfg(config))


def model_cfg(config: CocaConfig) -> dict[str, Any]:
    """open_clip's `model_cfg` of a configuration."""
    vision, text = config.vision, config.text
    words = {"context_length": text.max_positions, "vocab_size": text.vocab_size, "width": text.width}
    words |= {"heads": text.heads, "layers": text.layers}
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            **{"image_size": vision.image_size, "layers": vision.layers, "width": vision.width},
            **{"head_width": vision.width // vision.heads, "patch_size": vision.patch_size},
            **{"attentional_pool": True, "attn_pooler_heads": config.pooler_heads, "output_tokens": True},
        },
        "text_cfg": words | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": words | {"attn_pooler_heads": text.heads},
        "custom_text": True,
    }


def read_model_config(path: Path, name: str, resize: str | None) -> ModelConfig:
    """`open_clip_config.json`, or one of open_clip's `model_configs`, which is a bare `model_cfg`.

    `resize`: `--resize`, which replaces the file's `resize_mode`.

    Raises:
        CheckpointError: unreadable, not CoCa, or a field that is unknown or has an unsupported value, named.
    """
    values = read_json_object(path)
    model = values.get("model_cfg", values)
    preprocess = values.get("preprocess_cfg") or {}
    for key, part in (("model_cfg", model), ("preprocess_cfg", preprocess)):
        if not isinstance(part, dict):
            raise CheckpointError(
                f"{path} has {key} {part!r}, expected an object; download it again", code="hub-config-section"
            )
    config = _read_model(path, model, name)
    prepared = image_preprocessing(str(path), preprocess, config.vision.image_size, resize)
    return ModelConfig(config, prepared, model, preprocess)


def _read_model(path: Path, model: Mapping[str, Any], name: str) -> CocaConfig:
    _refuse_unknown(path, "", model, MODEL_USED | MODEL_FREE | {"pad_id"})
    vision, text = _section(path, model, "vision_cfg"), _section(path, model, "text_cfg")
    _section(path, model, "multimodal_cfg")
    _check(path, "vision_cfg", vision, VISION_ONLY, VISION_USED | VISION_FREE)
    _check(path, "text_cfg", text, TEXT_ONLY, TEXT_USED | TEXT_FREE)
    _check(path, "", model, {"pad_id": 0, "quick_gelu": (False, True)}, MODEL_USED | MODEL_FREE)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    embed_dim = whole_number(str(path), model, "embed_dim")
    try:
        return CocaConfig(
            name,
            _vision(path, vision, activation),
            _text(path, text, activation),
            embed_dim,
            whole_number(f"{path}, vision_cfg", {"attn_pooler_heads": 8, **vision}, "attn_pooler_heads"),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; correct or download it again", code="hub-config-value") from error


def _vision(path: Path, values: Mapping[str, Any], activation: str) -> VisionConfig:
    where = f"{path}, vision_cfg"
    stated = {"layers": 12, "width": 768, "head_width": HEAD_WIDTH, "patch_size": 16, "image_size": 224, **values}
    width, layers, head_width, patch, size = (
        whole_number(where, stated, key) for key in ("width", "layers", "head_width", "patch_size", "image_size")
    )
    if width % head_width:
        raise ValueError(f"vision_cfg.width {width} is not a multiple of head_width {head_width}")
    return VisionConfig(width, layers, width // head_width, 4 * width, activation, LAYER_NORM_EPS, size, patch)


def _text(path: Path, values: Mapping[str, Any], activation: str) -> TextConfig:
    where = f"{path}, text_cfg"
    stated = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, **values}
    width, layers, heads, rows, length = (
        whole_number(where, stated, key) for key in ("width", "layers", "heads", "vocab_size", "context_length")
    )
    return TextConfig(width, layers, heads, 4 * width, activation, LAYER_NORM_EPS, rows, length)


def _section(path: Path, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    if not isinstance(part, dict):
        raise CheckpointError(
            f"{path} has {name} {part!r}: a CoCa model has vision_cfg, text_cfg and multimodal_cfg; {ADVICE}. CLIP in "
            "Hugging Face's form is exported by `qpert export clip`",
            code="coca-config-section",
        )
    return part


def _check(path: Path, section: str, values: Mapping[str, Any], only: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise for a field with an unsupported value, or that is unknown. `only`: the value, or several in a tuple."""
    for key, supported in only.items():
        choices = supported if isinstance(supported, tuple) else (supported,)
        stated = values.get(key, choices[0] if key not in NEEDED else None)
        empty = choices == (None,) and stated == {}
        if stated not in choices and not empty:
            raise CheckpointError(
                f"{path} has {dotted(section, key)} {stated!r}, expected {choices[0]!r}: {ADVICE}{_hint(key)}",
                code="coca-config-unsupported",
            )
    _refuse_unknown(path, section, values, known | only.keys())


NEEDED = ("attentional_pool", "embed_cls")
"""Fields whose default is another value than CoCa's."""


def _hint(key: str) -> str:
    return "; a CLIP model is exported by `qpert export clip`, from Hugging Face's form" if key in NEEDED else ""


def _refuse_unknown(path: Path, section: str, values: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := sorted(values.keys() - known):
        names = ", ".join(dotted(section, key) for key in unknown)
        raise CheckpointError(
            f"{path} has unknown fields, which could change the network: {names}; expected those of open_clip 3.3.0: "
            "remove them if they have no effect",
            code="coca-config-unknown",
        )


def image_preprocessing(
    path: str, values: Mapping[str, Any], image_size: int, resize: str | None
) -> ImagePreprocessing:
    """How images are prepared. `path` is for messages; `resize` replaces `resize_mode`."""
    if unknown := sorted(values.keys() - PREPROCESS):
        raise CheckpointError(
            f"{path} has unknown fields in preprocess_cfg: {', '.join(unknown)}; expected "
            f"{', '.join(sorted(PREPROCESS))}",
            code="preprocessing-unsupported",
        )
    usual = ImagePreprocessing(image_size)
    stated = {key: value for key, value in values.items() if value is not None}
    mode = resize or stated.get("resize_mode", "shortest")
    resample = stated.get("interpolation", "bicubic")
    for key, value, choices in (
        ("resize_mode", mode, ("shortest", "squash")),
        ("interpolation", resample, ("bicubic", "bilinear")),
        ("mode", stated.get("mode", "RGB"), ("RGB",)),
        ("size", stated.get("size", image_size), (image_size, [image_size], [image_size] * 2)),
    ):
        if value not in choices:
            raise CheckpointError(
                f"{path} has preprocess_cfg.{key} {value!r}, expected {' or '.join(map(repr, choices))}"
                + ("; --resize squash or shortest replaces it" if key == "resize_mode" else ""),
                code="preprocessing-unsupported",
            )
    mean, std = _triple(path, stated, "mean", usual.mean), _triple(path, stated, "std", usual.std)
    if mode == "squash":
        return ImagePreprocessing(image_size, mean, std, resample)
    return ImagePreprocessing(image_size, mean, std, resample, "crop", image_size, "half_even")


def _triple(path: str, values: Mapping[str, Any], key: str, usual: Triple) -> Triple:
    """Three numbers, or one for all channels; a standard deviation must be above 0."""
    stated = values.get(key, usual)
    numbers = list(stated) if isinstance(stated, list | tuple) else [stated] * 3
    usable = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < float("inf")]
    if len(usable) != 3 or len(numbers) != 3:
        raise CheckpointError(
            f"{path} has preprocess_cfg.{key} {stated!r}, expected three numbers; correct or download it again",
            code="preprocessing-value",
        )
    if key == "std":
        for number in usable:
            positive_number(f"{path}, preprocess_cfg", {"std": number}, "std")
    red, green, blue = map(float, usable)
    return red, green, blue
