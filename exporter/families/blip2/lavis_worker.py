"""Serves stock LAVIS over JSON lines: run by `reference_lavis.py` with the interpreter of the LAVIS environment.

Imports torch, numpy, safetensors and lavis, and `upstream.py` by its path; qpert is not installed there. Started with
`-I`, so that neither this folder nor PYTHONPATH can shadow LAVIS's own dependencies.

A request is one line: `{"graph", "inputs", "outputs"}` with paths of safetensors files; the first one opens the model:
`{"open": {"checkpoint", "vision_checkpoint", "config", "threshold", "preserve_norm", "centre_keys", "stages"}}`. A
reply is one line `{"ok": true, ...}` or `{"ok": false, "kind", "error", "traceback"}`.

LAVIS is unmodified, except that `offline` replaces what it would download.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

# Packages that LAVIS imports for datasets and tasks that are not used here; they are not installed.
ABSENT = ("torchvision", "cv2", "decord", "webdataset", "spacy", "pycocoevalcap", "pycocotools", "skimage", "einops")
# LAVIS packages whose __init__ imports every model and data set.
BYPASSED = ("lavis", "lavis.models", "lavis.datasets", "lavis.datasets.builders", "lavis.tasks", "lavis.processors")


class CheckpointMismatchError(Exception):
    """The checkpoint does not fit the model."""


class _Absent(ModuleType):
    """Replaces a package that is not installed: every attribute is an empty class."""

    __path__: list[str] = []  # noqa: RUF012  # a package, so that its submodules are looked up

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _AbsentFinder:
    """Finds the packages in ABSENT and replaces them with `_Absent` modules."""

    def find_spec(self, name: str, *_: Any) -> Any:
        found = name.split(".")[0] in ABSENT
        return importlib.util.spec_from_loader(name, self) if found else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def prepare_imports() -> None:
    """Make `lavis.models.blip2_models` importable in an environment that has only BLIP-2's dependencies."""
    if any(isinstance(finder, _AbsentFinder) for finder in sys.meta_path):
        return
    sys.meta_path.append(_AbsentFinder())  # last: an installed package wins
    spec = importlib.util.find_spec("lavis")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"LAVIS is not installed in {sys.prefix}", name="lavis")
    root = Path(spec.origin).parent
    for name in BYPASSED:
        module = ModuleType(name)
        module.__path__ = [str(root.parent.joinpath(*name.split(".")))]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    # LAVIS's registry expects this name in the package.
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel  # type: ignore[attr-defined]


