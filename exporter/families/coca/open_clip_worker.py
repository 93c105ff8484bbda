"""Serves stock open_clip over JSON lines: run by `reference_open_clip.py` with the interpreter of its environment.

Imports torch, numpy, safetensors, Pillow and open_clip, and `upstream.py` of BLIP-2 by its path for the definition of
the perturbation; qpert is not installed there. Started with `-I`.

A request is one line. The first opens the model: `{"open": {"checkpoint", "model", "preprocess", "image_size",
"threshold", "preserve_norm", "centre_keys", "stages"}}`, where `model` is open_clip's `model_cfg`. Then `{"graph",
"inputs", "outputs"}` with paths of safetensors files, `{"pixels": FILE, "outputs"}`, `{"texts": [...], "length",
"outputs"}`. A reply is one line `{"ok": true, ...}` or `{"ok": false, "kind", "error", "traceback"}`.

open_clip is unmodified. torchvision's package `__init__` is bypassed: it loads CUDA operators, and only its transforms
are used, which are plain Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

UPSTREAM = Path(__file__).resolve().parents[1] / "blip2" / "upstream.py"


class CheckpointMismatchError(Exception):
    """The checkpoint does not fit the model."""


def prepare_imports() -> None:
    """Make `open_clip` importable beside a CPU torch."""
    if "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"torchvision is not installed in {sys.prefix}", name="torchvision")
    package = ModuleType("torchvision")
    package.__spec__, package.__path__ = spec, [str(Path(spec.origin).parent)]
    sys.modules["torchvision"] = package


def load_upstream() -> ModuleType:
    """BLIP-2's `upstream.py`, without making its folder importable."""
    if "qpert_upstream" not in sys.modules:
        spec = importlib.util.spec_from_file_location("qpert_upstream", UPSTREAM)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["qpert_upstream"] = module
        spec.loader.exec_module(module)
    return sys.modules["qpert_upstream"]


def build_model(model: dict[str, Any], image_size: int | None = None) -> Any:
    """Stock `CoCa` of a `model_cfg`, by open_clip's own constructor."""
    prepare_imports()
    from open_clip.coca_model import CoCa

    known = {name: value for name, value in model.items() if name != "custom_text"}
    if image_size is not None:
        known["vision_cfg"] = {**known["vision_cfg"], "image_size": image_size}
    return CoCa(**known).eval()


def load_checkpoint(model: Any, checkpoint: str) -> None:
    """By open_clip's own loader, which resizes position embeddings. Only the caption decoder may be missing."""
    from open_clip import factory

    try:
        found = factory.load_checkpoint(model, checkpoint, strict=False)
    except Exception as error:
        raise CheckpointMismatchError(f"{checkpoint}: {error}") from error
    missing = [name for name in found.missing_keys if not name.startswith("text_decoder.")]
    if missing or found.unexpected_keys:
        raise CheckpointMismatchError(
            f"{checkpoint}: {len(missing)} tensors are missing ({missing[:4]}) and {len(found.unexpected_keys)} are "
            f"not of this model ({found.unexpected_keys[:4]})"
        )


