"""Folders of small stock open_clip CoCa models, every parameter at random, and what stock makes of inputs.

Run by `generate` with the open_clip environment's interpreter; qpert is not installed there.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "exporter" / "families" / "coca" / "open_clip_worker.py"
FULL_VOCABULARY = 49408

SHAPES: dict[str, dict[str, Any]] = {
    # 2 pooler heads of 18; 3 vision heads of 10; patches of 7 on 49 px; a text tower of another width
    "a": {
        "embed_dim": 36,
        "vision_cfg": {"image_size": 49, "layers": 2, "width": 30, "head_width": 10, "patch_size": 7}
        | {"attn_pooler_heads": 2, "attn_pooler_queries": 9},
        "text_cfg": {"context_length": 76, "width": 24, "heads": 4, "layers": 3},
    },
    # heads of 96, as L/14 has; an image that is no multiple of its patches; texts of 20 tokens; quick GELU
    "b": {
        "embed_dim": 192,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 53, "layers": 1, "width": 48, "head_width": 24, "patch_size": 10}
        | {"attn_pooler_heads": 2, "attn_pooler_queries": 4},
        "text_cfg": {"context_length": 20, "width": 40, "heads": 5, "layers": 2},
    },
    # heads of 64, as B/32 has; keys as wide as queries, so that the pooler has one packed matrix; squashed pictures
    "c": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16}
        | {"attn_pooler_heads": 1, "attn_pooler_queries": 1},
        "text_cfg": {"context_length": 76, "width": 32, "heads": 2, "layers": 1},
    },
}
PREPROCESS: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear", "resize_mode": "shortest"},
    "c": {"resize_mode": "squash", "size": 64},
}
TEXTS = [
    "a cat",
    "the dogs on a table",
    "two birds, red and blue!",
    "wow!§ cat",
    "a very long caption " * 30,
    "x!_y",
    "Tom &amp; Jerry’s “ﬁne” café",
]


def model_cfg(shape: str, vocabulary: int = FULL_VOCABULARY) -> dict[str, Any]:
    """open_clip's `model_cfg` of a shape."""
    spec = SHAPES[shape]
    text = spec["text_cfg"] | {"vocab_size": vocabulary, "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": text["context_length"], "vocab_size": 50, "width": spec["embed_dim"], "heads": 2}
    return {
        **{name: value for name, value in spec.items() if name == "quick_gelu"},
        "embed_dim": spec["embed_dim"],
        "vision_cfg": spec["vision_cfg"] | {"attentional_pool": True, "output_tokens": True},
        "text_cfg": text,
        "multimodal_cfg": decoder | {"layers": 1, "attn_pooler_heads": 2},
        "custom_text": True,
    }


def generate(python: Path, folder: Path) -> None:
    """Write a folder for each shape below `folder`."""
    subprocess.run([python, "-I", "-W", "ignore", Path(__file__), str(folder)], check=True)


def randomise(model: Any, seed: int) -> Any:
    """Biases and norms too; image tokens that differ, and attention that attends to something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_drawn(name, torch.randn(parameter.shape, generator=generator)))
    return model.eval()


def _drawn(name: str, noise: Any) -> Any:
    if "ln_" in name:
        return 0.2 * noise + float(name.endswith("weight"))
    if "embedding" in name or name.endswith(("query", "cls_emb")):
        return noise
    if noise.dim() < 2:
        return 0.2 * noise
    gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "in_proj")) else 1.0
    fan_in = noise.shape[0] if name.endswith(("proj", "text_projection")) else math.prod(noise.shape[1:])
    return gain * noise / math.sqrt(fan_in)


def write_folder(folder: Path, worker: Any, shape: str) -> None:
    """The files of a published folder, and `expected.safetensors`: what stock makes of random inputs and `TEXTS`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = randomise(worker.build_model(model_cfg(shape)), ord(shape))
    config = {"model_cfg": model_cfg(shape), "preprocess_cfg": PREPROCESS[shape]}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if shape == "b":
        save_file(state, folder / "open_clip_model.safetensors")
    else:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    torch.manual_seed(1)
    size = model.visual.image_size[0]
    pixels = torch.randn(3, 3, size, size) + torch.linspace(-1, 1, 3)[:, None, None, None]
    from open_clip.tokenizer import SimpleTokenizer

    ids = SimpleTokenizer(context_length=model.text.context_length)(TEXTS)
    with torch.no_grad():
        made = {"pixel_values": pixels, "input_ids": ids, "query_embeds": model.encode_image(pixels)}
        made["text_embeds"] = model.encode_text(ids)
        made["image_embeds"] = model.visual.transformer(model.visual._embeds(pixels))
    save_file({name: value.contiguous() for name, value in made.items()}, folder / "expected.safetensors")


def main() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("open_clip_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    for shape in SHAPES:
        write_folder(Path(sys.argv[1]) / shape, worker, shape)


if __name__ == "__main__":
    main()
