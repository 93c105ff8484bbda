"""Writes tests/fixtures/keys/*.json: every tensor that the full-size BLIP-2 checkpoints hold, from the stock code.

    .venv/bin/python tools/make_key_fixtures.py        (needs transformers, and `make lavis-env` for LAVIS's part)

The networks are built on the meta device, so this takes seconds and little memory. A fixture:

    {"source": ..., "files": {"checkpoint": {name: "F32 1408x3x14x14", ...}, "vision": {...}},
     "unused": [names that retrieval does without], "parameters": {module: count}}

`files` has an entry for each file that the published checkpoint is made of. LAVIS's stage-1 checkpoints are two: the
vision transformer was frozen in training, and LAVIS leaves what was frozen out of a checkpoint
(`RunnerBase._save_checkpoint`). Dtypes are those of the network; the published vision files are 16-bit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "fixtures" / "keys"
DTYPES = {"torch.float32": "F32", "torch.int64": "I64"}


def main() -> None:
    if "--lavis" in sys.argv[1:]:
        json.dump(lavis_fixtures(), sys.stdout)
        return
    python = os.environ.get("QPERT_LAVIS_PYTHON") or ROOT / ".cache" / "lavis" / "bin" / "python"
    command = [python, "-I", "-W", "ignore", Path(__file__).resolve(), "--lavis"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, fixture in {**found, **hf_fixtures()}.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(fixture, indent=0) + "\n")
        counts = {file: len(tensors) for file, tensors in fixture["files"].items()}
        print(f"{name}: {counts} tensors, {sum(fixture['parameters'].values()):,} parameters", file=sys.stderr)


def describe(state: dict[str, Any]) -> dict[str, str]:
    """name → dtype and shape; a scalar has no dimensions."""
    return {name: f"{DTYPES[str(t.dtype)]} {'x'.join(map(str, t.shape))}".strip() for name, t in state.items()}


def count(parameters: Any) -> dict[str, int]:
    """Parameters by module (LAVIS's Q-Former: by its parts); shared ones once."""
    counts: Counter[str] = Counter()
    for name, parameter in parameters:
        counts[".".join(name.split(".")[: 3 if name.startswith("Qformer.") else 1])] += parameter.numel()
    return dict(counts)


# LAVIS


def lavis_fixtures() -> dict[str, Any]:
    """In the LAVIS environment. The vision transformer of `coco` and `pretrain` is LAVIS's own `create_eva_vit_g`."""
    spec = importlib.util.spec_from_file_location(
        "lavis_worker", ROOT / "exporter" / "families" / "blip2" / "lavis_worker.py"
    )
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.prepare_imports()
    from lavis.models import eva_vit

    def stock_eva(vision: dict[str, Any]) -> Any:
        with (
            mock.patch.object(eva_vit, "download_cached_file"),
            mock.patch.object(eva_vit.torch, "load", return_value={}),
        ):
            return eva_vit.create_eva_vit_g(vision["image_size"], 0, False, "fp32")

    worker.FAMILIES["eva"] = ("eva_clip_g", stock_eva)
    return {
        "lavis_coco": lavis_fixture(worker, "eva", 364, frozen=False),
        "lavis_pretrain": lavis_fixture(worker, "eva", 224, frozen=True),
        "lavis_pretrain_vitL": lavis_fixture(worker, "clip", 224, frozen=True),
    }


def lavis_fixture(worker: Any, family: str, image_size: int, *, frozen: bool) -> dict[str, Any]:
    """As `RunnerBase._save_checkpoint` would save it: the state dict less the parameters that were frozen."""
    import torch
    from lavis import __path__ as where

    # Only CLIP's are used: create_clip_vit_L of LAVIS 1.0.2 makes 21 blocks by mistake; its later versions make 23.
    vision = {"family": family, "image_size": image_size, "patch_size": 14, "width": 1024, "layers": 23, "heads": 16}
    vision |= {"mlp_width": 4096, "layer_norm_eps": 1e-5, "qkv_bias": True}
    qformer = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "cross_attention_frequency": 2}
    qformer |= {"queries": 32, "vocab_size": 30523, "max_positions": 512, "layer_norm_eps": 1e-12}
    config = {"vision": vision, "qformer": qformer, "embed_dim": 256, "ln_vision_eps": 1e-5}
    on_cpu, linspace = {"device": "cpu"}, torch.linspace
    with torch.device("meta"), mock.patch.object(torch, "linspace", lambda *a: linspace(*a, **on_cpu)):
        model = worker.build_model(config, freeze_vit=frozen)
    frozen_names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = model.state_dict()
    files = {"checkpoint": describe({name: t for name, t in state.items() if name not in frozen_names})}
    if frozen:
        files["vision"] = describe(model.visual_encoder.state_dict())
    version = next(Path(where[0]).parent.glob("salesforce_lavis-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    return {
        "source": f"LAVIS {version}, Blip2ITM on the meta device"
        + (" with 23 CLIP blocks" if family == "clip" else ""),
        "files": files,
        "unused": sorted(name for name in state if worker.unused(name)),
        "parameters": count(model.named_parameters()),
    }


# Hugging Face


def hf_fixtures() -> dict[str, Any]:
    """The configuration of Salesforce/blip2-itm-vit-g and its -coco sibling; what it does not set is the default."""
    return {"hf_itm_vit_g": hf_fixture(224), "hf_itm_vit_g_coco": hf_fixture(364)}


def hf_fixture(image_size: int) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    config = Blip2Config(
        vision_config={"image_size": image_size},
        qformer_config={"vocab_size": 30523, "use_qformer_text_input": True},
        image_text_hidden_size=256,
        num_query_tokens=32,
    )
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(config)
    return {
        "source": f"transformers {transformers.__version__}, Blip2ForImageTextRetrieval on the meta device",
        "files": {"checkpoint": describe(model.state_dict())},
        "unused": [],
        "parameters": count(model.named_parameters()),
    }


if __name__ == "__main__":
    main()
