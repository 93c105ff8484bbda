"""Recall of a student on a generated split."""

from __future__ import annotations

import numpy as np
import torch
from data import tokenizer
from losses import itc_similarities
from student import Student
from torch import Tensor

from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.evaluation.metrics import image_to_text_ranks, recall, text_to_image_ranks
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.inputs.preprocessing import ImagePreprocessing
from qpert.runtime.scenes import draw_scene, generate

QUICK = 500
_cached: dict[str, tuple[Tensor, Tensor]] = {}


def quick_recall(student: Student) -> dict[str, float | None]:
    """R@1 and R@10 of ITC on the validation split of 500 pictures, in percent."""
    if "val" not in _cached:
        scenes = list(generate("val", QUICK, 0))
        size = CONFIGS["demo"].vision.image_size
        pictures = preprocess_images([draw_scene(scene) for scene, _ in scenes], ImagePreprocessing(size))
        texts = tokenizer().encode([caption.text for _, captions in scenes for caption in captions])
        _cached["val"] = torch.from_numpy(pictures), torch.from_numpy(texts.input_ids)
    pixels, ids = _cached["val"]
    student.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        queries = torch.cat([student.query_embeds(student.model.encode_image(part))[0] for part in pixels.split(125)])
        vectors = torch.cat([student.text_embeds(part)[0] for part in ids.split(500)])
        scores = itc_similarities(queries.float(), vectors.float()).float().numpy()  # [B, T]
    student.train()
    owner = np.repeat(np.arange(len(scores)), len(ids) // len(scores))
    t2i, i2t = recall(text_to_image_ranks(scores, owner)), recall(image_to_text_ranks(scores, owner))
    return {"val_t2i_r1": t2i[1], "val_t2i_r10": t2i[10], "val_i2t_r1": i2t[1]}
