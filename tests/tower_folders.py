"""Whole Hugging Face folders of small CLIP and SigLIP models: weights, image processor and tokenizer, made by stock."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stock_towers import CLIP_SHAPES, SIGLIP_SHAPES, randomised

FIXTURES = Path(__file__).parent / "fixtures" / "siglip"
SIGLIP_ROWS = 400
"""Rows of the token embedding: at least the pieces of the recorded SentencePiece model."""


def clip_folder(folder: Path, shape: str, *, short: int | None = None) -> Path:
    """A CLIP folder. `short`: the shortest side before the crop; None crops nothing from it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    CLIPTokenizer(dict(vocabulary), list(merges), model_max_length=77).save_pretrained(folder)
    spec = CLIP_SHAPES[shape]
    text = spec["text"] | {"vocab_size": len(vocabulary), "max_position_embeddings": 77}
    text |= {"eos_token_id": vocabulary["<|endoftext|>"], "bos_token_id": vocabulary["<|startoftext|>"]}
    config = CLIPConfig(text_config=text, vision_config=spec["vision"], projection_dim=spec["projection_dim"])
    randomised(CLIPModel(config), 0).save_pretrained(folder)
    size = spec["vision"]["image_size"]
    processor: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "crop_size": size}
    write(folder, processor | {"size": {"shortest_edge": short or size}})
    return folder


def siglip_folder(folder: Path, shape: str) -> Path:
    """A SigLIP folder."""
    from transformers import SiglipConfig, SiglipModel

    spec = SIGLIP_SHAPES[shape]
    width = spec["vision"]["hidden_size"]
    text = spec["text"] | {"vocab_size": SIGLIP_ROWS, "max_position_embeddings": 64, "projection_size": width}
    config = SiglipConfig(text_config=text, vision_config=spec["vision"])
    randomised(SiglipModel(config), 0).save_pretrained(folder)
    shutil.copy(FIXTURES / "spiece.model", folder)
    size = spec["vision"]["image_size"]
    write(folder, {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}})
    return folder


def write(folder: Path, processor: dict[str, Any]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary laid out as CLIP's: bytes, bytes that end a word, merges, the two special tokens."""
    from hostile_captions import PIECES
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([" ".join(PIECES), "the dogs and the cats on the tables " * 9, "!! ... ## "], trainer)
    merges = [(m[0], m[1]) for m in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = [*letters, *(letter + "</w>" for letter in letters)]
    order += [piece for piece in dict.fromkeys("".join(m) for m in merges) if piece not in set(order)]
    return {piece: i for i, piece in enumerate([*order, "<|startoftext|>", "<|endoftext|>"])}, merges
