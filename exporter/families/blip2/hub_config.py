"""`config.json` of a Hugging Face folder.

It must describe the class that qpert exports, and agree with the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpert.exporter.checkpoints.config_fields import check_fields
from qpert.exporter.checkpoints.json_files import read_json_object
from qpert.exporter.families.blip2.hub_fields import SECTIONS, check_activation
from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.errors import CheckpointError

ARCHITECTURE = "Blip2ForImageTextRetrieval"
ADVICE = "expected a retrieval checkpoint, such as Salesforce/blip2-itm-vit-g"

# transformers' defaults for values that config.json omits (configuration_blip_2.py).
VISION_DEFAULTS = {"num_attention_heads": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
QFORMER_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}


@dataclass(frozen=True)
class HubConfig:
    """The content of `config.json`. `dimensions`: stated ones that tensors show too. `dtype`: as stated."""

    path: Path
    vision_heads: int
    vision_eps: float
    qformer_heads: int
    qformer_eps: float
    dimensions: dict[str, int]
    dtype: str | None
    notes: tuple[str, ...]


def read_hub_config(folder: Path) -> HubConfig:
    """Read and check `folder/config.json`.

    Raises:
        CheckpointError: missing, not JSON, another model, or a value that is not a number or not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise CheckpointError(
            f"the folder {folder} has no config.json (it has {found}); {ADVICE}", code="hub-file-missing"
        )
    values = read_json_object(path)
    check_class(path, values)
    vision, qformer = (section(path, values, name) for name in ("vision_config", "qformer_config"))
    notes = check_fields(path, "", values, SECTIONS[""])
    for name, part, defaults in (
        ("vision_config", vision, VISION_DEFAULTS),
        ("qformer_config", qformer, QFORMER_DEFAULTS),
    ):
        notes += check_fields(path, name, part, SECTIONS[name])
        notes += check_activation(path, name, part.get("hidden_act", defaults["hidden_act"]))
        notes += assumed_defaults(name, part, defaults)
    notes += text_branch_note(qformer)
    vision, qformer = VISION_DEFAULTS | vision, QFORMER_DEFAULTS | qformer
    return HubConfig(
        path,
        int(number(path, vision, "num_attention_heads")),
        number(path, vision, "layer_norm_eps"),
        int(number(path, qformer, "num_attention_heads")),
        number(path, qformer, "layer_norm_eps"),
        stated_dimensions(path, values, vision, qformer),
        values.get("dtype") or values.get("torch_dtype"),
        notes,
    )


def assumed_defaults(name: str, part: dict[str, Any], defaults: dict[str, Any]) -> tuple[str, ...]:
    """Notes on values that the file omits and tensors do not show."""
    return tuple(
        f"config.json omits {name}.{key}: transformers' default {default} is used"
        for key, default in defaults.items()
        if key not in part and key != "hidden_act"
    )


def text_branch_note(qformer: dict[str, Any]) -> tuple[str, ...]:
    """A note on the flag that makes transformers load the text's feed-forward; qpert always requires it."""
    if qformer.get("use_qformer_text_input") is not False:
        return ()
    return ("config.json has use_qformer_text_input false; retrieval needs the text branch and uses its tensors",)


def check_class(path: Path, values: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless the class is BLIP-2's retrieval model."""
    model_type, classes = values.get("model_type"), values.get("architectures") or []
    named = ", ".join(map(str, classes)) if isinstance(classes, list) else str(classes)
    if model_type != "blip-2":
        raise CheckpointError(
            f"{path} describes an unknown architecture: model_type {model_type!r} ({named or 'no architectures'}); "
            f"expected 'blip-2' ({ARCHITECTURE}): {ADVICE}",
            code="hub-model-type",
        )
    if named and ARCHITECTURE not in classes:
        raise CheckpointError(
            f"{path} describes {named}, which has no ITC and ITM heads; expected {ARCHITECTURE}: {ADVICE}",
            code="hub-architecture",
        )


def section(path: Path, values: dict[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name) or {}
    if not isinstance(part, dict):
        raise CheckpointError(
            f"{path}: {name} is {part!r}, expected an object; download or copy it again", code="hub-config-section"
        )
    return part


def number(path: Path, values: dict[str, Any], key: str) -> float:
    value = values[key]
    value = value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value  # sizes may be [S, S]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise CheckpointError(
            f"{path} has {key} {value!r}, expected a positive number; correct or download it again",
            code="hub-config-value",
        )
    return float(value)


VISION_KEYS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "mlp_width": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
QFORMER_KEYS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "mlp_width": "intermediate_size",
    "cross_attention_frequency": "cross_attention_frequency",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "encoder_hidden_size": "encoder_hidden_size",
}
TOP_KEYS = {"qformer.queries": "num_query_tokens", "embed_dim": "image_text_hidden_size"}


def stated_dimensions(
    path: Path, values: dict[str, Any], vision: dict[str, Any], qformer: dict[str, Any]
) -> dict[str, int]:
    """Dimensions that the file states and tensors show too, by field of `Blip2Config`."""
    fields = [
        *((f"vision.{field}", vision, key) for field, key in VISION_KEYS.items()),
        *((f"qformer.{field}", qformer, key) for field, key in QFORMER_KEYS.items()),
        *((field, values, key) for field, key in TOP_KEYS.items()),
    ]
    stated = {field: int(number(path, part, key)) for field, part, key in fields if key in part}
    return stated | ({"vision.qkv_bias": bool(vision["qkv_bias"])} if "qkv_bias" in vision else {})


def check_agreement(hub: HubConfig, config: Blip2Config) -> None:
    """Raise `CheckpointError` with all contradictions between `config.json` and the tensors."""
    measured = measured_dimensions(config)
    stated = dict(hub.dimensions)
    frequency = "qformer.cross_attention_frequency"
    if stated.get(frequency, 0) > config.qformer.layers:  # any such number means that only layer 0 attends to the image
        stated[frequency] = config.qformer.layers
    wrong = [
        f"{field} {value} (tensors: {measured[field]})" for field, value in stated.items() if measured[field] != value
    ]
    if wrong:
        raise CheckpointError(
            f"{hub.path} contradicts the tensors in its folder: {'; '.join(wrong)}; they belong to different models, "
            "download the folder again",
            code="hub-config-contradiction",
        )


def measured_dimensions(config: Blip2Config) -> dict[str, Any]:
    """The fields of `config` by dotted name."""
    values = config.to_dict()
    nested = {f"{part}.{field}": value for part in ("vision", "qformer") for field, value in values[part].items()}
    return nested | {"embed_dim": values["embed_dim"], "qformer.encoder_hidden_size": config.vision.width}
