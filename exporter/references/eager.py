"""The PyTorch reference: the same network in eager float32, with the perturbation from a float64 eigendecomposition.

It shares the network's modules with the traced graphs, but neither the tracer, nor the passes, nor the lowering, nor
the weight recipes. For a reference that shares nothing see `reference_hf` and `reference_lavis`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qpert.exporter.checkpoints.open import Checkpoint, load_state
from qpert.graphs.families.blip2.model import STAGES, Blip2Retrieval, GraphPerturbation
from qpert.graphs.perturbation.oracle import key_subspaces

BOXES_AT_ONCE = 4
"""The float64 keys of one box take 25 MB an image in the full-size model."""


class TorchReference:
    """Runs the four stages in eager PyTorch. `run` has the form of a session's."""

    name = "torch"

    def __init__(self, model: Blip2Retrieval) -> None:
        self.model = model.eval()

    @classmethod
    def open(cls, checkpoint: Checkpoint, perturbation: GraphPerturbation) -> TorchReference:
        with torch.device("meta"):
            model = Blip2Retrieval(checkpoint.config, perturbation)
        model.load_state_dict(load_state(checkpoint), assign=True, strict=True)
        return cls(model)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs and outputs as the graph of that name declares them; features may come in half precision."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        arguments = {name: _as_float32(tensor) for name, tensor in tensors.items()}
        with torch.inference_mode():
            output = STAGES[graph](self.model)(**arguments)
        return {OUTPUTS[graph]: output.numpy()}

    def cut_margins(self, image_embeds: np.ndarray, object_masks: np.ndarray) -> np.ndarray:
        """How clear each box's cut is, float64 [B, O]: the least of |c − τ| and of the relative eigenvalue gap over all
        layers and heads. Where it is near zero, the rank is not decided by float32 numbers.
        """
        if self.model.perturbation is None or not object_masks.shape[1]:
            return np.full(object_masks.shape[:2], np.inf)
        clear = []
        with torch.inference_mode():
            keys, _ = self.model.Qformer.keys_and_values(torch.from_numpy(image_embeds).float())
            stacked = torch.stack(keys, dim=1)  # [B, A, H, N, d]
            for masks in torch.from_numpy(object_masks).split(BOXES_AT_ONCE, dim=1):
                cut = key_subspaces(stacked, masks, threshold=self.model.perturbation.threshold)
                clear.append(torch.minimum(cut.margins, cut.gaps).flatten(2).amin(-1))
        return torch.cat(clear, dim=1).numpy()


OUTPUTS = {"vision": "image_embeds", "image_query": "query_embeds", "text": "text_embeds", "itm": "itm_scores"}


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
