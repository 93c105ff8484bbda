"""`config.json` of a two-tower model: its vision and text sections, and the expected tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qpert.exporter.checkpoints.config_fields import ANY_MODEL, EVERY_CONFIG, Fields, check_fields
from qpert.exporter.checkpoints.files import TensorInfo, foreign_extras
from qpert.exporter.checkpoints.json_files import positive_number, whole_number
from qpert.graphs.transformer import ACTIVATIONS, EncoderConfig, TextConfig, VisionConfig
from qpert.runtime.errors import CheckpointError

Shape = tuple[int, ...]
Config = TypeVar("Config", bound=EncoderConfig)


def check_class(path: Path, values: Mapping[str, Any], model_type: str, architecture: str, advice: str) -> None:
    """Raise unless config.json describes the whole model, with both towers.

    Raises:
        CheckpointError: `hub-model-type`; `hub-architecture` for a single tower; or `hub-quantized`.
    """
    if values.get("model_type") != model_type:
        raise CheckpointError(
            f"{path} describes a {values.get('model_type')!r} model, expected {model_type!r}; {advice}",
            code="hub-model-type",
        )
    classes = values.get("architectures") or [architecture]
    if architecture not in classes:
        raise CheckpointError(
            f"{path} describes {', '.join(map(str, classes))}, expected {architecture}, which has both towers; "
            f"{advice}",
            code="hub-architecture",
        )
    if values.get("quantization_config"):
        raise CheckpointError(
            f"{path} describes quantized weights (quantization_config); expected the original ones: qpert quantizes "
            "the exported bundle itself",
            code="hub-quantized",
        )


def section(path: Path, values: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The section `name` over transformers' defaults.

    Raises:
        CheckpointError: `hub-config-section`, it is not an object.
    """
    part = values.get(name)
    if part is not None and not isinstance(part, dict):
        raise CheckpointError(
            f"{path} has {name} {part!r}, expected an object; download it again", code="hub-config-section"
        )
    return {**defaults, **(part or {})}


def assumed_defaults(name: str, part: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on values that a section omits and tensors do not show."""
    return tuple(
        f"config.json omits {name}.{key}: transformers' default {defaults[key]!r} is used"
        for key in ("num_attention_heads", "layer_norm_eps", "hidden_act", "eos_token_id")
        if key in defaults and key not in (part or {})
    )


PROJECTION = frozenset({"projection_dim"})

WHOLE_MODEL = Fields(
    frozenset({"text_config", "vision_config", "text_config_dict", "vision_config_dict", "projection_dim"}),
    ANY_MODEL,
    EVERY_CONFIG | {"logit_scale_init_value"},  # an initial value: the trained one does not change ranks either
)


def unknown_fields(
    path: Path, values: Mapping[str, Any], parts: Mapping[str, tuple[Mapping[str, Any], Collection[str]]]
) -> tuple[str, ...]:
    """Notes on fields that neither change the results nor are known. `parts`: by section, its values and used fields.

    Raises:
        CheckpointError: `hub-config-unsupported`, a known field has an unsupported value.
    """
    notes = check_fields(path, "", values, WHOLE_MODEL)
    for name, (part, used) in parts.items():
        # the projection of the whole model decides; that of a section is for models of one tower
        fields = Fields(frozenset(used), {**ANY_MODEL, "add_cross_attention": (False, None)}, EVERY_CONFIG | PROJECTION)
        notes += check_fields(path, name, part, fields)
    return notes


def read_vision(path: Path, part: Mapping[str, Any]) -> VisionConfig:
    """The vision section, defaults filled in.

    Raises:
        CheckpointError: a value is not a number or contradicts another, the activation is unknown, or images do not
            have three channels.
    """
    where = f"{path}, vision_config"
    if (channels := whole_number(where, part, "num_channels")) != 3:
        raise CheckpointError(
            f"{where} has num_channels {channels}; only 3, RGB, is supported", code="hub-config-unsupported"
        )
    sizes = whole_number(where, part, "image_size"), whole_number(where, part, "patch_size")
    return _fitting(where, lambda: VisionConfig(*_encoder(where, part), *sizes))


def read_text(path: Path, part: Mapping[str, Any]) -> TextConfig:
    """The text section, defaults filled in. Errors as in `read_vision`."""
    where = f"{path}, text_config"
    sizes = whole_number(where, part, "vocab_size"), whole_number(where, part, "max_position_embeddings")
    return _fitting(where, lambda: TextConfig(*_encoder(where, part), *sizes))


SAME_ACTIVATION = {"gelu_python": "gelu"}
"""The exact GELU, written out with erf (transformers `activations.py`)."""


def _encoder(where: str, part: Mapping[str, Any]) -> tuple[int, int, int, int, str, float]:
    activation = SAME_ACTIVATION.get(str(part.get("hidden_act")), part.get("hidden_act"))
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{where} has hidden_act {activation!r}; supported are {', '.join(ACTIVATIONS)}",
            code="hub-config-unsupported",
        )
    return (
        whole_number(where, part, "hidden_size"),
        whole_number(where, part, "num_hidden_layers"),
        whole_number(where, part, "num_attention_heads"),
        whole_number(where, part, "intermediate_size"),
        activation,
        positive_number(where, part, "layer_norm_eps"),
    )


def _fitting(where: str, make: Callable[[], Config]) -> Config:
    try:
        return make()
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}; correct or download it again", code="hub-config-value") from error


def parameter_shapes(make: Callable[[], nn.Module]) -> dict[str, Shape]:
    """Names and shapes of a network's parameters, without allocation."""
    with torch.device("meta"):
        model = make()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_tensors(
    entries: Mapping[str, TensorInfo],
    expected: Mapping[str, Shape],
    unused: frozenset[str],
    source: str,
    *,
    described: str = "its config.json",
) -> None:
    """Raise unless the file holds every parameter in its shape, and no others in a part of the network.

    `unused` are tensors inside a part that may exist too. `described`: the file that describes them, for the message.

    Raises:
        CheckpointError: `checkpoint-tensors`, with all faults in one message.
    """
    missing = sorted(expected.keys() - entries.keys())
    extra = sorted(entries.keys() - expected.keys() - unused - set(foreign_extras(entries, parts_of(expected))))
    wrong = [
        f"{name} {list(entries[name].shape)} (expected {list(shape)})"
        for name, shape in sorted(expected.items())
        if name in entries and entries[name].shape != shape
    ]
    whole = [name for name in expected if name in entries and not _is_floating(entries[name].dtype)]
    found = {"missing": missing, "unexpected": extra, "of another shape": wrong, "not floating-point": whole}
    if any(found.values()):
        shown = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            for kind, names in found.items()
            if names
        )
        raise CheckpointError(
            f"{source} does not hold the tensors that {described} describes ({shown}); download the folder again",
            code="checkpoint-tensors",
        )


def parts_of(names: Iterable[str]) -> frozenset[str]:
    """The first components of tensor names, such as `vision_model`."""
    return frozenset(name.partition(".")[0] for name in names)


def _is_floating(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))
