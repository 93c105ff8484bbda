"""Baselines of `qpert bench`: the same network in PyTorch, and stock Hugging Face.

| name | is |
| --- | --- |
| `torch` | the network's modules in eager PyTorch, attention written out as LAVIS writes it |
| `torch-sdpa` | the same with PyTorch's `scaled_dot_product_attention` |
| `torch-compile` | the same as `torch-sdpa`, through `torch.compile` |
| `hf` | the family's stock model in Hugging Face transformers, attention written out; without boxes |

`torch` shares keys and values among the texts of an image, as the graphs do; stock code computes them for every pair.
On the CPU all use float32. On a GPU the torch ones use the bundle's precision, with LayerNorm in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpert.exporter.checkpoints.checkpoint import Checkpoint, load_state
from qpert.exporter.families import find_family
from qpert.exporter.families.base import Family
from qpert.exporter.perturbation import graph_perturbation
from qpert.exporter.references.protocol import Reference
from qpert.exporter.references.reopening import reopened
from qpert.exporter.tracing.trace import PRECISIONS
from qpert.graphs.layers import AttentionKernel, LayerNorm, attention, use_kernel
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import BOX_SLOTS
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.sessions.providers import find_provider
from qpert.runtime.verification.reference import Baseline

UPSTREAM = ("hf",)


@contextmanager
def open_baselines(
    names: Sequence[str], manifest: Manifest, checkpoint: str | None = None, *, provider: str = "cpu", threads: int = 0
) -> Iterator[tuple[Baseline, ...]]:
    """Open baselines over the exported weights.

    Args:
        names: from the table above.
        manifest: the bundle's.
        checkpoint: the weights; None uses the source in the manifest.
        provider: the session's; GPU providers are compared with PyTorch on the GPU.
        threads: PyTorch's on the CPU; 0 keeps the current number.

    Raises:
        InputError: an unknown name, or not the checkpoint that was exported.
        UnavailableError: a library, or a GPU for PyTorch, is missing.
    """
    if unknown := [name for name in names if name not in (*VARIANTS, *UPSTREAM)]:
        raise InputError(
            f"got baseline {', '.join(unknown)}, expected one or more of {', '.join((*VARIANTS, *UPSTREAM))}",
            code="baseline-unknown",
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    family = find_family(manifest.family)
    try:
        with reopened(family, manifest, checkpoint) as opened, ExitStack() as stack:
            settings = manifest.perturbation
            upstream = [
                stack.enter_context(family.upstream(name, opened, settings)) for name in names if name in UPSTREAM
            ]
            chosen = [VARIANTS[name] for name in names if name in VARIANTS]
            network = load_network(family, opened, manifest, device_of(provider)) if chosen else None
            compared = [TorchBaseline(variant, family, network, manifest) for variant in chosen if network is not None]
            yield (*compared, *(UpstreamBaseline(reference, manifest) for reference in upstream))
    finally:
        torch.set_num_threads(before)


def device_of(provider: str) -> str:
    if find_provider(provider).on_cpu:
        return "cpu"
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"provider {provider!r} is compared with PyTorch on the GPU, but this PyTorch {torch.__version__} has no "
            "GPU; install a CUDA build of torch, or remove --baseline",
            code="torch-without-cuda",
        )
    return "cuda"


def load_network(family: Family, checkpoint: Checkpoint, manifest: Manifest, device: str) -> nn.Module:
    """The network with its weights, float32 on the CPU, else in the bundle's precision with LayerNorm in float32."""
    with torch.device("meta"):
        network = family.network(checkpoint.config, graph_perturbation(manifest.perturbation), eigh_query_map)
    network.load_state_dict(load_state(checkpoint), assign=True, strict=True)
    if device != "cpu":
        network = network.to(device, PRECISIONS.get(manifest.precision, torch.float16))
        for module in network.modules():
            if isinstance(module, LayerNorm):
                module.float()
    return network.eval().requires_grad_(False)


