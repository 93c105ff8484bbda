"""Recall of a student on a generated split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data import tokenizer
from losses import itc_similarities
from student import Student
from torch import Tensor

from qpert.graphs.config import CONFIGS
from qpert.runtime.images import ImagePreprocessing, preprocess_images
from qpert.runtime.scenes import draw_scene, generate

QUICK = 500
_cached: dict[str, tuple[Tensor, Tensor]] = {}


def quick_recall(student: Student, work: Path) -> dict[str, float]:
    """R@1 and R@10 of ITC on the validation split of 500 pictures, in percent."""
    if "val" not in _cached:
        scenes = list(generate("val", QUICK, 0))
        size = CONFIGS["demo"].vision.image_size
        pixels = preprocess_images([draw_scene(scene) for scene, _ in scenes], ImagePreprocessing(size))
        ids = tokenizer().encode([caption.text for _, captions in scenes for caption in captions]).input_ids
        _cached["val"] = torch.from_numpy(pixels), torch.from_numpy(ids)
    pixels, ids = _cached["val"]
    student.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        queries = torch.cat([student.query_embeds(student.model.encode_image(part))[0] for part in pixels.split(125)])
        texts = torch.cat([student.text_embeds(part)[0] for part in ids.split(500)])
        scores = itc_similarities(queries.float(), texts.float()).float().numpy()  # [B, T]
    student.train()
    owner = np.arange(len(ids)) // 5
    t2i = (scores > scores[owner, np.arange(len(ids))]).sum(0)
    best = np.array([row[owner == image].max() for image, row in enumerate(scores)])
    i2t = (scores > best[:, None]).sum(1)
    return {
        "val_t2i_r1": float(100 * (t2i < 1).mean()),
        "val_t2i_r10": float(100 * (t2i < 10).mean()),
        "val_i2t_r1": float(100 * (i2t < 1).mean()),
    }
