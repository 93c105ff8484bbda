"""The pair stage of a full-size BLIP-2: image by image in ONNX Runtime, against PyTorch in two other orders.

    python benchmarks/pair_stage.py --work /tmp/pairs --out benchmarks/results/pair_stage.json

The Q-Former has its real size (768 wide, 12 layers, 32 queries, 677 image tokens of 1408 numbers) and random weights;
stock Hugging Face `Blip2ForImageTextRetrieval` is made, saved, and exported with qpert's own exporter. Measured in one
process, in turns, so that other load meets all of them:

- qpert: one image with 128 texts, `Encoder.itm_scores` as `qpert eval` calls it (keys and values once a call, texts
  sorted and trimmed to the longest of each call);
- LAVIS's order (`compute_sim_matrix`): the stock network in eager PyTorch, a copy of the image's features for each
  pair, texts padded to 35 tokens;
- the release's order: the same, with the vision tower run again for every 20 texts.

Scores of the same pairs are compared. The vision tower is only timed: its 39 layers are one layer 39 times, which
takes as long and a hundred megabytes (too many for any cache).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import machine, make_vocabulary

from qpert.exporter.export import ExportRequest, export_bundle
from qpert.exporter.families.blip2.reference_huggingface import HuggingFaceReference
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.evaluation.inputs import open_data
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import TokenizedTexts, Tokenizer, TokenizerSpec
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures

VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "image_size": 364,
    "patch_size": 14,
}
VISION_LAYERS, TEXTS_AN_IMAGE_IN_RELEASE = 39, 20
VOCABULARY, PADDED = 30522, 35


def make_stock(folder: Path) -> None:
    """A stock model with a full-size Q-Former and one layer of vision tower, every weight at random."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION, num_hidden_layers=1).to_dict(),
        qformer_config=Blip2QFormerConfig(vocab_size=VOCABULARY + 1, use_qformer_text_input=True).to_dict(),
        num_query_tokens=32,
        image_text_hidden_size=256,
        image_token_index=None,
    )
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(config)
    with torch.no_grad():
        model.query_tokens.normal_()
        model.itm_head.weight.normal_(std=0.1)
    model.save_pretrained(folder)
    make_vocabulary(folder / "vocab.txt", VOCABULARY)


def exported(work: Path) -> tuple[Path, Bundle]:
    """The stock model's folder and its bundle; made once a work folder."""
    stock, out = work / "stock", work / "bundle"
    if not out.exists():
        make_stock(stock)
        request = ExportRequest(
            "blip2", str(stock), out, tokenizer=str(stock / "vocab.txt"), perturbation=Perturbation(stages="none")
        )
        export_bundle(request)
    return stock, Bundle.open(out)


def caption_lengths(count: int) -> np.ndarray:
    """Tokens of captions of the generated test split, in its own vocabulary: 17.7 on average, 32 at most."""
    from qpert.exporter.demo import VOCABULARY as DEMO_WORDS
    from qpert.exporter.families.blip2.tokenizer import build_tokenizer
    from qpert.graphs.families.blip2.config import CONFIGS

    vocab_size = CONFIGS["demo"].qformer.vocab_size
    backend = build_tokenizer(DEMO_WORDS, vocab_size=vocab_size)
    captions = open_data("demo").dataset.captions
    chosen = np.random.default_rng(0).choice(len(captions), count, replace=False)
    tokenizer = Tokenizer(backend, TokenizerSpec("tokenizer.json", PADDED, vocab_size))
    return tokenizer.encode([captions[place] for place in chosen]).lengths


def random_texts(lengths: np.ndarray) -> TokenizedTexts:
    """Random words of the given lengths, padded to 35 tokens."""
    random = np.random.default_rng(1)
    ids = random.integers(5, VOCABULARY, (len(lengths), PADDED))
    mask = (np.arange(PADDED) < lengths[:, None]).astype(np.int64)
    return TokenizedTexts(ids * mask, mask)


