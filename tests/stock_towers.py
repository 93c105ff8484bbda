"""Small stock Hugging Face CLIP and SigLIP models, every parameter at random: what our modules are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CLIP_SHAPES: dict[str, dict[str, Any]] = {
    # 3 heads of 10; patches of 7 on 49 px; OpenAI's activation; the old rule for the end of text
    "a": {
        "vision": {"hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3}
        | {"image_size": 49, "patch_size": 7},
        "text": {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"vocab_size": 99, "max_position_embeddings": 17, "eos_token_id": 2, "bos_token_id": 0},
        "projection_dim": 21,
    },
    # an image that is no multiple of its patches; other eps; the new rule, with an end that is not the largest id
    "b": {
        "vision": {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 53, "patch_size": 10, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        "text": {"hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 5}
        | {"vocab_size": 61, "max_position_embeddings": 9, "eos_token_id": 41, "bos_token_id": 40}
        | {"hidden_act": "gelu", "layer_norm_eps": 1e-4},
        "projection_dim": 50,
    },
    # one head; a single patch; different activations
    "c": {
        "vision": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
        | {"image_size": 12, "patch_size": 12, "hidden_act": "gelu_pytorch_tanh"},
        "text": {"hidden_size": 18, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
        | {"vocab_size": 45, "max_position_embeddings": 77, "eos_token_id": 44, "bos_token_id": 43},
        "projection_dim": 7,
    },
}

SIGLIP_SHAPES: dict[str, dict[str, Any]] = {
    # 3 heads of 10; patches of 7 on 49 px; text of another width
    "a": {
        "vision": {"hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3}
        | {"image_size": 49, "patch_size": 7},
        "text": {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"vocab_size": 99, "max_position_embeddings": 13, "projection_size": 30},
    },
    # an image that is no multiple of its patches, as so400m/14 at 384 px; exact GELU; other eps
    "b": {
        "vision": {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 53, "patch_size": 10, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        "text": {"hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
        | {"vocab_size": 61, "max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-4},
    },
    # one wide head; other activations
    "c": {
        "vision": {"hidden_size": 20, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
        | {"image_size": 24, "patch_size": 8, "hidden_act": "quick_gelu"},
        "text": {"hidden_size": 18, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
        | {"vocab_size": 45, "max_position_embeddings": 5, "projection_size": 20},
    },
}


def stock_clip(shape: str, seed: int = 0) -> Any:
    """Stock `CLIPModel`."""
    from transformers import CLIPConfig, CLIPModel

    spec = CLIP_SHAPES[shape]
    config = CLIPConfig(text_config=spec["text"], vision_config=spec["vision"], projection_dim=spec["projection_dim"])
    return randomised(CLIPModel(_eager(config)), seed)


def stock_siglip(shape: str, seed: int = 0) -> Any:
    """Stock `SiglipModel`."""
    from transformers import SiglipConfig, SiglipModel

    spec = SIGLIP_SHAPES[shape]
    config = SiglipConfig(text_config=spec["text"], vision_config=spec["vision"])
    return randomised(SiglipModel(_eager(config)), seed)


def pixels(size: int, images: int = 3, seed: int = 0) -> Tensor:
    """float32 [B, 3, S, S], the images unlike each other."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(images, 3, size, size, generator=generator)
    return values + torch.linspace(-1, 1, images)[:, None, None, None]


def _eager(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


def randomised(model: Any, seed: int) -> Any:
    """Biases and norms too; image tokens that differ, and attention that attends to something."""
    generator = torch.Generator().manual_seed(seed)
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(_drawn(name, noise))
    return model


def _drawn(name: str, noise: Tensor) -> Tensor:
    if "norm" in name:
        return 0.2 * noise + float(name.endswith("weight"))
    if ("embedding" in name and "patch" not in name) or name.endswith("probe"):
        return noise
    if noise.dim() < 2:
        return 0.2 * noise
    gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "in_proj")) else 1.0
    return gain * noise / math.sqrt(math.prod(noise.shape[1:]))
