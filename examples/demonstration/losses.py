"""BLIP-2's objectives, image-text contrast and matching, and the auxiliary ones that lead up to them."""

from __future__ import annotations

import torch
from data import ATTRIBUTES, COLOUR_BLOCK, CONCEPTS
from student import Student
from torch import Tensor
from torch.nn import functional as F

ATTRIBUTE_WEIGHTS = {"kind": 2.0, "colour": 1.0, "texture": 0.7, "size": 0.5, "cell": 0.5}


def patch_loss(student: Student, tokens: Tensor, patches: Tensor, places: Tensor) -> tuple[Tensor, dict[str, float]]:
    """tokens [B, N, C]; patches uint8 [B, P, 1 + attributes]; places [B]. Attributes count on object patches only:
    background is most of a picture and would drown them. Also the accuracies."""
    logits = student.patches(tokens[:, 1:]).float()  # [B, P, 1 + …]
    shows = patches[..., 0] > 0
    loss = F.binary_cross_entropy_with_logits(logits[..., 0], shows.float())
    place_logits = student.place(tokens[:, 0]).float()
    loss = loss + 0.5 * F.cross_entropy(place_logits, places)
    accuracies = {"place": _accuracy(place_logits, places)}
    parts = logits[..., 1:][shows].split([len(values) for values in ATTRIBUTES.values()], dim=-1)
    for index, (name, part) in enumerate(zip(ATTRIBUTES, parts, strict=True)):
        target = patches[..., 1 + index][shows].long()
        loss = loss + ATTRIBUTE_WEIGHTS[name] * F.cross_entropy(part, target)
        accuracies[name] = _accuracy(part, target)
    return loss, accuracies


def concept_loss(student: Student, embeds: Tensor, targets: Tensor) -> Tensor:
    """embeds [R, E]; targets [R, CONCEPTS], 0 or 1: which concepts each embedding speaks of. Nats for each row."""
    logits = student.concepts(embeds).float()
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)


def slot_loss(student: Student, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [B, Q, C]; targets [B, CONCEPTS]: query c tells the kind, texture, size and cell of what has colour c."""
    blocks = targets[:, : CONCEPTS // COLOUR_BLOCK * COLOUR_BLOCK].unflatten(1, (-1, COLOUR_BLOCK))  # [B, colours, …]
    logits = student.slots(hidden[:, : blocks.shape[1]]).float()
    return F.binary_cross_entropy_with_logits(logits, blocks, reduction="sum") / len(targets)


def many_hot(numbers: Tensor) -> Tensor:
    """[R, K], 1 + concept, padded with 0 → float32 [R, CONCEPTS]."""
    return torch.zeros(len(numbers), CONCEPTS + 1).scatter_(1, numbers, 1.0)[:, 1:]


def itc_similarities(query_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """[B, Q, E] and [T, E] → [B, T], the best query of each image for each text."""
    return (query_embeds.flatten(0, 1) @ text_embeds.T).unflatten(0, query_embeds.shape[:2]).amax(1)


def itc_loss(similarities: Tensor, log_scale: Tensor) -> Tensor:
    """similarities [B, B*C]: texts c of image i are columns i*C … i*C + C − 1. Both directions; an image's own texts
    share its target."""
    logits = similarities * log_scale.exp().clamp(max=100.0)
    images, texts = logits.shape
    each = texts // images
    owner = torch.arange(texts) // each
    to_text = -logits.log_softmax(1)[owner, torch.arange(texts)].mean()
    return (to_text + F.cross_entropy(logits.T, owner)) / 2


def itm_loss(
    student: Student, image_embeds: Tensor, ids: Tensor, similarities: Tensor, log_scale: Tensor
) -> tuple[Tensor, float]:
    """Matching with hard negatives drawn by similarity, as in BLIP-2, and the accuracy.

    image_embeds [B, N, C]; ids [B, L], one text an image; similarities [B, B]. Each image meets its own text and a
    wrong one, each text two wrong images: finding the picture of a text is the harder direction. Beside the two-class
    loss a ranking loss puts the own pair's match logit, which is the score, before those of the wrong ones.
    """
    count = len(ids)
    own = torch.arange(count)
    with torch.no_grad():
        logits = similarities.detach() * log_scale.exp().clamp(max=30.0)
        logits = logits.masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
        hard_texts = torch.multinomial(logits.softmax(1), 1)[:, 0]
        hard_images = torch.multinomial(logits.T.softmax(1), 2)  # [B, 2]
    images = torch.cat([own, own, hard_images[:, 0], hard_images[:, 1]])
    texts = torch.cat([own, hard_texts, own, own])
    pair_logits = student.match(image_embeds[images], ids[texts][:, None])[:, 0]  # [4B, 2]
    labels = (images == texts).long()
    weights = torch.where(labels == 1, 1.5, 1.0)
    loss = F.cross_entropy(pair_logits, labels, reduction="none") * weights
    right, wrong_text, wrong_images = pair_logits[:, 1].split([count, count, 2 * count])
    by_image = F.cross_entropy(torch.stack([right, wrong_text], 1), torch.zeros_like(own))
    for_text = torch.cat([right[:, None], wrong_images.unflatten(0, (2, -1)).T], 1)  # [B, 3]
    by_text = F.cross_entropy(for_text, torch.zeros_like(own))
    return loss.sum() / weights.sum() + 0.3 * by_image + 0.7 * by_text, _accuracy(pair_logits, labels)


def _accuracy(logits: Tensor, target: Tensor) -> float:
    return float((logits.argmax(-1) == target).float().mean())
