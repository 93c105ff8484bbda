"""Stock two-tower models of transformers, with the inputs and outputs of the exported graphs.

Shares no network code with `qpert.graphs`, which is compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpert.exporter.checkpoints.files import foreign_extras
from qpert.exporter.families.declare import GRAPH_NAMES, TENSOR_NAMES
from qpert.exporter.hub.towers import parts_of
from qpert.runtime.bundle import roles
from qpert.runtime.errors import CheckpointError, UnavailableError
from qpert.runtime.libraries import turn_off_telemetry

VISION, HEAD, TEXT = (GRAPH_NAMES[role] for role in (roles.IMAGE_TOWER, roles.QUERY_HEAD, roles.TEXT_TOWER))
PIXELS, IMAGE_TOKENS, TOKEN_IDS = (TENSOR_NAMES[slot] for slot in (roles.PIXELS, roles.IMAGE_TOKENS, roles.TOKEN_IDS))
IMAGE_VECTORS, TEXT_VECTORS = TENSOR_NAMES[roles.IMAGE_VECTORS], TENSOR_NAMES[roles.TEXT_VECTORS]
INPUTS = {VISION: {PIXELS}, HEAD: {IMAGE_TOKENS}, TEXT: {TOKEN_IDS}}
BOX_INPUTS = {TENSOR_NAMES[slot] for slot in roles.BOX_SLOTS}


def load_stock(class_name: str, folder_or_id: str | Path, prefix: str = "") -> nn.Module:
    """`transformers.<class_name>` in float32 on the CPU, attention written out, every tensor from the checkpoint.

    `prefix`: removed from every tensor's name (`module.`).

    Raises:
        UnavailableError: transformers is not installed.
        CheckpointError: it cannot be loaded, or tensors are missing, unexpected or of another shape (transformers
            itself only warns).
    """
    turn_off_telemetry()
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(
            f"the Hugging Face reference needs transformers ({error}): pip install 'qpert[hf]'",
            code="transformers-missing",
        ) from error
    try:
        model, report = getattr(transformers, class_name).from_pretrained(
            str(folder_or_id),
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # so that they are reported below, with the rest
            key_mapping={f"^{re.escape(prefix)}": ""} if prefix else None,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder_or_id} cannot be loaded as {class_name}: {error}", code="stock-model"
        ) from error
    _check_report(class_name, str(folder_or_id), report, parts_of(model.state_dict()))
    return cast(nn.Module, model.eval().requires_grad_(False))


def _check_report(class_name: str, source: str, report: Mapping[str, Any], parts: frozenset[str]) -> None:
    kinds = {kind: sorted(map(str, report.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected")}
    kinds["mismatched"] = sorted(str(item[0]) for item in report.get("mismatched_keys") or ())
    foreign = set(foreign_extras(kinds["unexpected"], parts))
    kinds["unexpected"] = [n for n in kinds["unexpected"] if n not in foreign and not n.endswith("position_ids")]
    if any(kinds.values()):
        found = "; ".join(f"{len(names)} {kind} ({', '.join(names[:4])})" for kind, names in kinds.items() if names)
        raise CheckpointError(
            f"{source} does not hold the tensors of {class_name}: {found}; download the folder again",
            code="checkpoint-tensors",
        )


class TwoTowerReference:
    """The graphs of a family without a pair scorer, computed by a stock model. A subclass names the model's parts.

    `pixels`: the folder's stock image processor, if it is known (`hub.stock_inputs`).
    """

    name = "hf"
    pixels: Callable[[Path], np.ndarray] | None = None
    class_name: ClassVar[str]
    perturbable: bool = False
    """Whether the query head takes boxes."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """[B,3,S,S] → [B,N,C], the input of the pooling."""
        size = self.model.config.vision_config.image_size
        output = self.model.vision_model(pixel_values, interpolate_pos_encoding=pixel_values.shape[-1] != size)
        return cast(Tensor, output.last_hidden_state)

    def image_vector(
        self, image_tokens: Tensor, object_masks: Tensor | None = None, box_weights: Tensor | None = None
    ) -> Tensor:
        """[B,N,C] → [B,E]."""
        raise NotImplementedError

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of `graph`, named and shaped as the exported graph's, float32.

        Args:
            graph: the name of the image tower, query head or text tower.
            inputs: by name; features may have half precision. If the family takes boxes, masks [B,O,N] and weights
                [B,O] are optional; without them it is the stock model.

        Raises:
            ValueError: an unknown graph, or inputs that are not the graph's.
        """
        self._check(graph, inputs)
        arrays = {name: torch.from_numpy(np.array(value, order="C")) for name, value in inputs.items()}
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in arrays.items()}
        if graph == VISION:
            outputs = {IMAGE_TOKENS: self.image_tokens(tensors[PIXELS])}
        elif graph == TEXT:
            outputs = {TEXT_VECTORS: F.normalize(self.model.get_text_features(**tensors).pooler_output, dim=-1)}
        else:
            vector = self.image_vector(tensors.pop(IMAGE_TOKENS), **tensors)
            outputs = {IMAGE_VECTORS: F.normalize(vector, dim=-1)[:, None]}
        return {name: value.float().contiguous().numpy() for name, value in outputs.items()}

    def _check(self, graph: str, inputs: Mapping[str, np.ndarray]) -> None:
        if graph not in INPUTS:
            raise ValueError(f"graph is {graph!r}, expected one of {', '.join(INPUTS)}")
        allowed = [INPUTS[graph]]
        if graph == HEAD and self.perturbable:
            allowed.append(INPUTS[graph] | BOX_INPUTS)
        if set(inputs) not in allowed:
            expected = " or ".join(str(sorted(names)) for names in allowed)
            raise ValueError(f"{graph} got {sorted(inputs)}, expected {expected}")

    def close(self) -> None:
        """Drop the model."""
        self.model = None

    def __exit__(self, *_: object) -> None:
        self.close()
