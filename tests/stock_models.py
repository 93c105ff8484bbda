"""Small stock Hugging Face BLIP-2 retrieval models in folders, as `save_pretrained` writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "the", "on", "of", "and", "with", "two", "near", ",", ".", "?"),
    *("red", "green", "blue", "small", "large", "dog", "cat", "boat", "kite", "ball", "tree", "car", "bird"),
    *("beach", "street", "table", "grass", "water"),
    *(chr(code) for code in range(ord("b"), ord("z") + 1)),
    *("##" + chr(code) for code in range(ord("a"), ord("z") + 1)),
]
DEC = "[DEC]"  # LAVIS adds it to the vocabulary of bert-base-uncased; it is the last entry


@dataclass(frozen=True)
class Shape:
    """Dimensions of one small model."""

    vision: dict[str, Any]
    qformer: dict[str, Any]
    queries: int
    embed_dim: int


SHAPES: dict[str, Shape] = {
    # head sizes 16 and 24, like the real one: cross-attention in every other layer
    "a": Shape(
        {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"image_size": 56, "patch_size": 14},
        {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"cross_attention_frequency": 2, "max_position_embeddings": 64},
        queries=8,
        embed_dim=40,
    ),
    # head sizes 24 and 16; cross-attention in every layer; no bias in the vision transformer's qkv
    "b": Shape(
        {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
        | {"image_size": 40, "patch_size": 8, "qkv_bias": False},
        {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"cross_attention_frequency": 1, "max_position_embeddings": 48},
        queries=5,
        embed_dim=32,
    ),
    # head sizes 20 and 32; one cross-attention in three layers; other LayerNorm eps
    "c": Shape(
        {"hidden_size": 40, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
        | {"image_size": 96, "patch_size": 16, "layer_norm_eps": 1e-5},
        {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"cross_attention_frequency": 3, "max_position_embeddings": 40, "layer_norm_eps": 1e-10},
        queries=12,
        embed_dim=24,
    ),
}

# Attention that attends to something, queries that stay unlike each other, matches that differ.
GAINS = {".query.": 2.0, ".key.": 2.0, "qkv": 2.0, "attention.output": 0.5, "itm_head": 3.0}


def small_hf_model(shape: str, seed: int = 0) -> Any:
    """Stock `Blip2ForImageTextRetrieval`, every parameter at random (biases and LayerNorms too)."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

    spec = SHAPES[shape]
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**spec.vision).to_dict(),
        qformer_config=Blip2QFormerConfig(
            **spec.qformer, vocab_size=len(WORDS) + 1, use_qformer_text_input=True
        ).to_dict(),
        num_query_tokens=spec.queries,
        image_text_hidden_size=spec.embed_dim,
        image_token_index=None,
    )
    config._attn_implementation = "eager"
    model = Blip2ForImageTextRetrieval(config).eval().requires_grad_(False)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def small_hf_folder(tmp_path: Path, shape: str = "a", seed: int = 0) -> Path:
    """A folder of such a model with its weights, configs, tokenizer and image processor, as found on the hub."""
    folder = tmp_path / f"hf-{shape}-{seed}"
    model = small_hf_model(shape, seed)
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, DEC]) + "\n")
    size = SHAPES[shape].vision["image_size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor_config(size), indent=2))
    return folder


def small_tokenizer() -> Any:
    """Stock lower-casing `BertTokenizer` over WORDS and [DEC]."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate([*WORDS, DEC])}, do_lower_case=True)
    assert len(tokenizer) == len(WORDS) + 1
    return tokenizer


def image_processor_config(size: int) -> dict[str, Any]:
    """`preprocessor_config.json` of Salesforce/blip2-itm-vit-g, at another size. `resample` 3 is bicubic."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "BlipImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Blip2Processor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }


def small_inputs(shape: str, images: int = 3, texts: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """pixel_values [I,3,S,S], input_ids and attention_mask [T,L] with right padding, every length another."""
    generator = torch.Generator().manual_seed(seed)
    size, length = SHAPES[shape].vision["image_size"], 11
    ids = torch.randint(5, len(WORDS), (texts, length), generator=generator)
    lengths = torch.arange(texts) * 2 % (length - 3) + 4
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids[:, 0] = WORDS.index("[CLS]")
    ids.scatter_(1, lengths[:, None] - 1, WORDS.index("[SEP]"))
    pixels = torch.randn(images, 3, size, size, generator=generator)
    pixels += torch.linspace(-1, 1, images)[:, None, None, None]
    return {"pixel_values": pixels, "input_ids": ids * mask, "attention_mask": mask}


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    norms = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if id(parameter) in norms else _scale(name, parameter) * noise)


def _scale(name: str, parameter: torch.Tensor) -> float:
    if ("embedding" in name and "patch" not in name) or name == "query_tokens":
        return 0.7
    if parameter.dim() < 2:
        return 0.15
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    return gain / parameter[0].numel() ** 0.5
