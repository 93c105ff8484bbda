"""Small random models of stock LAVIS, saved by LAVIS itself, with what LAVIS itself computes from them.

    .cache/lavis/bin/python -I tests/lavis_models.py OUT [eva] [clip] [stage1]

Runs in the LAVIS environment (qpert is not there). For each model a folder:

    config.json            a `Blip2Config.to_dict()`
    checkpoint.pth         written by LAVIS's `RunnerBase._save_checkpoint`
    vision.pth             stage1 only: the frozen vision transformer that LAVIS leaves out of the checkpoint; 16-bit,
                           without prefix, with one block more than LAVIS takes, at another image size: as eva_vit_g.pth
    vocab.txt texts.json
    expected.safetensors   pixel_values, forward_image, forward_text, ITC, ITM; eva, clip: compute_sim_matrix
    facts.json             eva, clip: what stock LAVIS says where it raises

`k8.*`, `k24.*` are LAVIS's matrices at k_test = 8 and 24 (the number of images); a k_test above the number of
candidates raises in LAVIS, so `all.*` re-ranks every candidate: what a k that is clamped must give.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

IMAGES, TEXTS = 24, 36


def _worker():
    path = Path(__file__).resolve().parent.parent / "exporter" / "families" / "blip2" / "lavis_worker.py"
    spec = importlib.util.spec_from_file_location("lavis_worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COLOURS = ["red", "green", "blue", "black", "white", "yellow", "tiny", "large"]
THINGS = ["dog", "cat", "boat", "kite", "ball", "tree", "car", "cup", "bird", "horse"]
PLACES = ["beach", "street", "table", "grass", "roof", "water"]
GLUE = ["a", "on", "the", "with", "and", "near", "is", "of", "two", ",", ".", "?", "'"]
LETTERS = [chr(code) for code in range(ord("b"), ord("z") + 1)]
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *(COLOURS + THINGS + PLACES + GLUE + LETTERS),
    *("##" + letter for letter in ["a", *LETTERS]),
    *("##s", "##ing")[1:],
]


def texts() -> list[str]:
    """36 different captions of 3 to more than 33 tokens, with punctuation and words in pieces."""
    made = []
    for i in range(TEXTS):
        colour, thing, place = COLOURS[i % 8], THINGS[(i * 7) % 10], PLACES[(i * 5) % 6]
        text = [f"a {colour} {thing}", f"the {thing}s on the {place} , near a {colour} {THINGS[i % 10]}"][i % 2]
        text += f" with {COLOURS[(i // 8) % 8]} zebras and xylo{thing} of {PLACES[i // 6]} ." * (i % 5)
        made.append(text)
    assert len(set(made)) == TEXTS
    return made


def config(name: str) -> dict:
    """Dimensions as unlike each other as LAVIS lets them be; `Blip2Config.from_dict` reads them."""
    words = len(VOCABULARY) + 1  # [DEC]
    qformer = {
        "eva": {"width": 96, "layers": 4, "heads": 4, "mlp_width": 128, "cross_attention_frequency": 2, "queries": 8},
        "clip": {"width": 64, "layers": 3, "heads": 4, "mlp_width": 160, "cross_attention_frequency": 1, "queries": 6},
    }["clip" if name == "clip" else "eva"]
    vision = {
        "eva": {"width": 64, "layers": 3, "heads": 4, "mlp_width": 172, "layer_norm_eps": 1e-6},
        "clip": {"width": 48, "layers": 3, "heads": 3, "mlp_width": 192, "layer_norm_eps": 1e-5},
    }["clip" if name == "clip" else "eva"]
    family = "clip" if name == "clip" else "eva"
    return {
        "name": f"small_{name}",
        "vision": {"family": family, "image_size": 56, "patch_size": 14, "qkv_bias": True, **vision},
        "qformer": {"vocab_size": words, "max_positions": 64, "layer_norm_eps": 1e-12, **qformer},
        "embed_dim": 32 if name == "clip" else 40,
        "ln_vision_eps": 1e-5,
    }


# Attention that attends to something, queries that stay unlike each other, matches that differ.
GAINS = {".query.": 2.0, ".key.": 2.0, "qkv": 2.0, "in_proj": 2.0, "attention.output": 0.5, "itm_head": 3.0}
SEEDS = {"eva": 1, "clip": 9, "stage1": 3}  # of 1 to 10, those that leave the widest gaps between scores


def randomise(model, seed: int) -> None:
    """Every parameter at random, LayerNorms and biases too: what is left at 0 or 1 hides mistakes."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}

    def scale(name: str, parameter) -> float:
        if "embed" in name or "token" in name:
            return 0.7
        if parameter.dim() < 2:
            return 0.15
        gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
        return gain / parameter[0].numel() ** 0.5

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1 + 0.2 * noise) if id(parameter) in norms else scale(name, parameter) * noise)


