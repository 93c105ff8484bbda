"""The pre-norm transformer that CLIP and SigLIP share, with the parameter names of Hugging Face's state dicts.

Sources: transformers `modeling_clip.py` and `modeling_siglip.py`. Their encoders are the same network; the families
differ in activation, class token, attention mask and pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn

from qpert.graphs.layers import AttentionModule, LayerNorm, merge_heads, split_heads


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702 x), OpenAI's approximation."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": tanh_gelu,
}
"""By the value of `hidden_act` in config.json."""


@dataclass(frozen=True)
class EncoderConfig:
    """A stack of transformer layers. `activation` is one of `ACTIVATIONS`."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    layer_norm_eps: float

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of its {self.heads} heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """A vision transformer on square images.

    `image_size` need not be a multiple of `patch_size`: pixels beyond the last whole patch, at the right and at the
    bottom, are ignored (SigLIP so400m/14 at 384 px has 27×27 patches).
    """

    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise ValueError(f"image size {self.image_size} is below one patch of {self.patch_size}")

    @property
    def grid(self) -> int:
        """Whole patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class TextConfig(EncoderConfig):
    """A text transformer with learned positions."""

    vocab_size: int
    max_positions: int


class SelfAttention(AttentionModule):
    """Self-attention with separate projections, all with a bias."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        queries, keys, values = (split_heads(part, self.heads) for part in projections)
        return self.out_proj(merge_heads(self.kernel(queries, keys, values, additive_mask)))


class Mlp(nn.Module):
    """`fc1`, the activation, `fc2`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), additive_mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers alone; the norms around them belong to the towers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, additive_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] → [B, N, C]. `additive_mask` as in `qpert.graphs.layers.attention`."""
        for layer in self.layers:
            x = layer(x, additive_mask)
        return x


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_positions, config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [T, L] → [T, L, C]."""
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


def patch_tokens(pixel_values: Tensor, projection: nn.Conv2d) -> Tensor:
    """A convolution whose stride equals its kernel, computed as a matrix product (ONNX's Conv does not support bfloat16
    before opset 22).

    Args:
        pixel_values: [B, 3, S, S] in the dtype of the projection's weight; S need not be a multiple of p.
        projection: kernel [C, 3, p, p], stride p, no padding.

    Returns:
        [B, ⌊S/p⌋², C], patches row by row.
    """
    size = projection.kernel_size[0]
    grid = pixel_values.shape[-1] // size
    whole = pixel_values[:, :, : grid * size, : grid * size]
    rows = whole.reshape(-1, 3, grid, size, grid, size)
    patches = rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, 3 * size * size)  # [B, N, 3pp]
    return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)


def interpolate_positions(positions: Tensor, grid: int, *, prefix_tokens: int) -> Tensor:
    """Position embeddings for another number of patches, as transformers' `interpolate_pos_encoding` computes them.

    Args:
        positions: [P + g², C], the stored tensor: P prefix tokens (CLS), then a square of patches, row by row.
        grid: patches along one side of the new image, ⌊image size / patch size⌋.
        prefix_tokens: P; their rows are kept unchanged.

    Returns:
        float32 [P + grid², C]: bicubic, corners not aligned. With the stored grid, the stored values.

    Raises:
        ValueError: the number of patch positions is not a square.
    """
    patches = positions.float()[prefix_tokens:]
    stored = isqrt(len(patches))
    if stored**2 != len(patches):
        raise ValueError(f"{len(patches)} patch positions, expected a square number")
    if stored == grid:
        return positions.float()
    image = patches.reshape(1, stored, stored, -1).permute(0, 3, 1, 2)  # [1, C, g, g]
    resized = nn.functional.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    return torch.cat([positions.float()[:prefix_tokens], rows])


def unit_length(x: Tensor) -> Tensor:
    """Rows of the last axis scaled to length 1, in float32 (`F.normalize`, eps 1e-12)."""
    return nn.functional.normalize(x.float(), dim=-1)
