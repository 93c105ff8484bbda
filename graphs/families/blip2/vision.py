"""The two vision towers of BLIP-2 checkpoints, with LAVIS's parameter names.

Sources: LAVIS `lavis/models/eva_vit.py` (EVA ViT-g/14) and `lavis/models/clip_vit.py` (CLIP ViT-L/14). Both return
every token after the last block, without a final norm: BLIP-2's `ln_vision` follows. In both, LAVIS already leaves out
the pre-trained model's last block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpert.graphs.families.blip2.config import VisionConfig
from qpert.graphs.layers import AttentionModule, LayerNorm, merge_heads, split_heads


class PatchEmbedding(nn.Module):
    """`patch_embed.proj` of EVA: one token for each patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return embed_patches(pixel_values, self.proj)


class EvaAttention(AttentionModule):
    """Self-attention with one qkv projection; queries and values have a bias, keys have none."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width)
        if config.qkv_bias:
            self.q_bias = nn.Parameter(torch.zeros(config.width))
            self.v_bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        query, key, value = qkv.chunk(3, dim=-1)  # [B, N, C] each
        if hasattr(self, "q_bias"):
            query, value = query + self.q_bias, value + self.v_bias
        context = self.kernel(*(split_heads(part, self.heads) for part in (query, key, value)))
        return self.proj(merge_heads(context))


class EvaMlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class EvaBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = EvaAttention(config)
        self.norm2 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = EvaMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EvaVisionTransformer(nn.Module):
    """EVA ViT-g/14 as BLIP-2 uses it: pixel_values [B, 3, S, S] → [B, N, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values.to(self.cls_token.dtype))
        x = prepend_class_token(self.cls_token, patches) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


class ClipAttention(AttentionModule):
    """`nn.MultiheadAttention`'s parameters, with the attention written out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        context = self.kernel(*(split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1)))
        return self.out_proj(merge_heads(context))


class ClipMlp(nn.Module):
    """`c_fc`, QuickGELU (x·sigmoid(1.702 x)), `c_proj`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class ClipBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = ClipAttention(config)
        self.ln_2 = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = ClipMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ClipVisionTransformer(nn.Module):
    """CLIP ViT-L/14 as BLIP-2 uses it: pixel_values [B, 3, S, S] → [B, N, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.tokens, config.width))
        self.ln_pre = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.transformer = ClipTransformer(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = embed_patches(pixel_values.to(self.class_embedding.dtype), self.conv1)
        x = prepend_class_token(self.class_embedding[None, None], patches) + self.positional_embedding
        return self.transformer(self.ln_pre(x))


def embed_patches(pixel_values: Tensor, projection: nn.Conv2d) -> Tensor:
    """A convolution whose stride equals its kernel, computed as a matrix product (ONNX's Conv does not support bfloat16
    before opset 22).

    Args:
        pixel_values: [B, 3, S, S] in the dtype of the projection's weight.
        projection: kernel [C, 3, p, p], stride p.

    Returns:
        [B, N-1, C], patches row by row.
    """
    size = projection.kernel_size[0]
    grid = pixel_values.shape[-1] // size
    rows = pixel_values.reshape(-1, 3, grid, size, grid, size)
    patches = rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, 3 * size * size)  # [B, N-1, 3pp]
    return nn.functional.linear(patches, projection.weight.flatten(1), projection.bias)


def prepend_class_token(class_token: Tensor, patches: Tensor) -> Tensor:
    """[1, 1, C] and [B, N-1, C] → [B, N, C]."""
    return torch.cat([class_token.expand(patches.shape[0], -1, -1), patches], dim=1)


VISION_TOWERS: dict[str, type[nn.Module]] = {"eva": EvaVisionTransformer, "clip": ClipVisionTransformer}
