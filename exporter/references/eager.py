"""The PyTorch reference: the same network in eager float32, with the perturbation from a float64 eigendecomposition.

It shares the network's modules with the traced graphs, but not the tracer, the passes, the lowering or the weight
recipes. Each family's upstream references share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qpert.exporter.checkpoints.checkpoint import Checkpoint, load_state
from qpert.exporter.families.base import Family
from qpert.graphs.perturbation.choices import GraphPerturbation
from qpert.graphs.perturbation.oracle import key_subspaces
from qpert.runtime.bundle.graph_spec import GraphSpec

BOXES_AT_ONCE = 4
"""The float64 keys of one box take 25 MB an image in the full-size model."""


class TorchReference:
    """Runs a family's stages in eager PyTorch. `run` has a session's signature."""

    name = "torch"

    def __init__(
        self,
        family: Family,
        network: nn.Module,
        graphs: Mapping[str, GraphSpec],
        perturbation: GraphPerturbation | None,
    ) -> None:
        self.family = family
        self.network = network.eval()
        self.stages = {name: stage.eval() for name, stage in family.stages(network).items()}
        self.graphs = graphs
        self.perturbation = perturbation

    @classmethod
    def open(
        cls,
        family: Family,
        checkpoint: Checkpoint,
        graphs: Mapping[str, GraphSpec],
        perturbation: GraphPerturbation | None,
    ) -> TorchReference:
        """A reference over an open checkpoint. `graphs` name the outputs."""
        with torch.device("meta"):
            network = family.network(checkpoint.config, perturbation)
        network.load_state_dict(load_state(checkpoint), assign=True, strict=True)
        return cls(family, network, graphs, perturbation)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs and outputs as the graph of that name declares them; features may have half precision."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        arguments = {name: _as_float32(tensor) for name, tensor in tensors.items()}
        (output,) = self.graphs[graph].output_names
        with torch.inference_mode():
            return {output: self.stages[graph](**arguments).numpy()}

    def cut_margins(self, image_tokens: np.ndarray, object_masks: np.ndarray) -> np.ndarray:
        """How clear each box's cut is, float64 [B, O]: the least of |c − τ| and of the relative eigenvalue gap over all
        layers and heads. Near zero, float32 cannot decide the rank.
        """
        if self.perturbation is None or not object_masks.shape[1]:
            return np.full(object_masks.shape[:2], np.inf)
        clear = []
        with torch.inference_mode():
            keys = self.family.keys(self.network, torch.from_numpy(image_tokens).float())  # [B, A, H, N, d]
            for masks in torch.from_numpy(object_masks).split(BOXES_AT_ONCE, dim=1):
                cut = key_subspaces(keys, masks, threshold=self.perturbation.threshold)
                clear.append(torch.minimum(cut.margins, cut.gaps).flatten(2).amin(-1))
        return torch.cat(clear, dim=1).numpy()


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