def eigh_query_map(keys: Tensor, object_masks: Tensor, box_weights: Tensor, *, threshold: float) -> Tensor:
    """`qpert.graphs.perturbation.oracle.query_map` written for speed: float32, all matrices at once.

    Args:
        keys: float32 [B, A, H, N, d].
        object_masks: float32 [B, O, N].
        box_weights: float32 [B, O].
        threshold: τ.

    Returns:
        float32 [B, A, H, d, d].
    """
    masked = object_masks[:, :, None, None, :, None] * keys[:, None]  # [B, O, A, H, N, d]
    values, vectors = torch.linalg.eigh(masked.mT @ masked)  # ascending
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    total = values.sum(-1, keepdim=True)
    below = values.cumsum(-1) < threshold * total
    below[..., 0] = total[..., 0] > 0  # the rank is at least one where anything is covered
    leading = vectors * below[..., None, :]
    weighted = torch.einsum("bo,boahij->bahij", box_weights, leading @ leading.mT)
    return torch.eye(keys.shape[-1], device=keys.device) + weighted


def sdpa(queries: Tensor, keys: Tensor, values: Tensor, additive_mask: Tensor | None = None) -> Tensor:
    """`qpert.graphs.layers.attention` with PyTorch's own kernel; same shapes."""
    mask = None if additive_mask is None else additive_mask.to(queries.dtype)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


@dataclass(frozen=True)
class Variant:
    """One way to run the network in PyTorch."""

    name: str
    kernel: AttentionKernel
    compiled: bool = False


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("torch", attention),
        Variant("torch-sdpa", sdpa),
        Variant("torch-compile", sdpa, compiled=True),
    )
}


@dataclass
class TorchBaseline:
    """The network in PyTorch. Inputs and outputs are on the host, like a session's."""

    variant: Variant
    family: Family
    network: nn.Module
    manifest: Manifest
    compiled: dict[str, Any] = field(default_factory=dict)
    perturbs = True

    @property
    def name(self) -> str:
        return self.variant.name

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `qpert.runtime.verification.reference.Baseline`."""
        output = self.prepare(graph, inputs)()
        return {self.manifest.graphs[graph].output_names[0]: output.float().cpu().numpy()}

    def prepare(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Callable[[], Tensor]:
        """One stage as a call whose inputs are already where the network is, and whose output stays there: on a GPU its
        work may not have ended when the call returns. It is valid until a variant with another attention kernel is
        prepared or run on the same network.
        """
        given = without_empty_boxes(self.manifest.graphs[graph], inputs)
        tensors = {name: self._tensor(array) for name, array in given.items()}
        use_kernel(self.network, self.variant.kernel)
        stage = self._stage(graph)

        def call() -> Tensor:
            with torch.inference_mode():
                return self._run(stage, tensors)

        return call

    def _tensor(self, array: np.ndarray) -> Tensor:
        """Floating-point arrays as float32; the network casts them if its weights have another precision."""
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(next(self.network.parameters()).device)
        return tensor.float() if tensor.is_floating_point() else tensor

    def _stage(self, graph: str) -> Any:
        if graph not in self.compiled:
            stage = self.family.stages(self.network)[graph].eval()
            self.compiled[graph] = torch.compile(stage) if self.variant.compiled else stage
        return self.compiled[graph]

    def _run(self, stage: Any, tensors: dict[str, Tensor]) -> Tensor:
        if not self.variant.compiled:
            return stage(**tensors)
        try:
            return stage(**tensors)
        except RuntimeError as error:  # torch.compile without a compiler, or failing
            raise UnavailableError(
                f"torch.compile does not work here: {str(error).strip().splitlines()[0]}", code="torch-compile"
            ) from error


@dataclass(frozen=True)
class UpstreamBaseline:
    """A third-party network."""

    reference: Reference
    manifest: Manifest
    perturbs = False

    @property
    def name(self) -> str:
        return str(self.reference.name)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `qpert.runtime.verification.reference.Baseline`."""
        single = {
            name: array.astype(np.float32) if array.dtype == np.float16 else array
            for name, array in without_empty_boxes(self.manifest.graphs[graph], inputs).items()
        }
        return dict(self.reference.run(graph, single))


def without_empty_boxes(spec: GraphSpec, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs, without masks and weights if there are no boxes: then the stock network runs."""
    boxes = [spec.input(slot).name for slot in BOX_SLOTS] if spec.takes_boxes else []
    empty = bool(boxes) and not inputs[boxes[0]].shape[1]
    return {name: array for name, array in inputs.items() if not (empty and name in boxes)}
