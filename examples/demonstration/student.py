"""The small BLIP-2 in training: the model that ships, and the auxiliary heads that do not."""

from __future__ import annotations

import math

import torch
from data import ATTRIBUTES, COLOUR_BLOCK, CONCEPTS, PLACES
from torch import Tensor, nn

from qpert.graphs.families.blip2.config import Blip2Config
from qpert.graphs.families.blip2.model import Blip2Retrieval

RARE = -3.3
"""Log-odds of a concept: heads begin at its usual rarity, so that no first lesson pushes all queries the same way."""


class Student(nn.Module):
    """`model` is the demonstration's BLIP-2. `patches` says of every image token whether it shows an object and with
    what attributes, `place` reads the background off CLS, `concepts` what an embedding of either tower speaks of, and
    `slots` what query number c knows of the objects of colour c: without it the queries become one and the same."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.model = Blip2Retrieval(config)
        self.patches = nn.Linear(config.vision.width, 1 + sum(map(len, ATTRIBUTES.values())))
        self.place = nn.Linear(config.vision.width, len(PLACES))
        self.concepts = nn.Linear(config.embed_dim, CONCEPTS)
        self.slots = nn.Linear(config.qformer.width, COLOUR_BLOCK)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def query_embeds(self, image_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] → float32 [B, Q, E] of unit length, the same before that, and the hidden states [B, Q, C]."""
        model = self.model
        hidden = model.Qformer.encode_queries(model.query_tokens, model.image_context(image_embeds, None, None))
        raw = model.vision_proj(hidden).float()
        return nn.functional.normalize(raw, dim=-1), raw, hidden

    def text_embeds(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T, L], padded with 0 → float32 [T, E], of unit length and before that. Runs in three chunks by length,
        each cut to its longest text."""
        lengths = (ids > 0).sum(1)
        order = lengths.argsort()
        parts = []
        for rows in order.chunk(3):
            own = ids[rows][:, : int(lengths[rows].max())]
            parts.append(self.model.text_proj(self.model.Qformer.encode_text(own, (own > 0).long())[:, 0]).float())
        raw = torch.cat(parts)[order.argsort()]
        return nn.functional.normalize(raw, dim=-1), raw

    def match(self, image_embeds: Tensor, ids: Tensor) -> Tensor:
        """[I, N, C] and int64 [I, T, L] → logits float32 [I, T, 2], averaged over queries."""
        model = self.model
        mask = (ids > 0).long()
        context = model.image_context(image_embeds, None, None)
        queries = model.Qformer.encode_pairs(model.query_tokens, context, ids, mask)
        return model.itm_head(queries).float().mean(1).unflatten(0, ids.shape[:2])


def new_student(config: Blip2Config, seed: int) -> Student:
    """Seeded weights: Xavier matrices, small embeddings, and a position embedding that begins as sines and cosines."""
    torch.manual_seed(seed)
    student = Student(config)
    for name, tensor in student.named_parameters():
        if "embeddings" in name and name.endswith("weight") and tensor.ndim == 2:
            nn.init.normal_(tensor, std=0.05)
        elif tensor.ndim == 2:
            nn.init.xavier_uniform_(tensor)
        elif tensor.ndim == 4:
            nn.init.normal_(tensor, std=1 / math.sqrt(tensor[0].numel()))
    with torch.no_grad():
        for name, tensor in student.named_parameters():
            if "Qformer" in name and "output" in name and name.endswith("dense.weight"):
                tensor.mul_(0.4)  # what a sublayer adds begins small, or tokens become alike from layer to layer
        student.slots.bias.fill_(RARE)
        student.concepts.bias.fill_(RARE)
        student.model.query_tokens.normal_(std=0.3)
        student.model.visual_encoder.pos_embed[0, 1:] = 0.4 * _sines(config.vision.grid, config.vision.width)
        student.model.visual_encoder.cls_token.normal_(std=0.1)
    return student


def _sines(grid: int, width: int) -> Tensor:
    """[grid², width]: half of the channels from the row, half from the column."""
    rates = 1 / 30 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, width / 2]
    rows = line[:, None].expand(grid, grid, -1)
    return torch.cat([rows, rows.transpose(0, 1)], -1).flatten(0, 1)