def load_upstream() -> ModuleType:
    """`upstream.py` from this file's folder, without making the folder importable."""
    if "qpert_upstream" not in sys.modules:
        spec = importlib.util.spec_from_file_location("qpert_upstream", Path(__file__).with_name("upstream.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["qpert_upstream"] = module
        spec.loader.exec_module(module)
    return sys.modules["qpert_upstream"]


def _eva(vision: dict[str, Any]) -> Any:
    """Stock EVA vision transformer with these dimensions, built with the arguments of LAVIS's `create_eva_vit_g`."""
    from lavis.models import eva_vit
    from torch import nn

    return eva_vit.VisionTransformer(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        use_mean_pooling=False,
        embed_dim=vision["width"],
        depth=vision["layers"],
        num_heads=vision["heads"],
        mlp_ratio=(vision["mlp_width"] + 0.5) / vision["width"],  # LAVIS takes int(width · ratio)
        qkv_bias=vision["qkv_bias"],
        norm_layer=partial(nn.LayerNorm, eps=vision["layer_norm_eps"]),
    )


def _clip(vision: dict[str, Any]) -> Any:
    """Stock CLIP vision transformer. LAVIS 1.0.2 builds one block fewer than requested, later versions do not."""
    from lavis.models import clip_vit

    stock = {"mlp_width": 4 * vision["width"], "layer_norm_eps": 1e-5, "qkv_bias": True}
    wrong = [f"{name} {vision[name]}, stock {value}" for name, value in stock.items() if vision[name] != value]
    if wrong:
        raise ValueError(f"LAVIS's CLIP vision transformer does not support {'; '.join(wrong)}")
    for layers in (vision["layers"], vision["layers"] + 1):
        size = (vision["image_size"], vision["patch_size"], vision["width"], layers, vision["heads"])
        model = clip_vit.VisionTransformer(*size, use_grad_checkpointing=False)
        if len(model.transformer.resblocks) == vision["layers"]:
            return model
    raise ValueError(f"LAVIS cannot build a CLIP vision transformer of {vision['layers']} blocks")


FAMILIES = {"eva": ("eva_clip_g", _eva), "clip": ("clip_L", _clip)}


class _VocabularySize:
    """The part of a tokenizer that BLIP-2's constructor uses."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@contextmanager
def offline(config: dict[str, Any], tokenizer: Any) -> Iterator[None]:
    """Inside, BLIP-2's constructor builds its parts from `config` instead of downloading them."""
    from lavis.models.blip2_models import blip2

    qformer, build = config["qformer"], FAMILIES[config["vision"]["family"]][1]
    bert = blip2.BertConfig(
        vocab_size=len(tokenizer) - 1,  # as bert-base-uncased; [DEC] is added by resize_token_embeddings
        hidden_size=qformer["width"],
        num_hidden_layers=qformer["layers"],
        num_attention_heads=qformer["heads"],
        intermediate_size=qformer["mlp_width"],
        max_position_embeddings=qformer["max_positions"],
        layer_norm_eps=qformer["layer_norm_eps"],
    )

    def vision(*_: Any) -> Any:
        return build(config["vision"])

    with (
        mock.patch.object(blip2.Blip2Base, "init_tokenizer", return_value=tokenizer),
        mock.patch.object(blip2.BertConfig, "from_pretrained", return_value=bert),
        mock.patch.object(
            blip2.BertLMHeadModel, "from_pretrained", lambda *_, config: blip2.BertLMHeadModel(config=config)
        ),
        mock.patch.object(blip2, "create_eva_vit_g", vision),
        mock.patch.object(blip2, "create_clip_vit_L", vision),
    ):
        yield


def build_model(config: dict[str, Any], *, tokenizer: Any = None, freeze_vit: bool = False) -> Any:
    """Stock `Blip2ITM` (a `Blip2Qformer` with its own forward) with the dimensions of a `Blip2Config.to_dict()`."""
    prepare_imports()
    from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM

    qformer = config["qformer"]
    tokenizer = tokenizer or _VocabularySize(qformer["vocab_size"])
    if len(tokenizer) != qformer["vocab_size"]:
        raise ValueError(f"the vocabulary has {len(tokenizer)} entries, but the config {qformer['vocab_size']}")
    with offline(config, tokenizer):
        model = Blip2ITM(
            vit_model=FAMILIES[config["vision"]["family"]][0],
            img_size=config["vision"]["image_size"],
            vit_precision="fp32",
            freeze_vit=freeze_vit,
            num_query_token=qformer["queries"],
            cross_attention_freq=qformer["cross_attention_frequency"],
            embed_dim=config["embed_dim"],
        )
    if model.ln_vision.eps != config["ln_vision_eps"]:
        raise ValueError(
            f"stock LAVIS has ln_vision eps {model.ln_vision.eps}, but the config {config['ln_vision_eps']}"
        )
    return model.eval()


def unused(name: str) -> bool:
    """Whether retrieval does not use this tensor, so that a checkpoint may lack it."""
    return name == "temp" or name.endswith(".position_ids") or name.startswith("Qformer.cls.")


def _interpolated(model: Any, state: dict[str, Any]) -> None:
    """Fit the position embedding in `state` (names without prefix) to the model's grid, with LAVIS's own code."""
    module = importlib.import_module(type(model.visual_encoder).__module__)
    module.interpolate_pos_embed(model.visual_encoder, state)


def _read(path: str) -> dict[str, Any]:
    import torch

    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointMismatchError(f"{path}: {error}") from error
    return dict(loaded.get("model", loaded))


def load_checkpoint(model: Any, checkpoint: str, vision_checkpoint: str | None = None) -> list[str]:
    """Load as LAVIS does (vision file first, then the checkpoint), but require every tensor.

    LAVIS's stage-1 checkpoints hold no vision transformer: it was frozen, and has a separate file. Returns the names
    of tensors that the file has and the model does not (LAVIS leaves out the last block).
    """
    wanted, ignored = set(model.state_dict()), []
    prefix = "visual_encoder."
    try:
        if vision_checkpoint is not None:
            state = _read(vision_checkpoint)
            _interpolated(model, state)
            ignored = model.visual_encoder.load_state_dict(state, strict=False).unexpected_keys
            wanted -= {prefix + name for name in state}
        state = _read(checkpoint)
        vision = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        _interpolated(model, vision)
        unexpected = model.load_state_dict(
            {**state, **{prefix + name: value for name, value in vision.items()}}, strict=False
        ).unexpected_keys
    except RuntimeError as error:  # a tensor of another shape
        raise CheckpointMismatchError(f"{checkpoint}: {error}") from error
    missing = sorted(name for name in wanted - set(state) if not unused(name))
    if missing or unexpected:
        raise CheckpointMismatchError(
            f"{checkpoint}: {len(missing)} tensors are missing ({_some(missing)}) "
            f"and {len(unexpected)} are not of this model ({_some(unexpected)})"
        )
    return ignored


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"


def make_reference(model: Any, **options: Any) -> Any:
    """An `UpstreamReference` over a stock LAVIS model. It calls LAVIS's functions, or parts of `Blip2ITM.forward` where
    those take pixels rather than image features.
    """
    import torch
    from torch.nn import functional as F

    upstream = load_upstream()

    class StockLavis(upstream.UpstreamReference):  # type: ignore[name-defined,misc]
        name = "lavis"

        def image_embeds(self, pixel_values: Any) -> Any:
            return self.model.ln_vision(self.model.visual_encoder(pixel_values))

        def query_embeds(self, image_embeds: Any) -> Any:
            output = self.model.Qformer.bert(
                query_embeds=self.model.query_tokens.expand(image_embeds.shape[0], -1, -1),
                encoder_hidden_states=image_embeds,
                encoder_attention_mask=torch.ones(image_embeds.shape[:-1], dtype=torch.long),
                return_dict=True,
            )
            return F.normalize(self.model.vision_proj(output.last_hidden_state), dim=-1)

        def text_embeds(self, input_ids: Any, attention_mask: Any) -> Any:
            tokens = SimpleNamespace(input_ids=input_ids, attention_mask=attention_mask)
            return F.normalize(self.model.text_proj(self.model.forward_text(tokens)), dim=-1)

        def match_scores(self, image_embeds: Any, input_ids: Any, attention_mask: Any) -> Any:
            return self.model.compute_itm(image_embeds, input_ids, attention_mask)

        def cross_attention_pairs(self) -> Any:
            layers = self.model.Qformer.bert.encoder.layer
            blocks = [layer.crossattention.self for layer in layers if layer.has_cross_attention]
            return [(block.query, block.key) for block in blocks]

    return StockLavis(model, heads=model.Qformer.config.num_attention_heads, **options)


def _open(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    model = build_model(request["config"])
    ignored = load_checkpoint(model, request["checkpoint"], request.get("vision_checkpoint"))
    options = {name: request[name] for name in ("threshold", "preserve_norm", "centre_keys", "stages")}
    return make_reference(model, **options), {"ignored": ignored}


def _answer(reference: Any, request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from safetensors.numpy import load_file, save_file

    if "open" in request:
        return _open(request["open"])
    save_file(reference.run(request["graph"], load_file(request["inputs"])), request["outputs"])
    return reference, {}


def serve(requests: Any, replies: Any) -> None:
    """Answer requests line by line until the input ends."""
    reference = None
    for line in requests:
        try:
            reference, answer = _answer(reference, json.loads(line))
            reply = {"ok": True, **answer}
        except Exception as error:  # noqa: BLE001  # any error is reported by the parent process
            kinds = {CheckpointMismatchError: "checkpoint", ModuleNotFoundError: "unavailable"}
            kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "other")
            reply = {"ok": False, "kind": kind, "error": f"{error}", "traceback": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


def check() -> None:
    """Import the worker's dependencies, build a tiny model, and print the versions."""
    import torch
    import transformers

    vision: dict[str, Any] = {"family": "eva", "image_size": 28, "patch_size": 14, "width": 16, "layers": 1, "heads": 2}
    vision |= {"mlp_width": 32, "layer_norm_eps": 1e-6, "qkv_bias": True}
    qformer: dict[str, Any] = {
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "cross_attention_frequency": 1,
        "queries": 2,
    }
    qformer |= {"vocab_size": 8, "max_positions": 8, "layer_norm_eps": 1e-12}
    model = build_model({"vision": vision, "qformer": qformer, "embed_dim": 4, "ln_vision_eps": 1e-5})
    shape = tuple(make_reference(model).image_embeds(torch.zeros(1, 3, 28, 28)).shape)
    assert shape == (1, 5, 16), shape
    print(f"LAVIS runs with torch {torch.__version__}, transformers {transformers.__version__}")


def main() -> None:
    if "--check" in sys.argv[1:]:
        check()
        return
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LAVIS prints to stdout, which must not mix with the replies
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