class StockCoca:
    """A stock CoCa with the inputs and outputs of the exported graphs."""

    def __init__(self, model: Any, preprocess: Any, **options: Any) -> None:
        self.model = model.float().requires_grad_(False)
        self.preprocess = preprocess
        self.options = options
        self.length = model.text.context_length

    def run(self, graph: str, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch
        from torch.nn import functional as F

        tensors = {name: torch.from_numpy(value.copy()) for name, value in inputs.items()}
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        with torch.no_grad():
            if graph == "vision":
                visual = self.model.visual
                output = {"image_embeds": visual.transformer(visual._embeds(tensors["pixel_values"]))}
            elif graph == "text":
                output = {"text_embeds": self.model.encode_text(self.padded(tensors["input_ids"]), normalize=True)}
            elif graph == "image_query":
                output = {"query_embeds": F.normalize(self.image_vectors(**tensors), dim=-1)[:, None]}
            else:
                raise ValueError(f"graph is {graph!r}, expected vision, image_query or text")
        return {name: value.float().contiguous().numpy() for name, value in output.items()}

    def padded(self, ids: Any) -> Any:
        """Stock takes texts of the full length only: its class token stands at the end of what it is given."""
        import torch

        return torch.nn.functional.pad(ids, (0, self.length - ids.shape[1]), value=self.model.pad_id)

    def image_vectors(self, image_embeds: Any, object_masks: Any = None, box_weights: Any = None) -> Any:
        """[B,N,C] → [B,E], before the norm."""
        import torch

        visual = self.model.visual
        if object_masks is None or not object_masks.shape[1]:
            return visual._pool(image_embeds)[0] @ visual.proj
        rows = []
        for image, mask, weight in zip(image_embeds, object_masks, box_weights):  # noqa: B905 (Python 3.9 too)
            with self.perturbed(image[None], mask[None], weight[None]):
                rows.append(visual._pool(image[None])[0] @ visual.proj)
        return torch.cat(rows)

    @contextmanager
    def perturbed(self, image: Any, mask: Any, weight: Any) -> Any:
        """Inside, the stock pooler projects its queries to q M, by other projection weights: (q W + b) M."""
        import torch

        pooler = self.model.visual.attn_pool
        attention, heads = pooler.attn, pooler.attn.num_heads
        packed = attention.in_proj_weight is not None
        width = attention.embed_dim
        weights = attention.in_proj_weight if packed else attention.q_proj_weight
        key_weight = weights[width : 2 * width] if packed else attention.k_proj_weight
        bias = attention.in_proj_bias
        keys = pooler.ln_k(image) @ key_weight.T + bias[width : 2 * width]
        keys = keys.unflatten(-1, (heads, -1)).transpose(1, 2)  # [1,H,N,d]
        upstream = load_upstream()
        maps = upstream.query_maps(keys, mask, weight, self.options["threshold"], self.options["centre_keys"])[0]
        query_weight, query_bias = weights[:width].double(), bias[:width].double()
        if self.options["preserve_norm"]:  # of the first query, the only one that retrieval reads
            first = pooler.ln_q(pooler.query)[:1].double() @ query_weight.T + query_bias
            first = first.reshape(heads, 1, -1)
            maps = maps * first.norm(dim=-1, keepdim=True) / (first @ maps).norm(dim=-1, keepdim=True)
        block = torch.block_diag(*maps)
        kept = weights.clone(), bias.clone()
        weights.data[:width] = (block.T @ query_weight).float()
        bias.data[:width] = (query_bias @ block).float()
        try:
            yield
        finally:
            weights.data.copy_(kept[0])
            bias.data.copy_(kept[1])

    def pixels(self, file: str) -> Any:
        from PIL import Image

        return self.preprocess(Image.open(file)).numpy()

    def token_ids(self, texts: list[str], length: int) -> Any:
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=length)(texts).numpy()


def open_stock(request: dict[str, Any]) -> StockCoca:
    prepare_imports()
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    model = build_model(request["model"], request["image_size"])
    load_checkpoint(model, request["checkpoint"])
    base = {"size": model.visual.image_size[0]}
    settings = merge_preprocess_dict(PreprocessCfg(), {**request["preprocess"], **base})
    preprocess = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    options = {name: request[name] for name in ("threshold", "preserve_norm", "centre_keys", "stages")}
    return StockCoca(model, preprocess, **options)


def _answer(reference: Any, request: dict[str, Any]) -> Any:
    from safetensors.numpy import load_file, save_file

    if "open" in request:
        return open_stock(request["open"])
    if "pixels" in request:
        made = {"pixels": reference.pixels(request["pixels"])}
    elif "texts" in request:
        made = {"ids": reference.token_ids(request["texts"], request["length"])}
    else:
        made = reference.run(request["graph"], load_file(request["inputs"]))
    save_file(made, request["outputs"])
    return reference


def serve(requests: Any, replies: Any) -> None:
    """Answer requests line by line until the input ends."""
    reference = None
    for line in requests:
        try:
            reference = _answer(reference, json.loads(line))
            reply: dict[str, Any] = {"ok": True}
        except Exception as error:  # noqa: BLE001  # any error is reported by the parent process
            kinds = {CheckpointMismatchError: "checkpoint", ModuleNotFoundError: "unavailable"}
            kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "other")
            reply = {"ok": False, "kind": kind, "error": f"{error}", "traceback": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


def check() -> None:
    """Import the worker's dependencies, run a tiny model, and print the versions."""
    import torch

    vision = {"image_size": 28, "layers": 1, "width": 24, "head_width": 12, "patch_size": 14, "attentional_pool": True}
    vision |= {"attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1, "embed_cls": True}
    text |= {"output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    model = build_model({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": decoder})
    shape = tuple(model.encode_image(torch.zeros(1, 3, 28, 28)).shape)
    assert shape == (1, 16), shape
    import open_clip

    print(f"open_clip {open_clip.__version__} runs with torch {torch.__version__}")


def main() -> None:
    if "--check" in sys.argv[1:]:
        check()
        return
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what open_clip prints must not mix with the replies
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