class Stock:
    """The stock network in eager PyTorch, in LAVIS's order."""

    def __init__(self, folder: Path, features: np.ndarray, texts: TokenizedTexts, batch: int) -> None:
        self.reference = HuggingFaceReference.open(folder, stages="none")
        self.features, self.batch = torch.from_numpy(features), batch
        self.ids, self.mask = torch.from_numpy(texts.input_ids), torch.from_numpy(texts.attention_mask)

    @torch.inference_mode()
    def match(self, count: int) -> np.ndarray:
        """The first `count` texts with the image: a copy of its features for each of them."""
        found = []
        for start in range(0, count, self.batch):
            part = slice(start, min(start + self.batch, count))
            copies = self.features.repeat(part.stop - part.start, 1, 1)
            found.append(self.reference.match_scores(copies, self.ids[part], self.mask[part]))
        return torch.cat(found).numpy()


def vision_tower() -> torch.nn.Module:
    """The stock tower of 39 layers, all of which are the same one."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    config = Blip2VisionConfig(**VISION, num_hidden_layers=1)
    config._attn_implementation = "eager"
    tower = Blip2VisionModel(config).eval().requires_grad_(requires_grad=False)
    tower.encoder.layers = torch.nn.ModuleList([tower.encoder.layers[0]] * VISION_LAYERS)
    return tower


def seconds_of(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each side, in turns; medians and ratios."""
    folder, bundle = exported(options.work)
    texts = random_texts(caption_lengths(options.texts))
    image = np.random.default_rng(2).standard_normal((1, 677, 1408)).astype(np.float32)
    encoder = Encoder(bundle, "cpu", threads=options.threads)
    features = ImageFeatures(np.zeros((1, 32, 256), np.float32), image)
    stock = Stock(folder, image, texts, options.batch)
    tower, pixels = vision_tower(), torch.zeros(1, 3, VISION["image_size"], VISION["image_size"])
    found: dict[str, list[float]] = {"qpert": [], "lavis": [], "vision": []}
    ours = encoder.itm_scores(features, texts)[0]  # first runs are not measured
    theirs = stock.match(options.pairs)
    with torch.inference_mode():
        for _ in range(options.repeats):
            found["qpert"].append(seconds_of(lambda: encoder.itm_scores(features, texts)) / options.texts)
            found["lavis"].append(seconds_of(lambda: stock.match(options.pairs)) / options.pairs)
            found["vision"].append(seconds_of(lambda: tower(pixels)))
    pair = {name: statistics.median(values) for name, values in found.items()}
    pair["release"] = pair["lavis"] + pair["vision"] / TEXTS_AN_IMAGE_IN_RELEASE
    return {
        "pairs_per_second": {name: round(1 / pair[name], 3) for name in ("qpert", "lavis", "release")},
        "seconds_of_one_image_encoding": round(pair["vision"], 2),
        "ratio": {
            "to_lavis_order": round(pair["lavis"] / pair["qpert"], 2),
            "to_release_order": round(pair["release"] / pair["qpert"], 2),
        },
        "largest_score_difference": float(np.abs(ours[: options.pairs] - theirs).max()),
        "score_spread": float(theirs.std()),
        "tokens_of_a_text": {"mean": round(float(texts.attention_mask.sum(1).mean()), 1), "padded": PADDED},
        "texts": options.texts,
        "pairs_in_pytorch": options.pairs,
        "batch_in_pytorch": options.batch,
        "seconds": {name: [round(value, 4) for value in values] for name, values in found.items()},
        "threads": options.threads,
        "load": [round(value, 1) for value in os.getloadavg()],
        "torch": torch.__version__,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 2 GB free")
    parser.add_argument("--texts", type=int, default=128, help="texts of the image in qpert's call")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of one measurement in PyTorch")
    parser.add_argument("--batch", type=int, default=16, help="pairs of one call in PyTorch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the bundle")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    text = json.dumps(measure(options), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