class Loader:
    """What compute_sim_matrix wants of a data loader: batches of images, `dataset.text`, `dataset.image`."""

    def __init__(self, pixels, captions: list[str]) -> None:
        self.batches = pixels.split(10)
        self.dataset = SimpleNamespace(text=captions, image=list(range(len(pixels))))

    def __iter__(self):
        return iter({"image": batch} for batch in self.batches)


def sim_matrices(model, pixels, captions: list[str]) -> tuple[dict, str]:
    """LAVIS's own matrices, both directions, and the error it raises for a k_test above the number of candidates."""
    import torch

    def matrices(k: int, pixels, captions: list[str]):
        return model.compute_sim_matrix(Loader(pixels, captions), SimpleNamespace(k_test=k))

    found = {}
    for k in (8, IMAGES):
        found[f"k{k}.i2t"], found[f"k{k}.t2i"] = matrices(k, pixels, captions)
    # As many images as texts (some twice), so that k can be the number of texts: the rows of the real images count.
    padded = torch.cat([pixels, pixels[: TEXTS - IMAGES]])
    found["all.i2t"] = matrices(TEXTS, padded, captions)[0][:IMAGES]
    found["all.t2i"] = found[f"k{IMAGES}.t2i"].copy()
    try:
        matrices(TEXTS + 4, pixels, captions)
    except RuntimeError as error:
        return found, str(error)
    return found, ""


def expected(model, captions: list[str], size: int) -> dict:
    """What LAVIS computes from 24 images and 36 captions, through functions of LAVIS only."""
    import torch
    from torch.nn import functional as F

    pixels = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(99))
    pixels += torch.linspace(-1, 1, IMAGES)[:, None, None, None]
    tokens = model.tokenizer(captions, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    found = {"pixel_values": pixels, "input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    found["query_hidden"], found["image_embeds"] = model.forward_image(pixels)
    found["text_hidden"] = model.forward_text(tokens)
    found["query_embeds"] = F.normalize(model.vision_proj(found["query_hidden"]), dim=-1)
    found["text_embeds"] = F.normalize(model.text_proj(found["text_hidden"]), dim=-1)
    pairs = [captions[i] for i in range(IMAGES)]
    rows = []
    for image in found["image_embeds"]:
        rows.append(model.compute_itm(image.expand(TEXTS, -1, -1), tokens.input_ids, tokens.attention_mask))
    found["itm_scores"] = torch.stack(rows)  # [24,36]
    # Blip2ITM.forward, pixels and strings in, image i with text i. It does not pad, so one pair at a time.
    model.max_txt_len = 35
    one = [{"image": pixels[i : i + 1], "text_input": [pairs[i]]} for i in range(IMAGES)]
    found["forward_itc"] = torch.cat([model(sample, match_head="itc") for sample in one])  # [24,1]
    found["forward_itm"] = torch.cat([model(sample, match_head="itm") for sample in one])  # [24,2]
    arrays = {name: value.contiguous().numpy() for name, value in found.items()}
    itc = torch.einsum("iqe,te->itq", found["query_embeds"], found["text_embeds"]).amax(-1)
    for name, values in (("ITC", itc), ("ITM", found["itm_scores"])):
        spread = min(values.std(0).min().item(), values.std(1).min().item())
        assert spread > 0.01, f"{name} scores hardly differ ({spread:.1e}): a ranking of them would show nothing"
    return {**arrays, "itc_scores": itc.numpy()}


def check_gaps(arrays: dict) -> None:
    """No two candidates so close that rounding could swap them, nor at the edge of the k that are re-ranked."""
    import numpy as np

    gaps = {name: np.diff(np.sort(arrays[name], axis=1), axis=1) for name in arrays if name[-4:] in (".i2t", ".t2i")}
    nearest = min(gap[gap > 0].min() for gap in gaps.values())
    edges = [
        np.diff(np.sort(scores, axis=1), axis=1)[:, -8] for scores in (arrays["itc_scores"], arrays["itc_scores"].T)
    ]
    nearest = min(nearest, *(edge.min() for edge in edges))
    assert nearest > 3e-5, f"two scores are only {nearest:.1e} apart: take another seed"


def save_checkpoint(model, folder: Path) -> None:
    """With LAVIS's own `_save_checkpoint`, which leaves out what was frozen."""
    import decord  # a stand-in, see lavis_worker
    import torch

    decord.bridge = SimpleNamespace(set_bridge=lambda *_: None)
    from lavis.runners.runner_base import RunnerBase

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    runner = SimpleNamespace(
        model=model,
        unwrap_dist_model=lambda model: model,
        optimizer=torch.optim.AdamW(trained),
        config=SimpleNamespace(to_dict=lambda: {"run": {"task": "retrieval"}, "model": {"arch": "blip2"}}),
        scaler=None,
        output_dir=str(folder),
    )
    RunnerBase._save_checkpoint(runner, "best", is_best=True)
    (folder / "checkpoint_best.pth").rename(folder / "checkpoint.pth")


def save_vision(worker, description: dict, folder: Path) -> None:
    """The backbone as a file of its own: one block more, a head, 16-bit, trained at 28 px."""
    import torch

    vision = {**description["vision"], "layers": description["vision"]["layers"] + 1, "image_size": 28}
    backbone = worker.FAMILIES["eva"][1](vision)
    randomise(backbone, seed=11)
    state = {name: value.half() for name, value in backbone.state_dict().items()}
    torch.save({**state, "head.weight": torch.zeros(3, vision["width"])}, folder / "vision.pth")


def make(worker, name: str, folder: Path) -> None:
    """One model with all its files."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    description, captions = config(name), texts()
    (folder / "config.json").write_text(json.dumps(description, indent=1))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "texts.json").write_text(json.dumps(captions, indent=1))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})  # as Blip2Base.init_tokenizer
    torch.manual_seed(0)
    model = worker.build_model(description, tokenizer=tokenizer, freeze_vit=name == "stage1")
    randomise(model, seed=SEEDS[name])
    save_checkpoint(model, folder)
    if name == "stage1":
        save_vision(worker, description, folder)
        worker.load_checkpoint(model, str(folder / "checkpoint.pth"), str(folder / "vision.pth"))
    with torch.no_grad():
        arrays = expected(model.eval(), captions, description["vision"]["image_size"])
        if name != "stage1":  # which is about loading; the network is that of eva
            matrices, error = sim_matrices(model, torch.from_numpy(arrays["pixel_values"]), captions)
            arrays |= matrices
            check_gaps(arrays)
            (folder / "facts.json").write_text(json.dumps({"k_above_candidates": error}, indent=1))
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / "expected.safetensors")


def generate(python: Path, out: Path, *names: str) -> Path:
    """Run this file in the LAVIS environment, for tests outside it. Returns `out`."""
    command = [python, "-I", "-W", "ignore", Path(__file__).resolve(), out, *names]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def main(out: str, *names: str) -> None:
    import torch

    torch.set_num_threads(1)  # the models are small
    worker = _worker()
    worker.prepare_imports()
    for name in names or ("eva", "clip", "stage1"):
        start = time.perf_counter()
        make(worker, name, Path(out) / name)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
