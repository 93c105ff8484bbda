"""BLIP-2's image branch of ITC in NumPy, float64, from a picture file: what the methods of `eval` are held against.

Written from LAVIS's `eva_vit.py`, `Qformer.py`, `blip2_qformer.py` and the paper's equations; nothing of qpert computes
here. Cross-attention takes any number of image tokens and any map of the queries, which is all that the baselines need.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.special import erf

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


class NumpyBlip2:
    """A model of the tiny configuration: EVA vision, Q-Former with cross-attention in every layer."""

    def __init__(self, state, *, size, patch, vision_heads, heads):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}
        self.size, self.patch, self.vision_heads, self.heads = size, patch, vision_heads, heads

    # Pictures

    def tokens(self, picture):
        """A file, or an array [h, w, 3] → image tokens [N, C]."""
        image = Image.open(picture).convert("RGB") if isinstance(picture, Path) else Image.fromarray(picture)
        small = np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC), np.float64)
        pixels = (small / 255 - MEAN) / STD  # [S, S, 3]
        weight = self.state["visual_encoder.patch_embed.proj.weight"]  # [C, 3, p, p]
        bias, p, grid = self.state["visual_encoder.patch_embed.proj.bias"], self.patch, self.size // self.patch
        patches = [
            np.einsum("cdij,ijd->c", weight, pixels[p * row : p * (row + 1), p * column : p * (column + 1)]) + bias
            for row in range(grid)
            for column in range(grid)
        ]
        x = np.vstack([self.state["visual_encoder.cls_token"][0], patches]) + self.state["visual_encoder.pos_embed"][0]
        count = len({name.split(".")[2] for name in self.state if name.startswith("visual_encoder.blocks.")})
        for number in range(count):
            x = self.block(x, f"visual_encoder.blocks.{number}.")
        return self.norm(x, "ln_vision", 1e-5)

    def block(self, x, at):
        attn = at + "attn."
        y = self.norm(x, at + "norm1", 1e-6)
        bias = [self.state[attn + "q_bias"], np.zeros(x.shape[1]), self.state[attn + "v_bias"]]
        q, k, v = np.split(y @ self.state[attn + "qkv.weight"].T + np.concatenate(bias), 3, axis=1)
        x = x + self.linear(attention(q, k, v, self.vision_heads), attn + "proj")
        y = self.norm(x, at + "norm2", 1e-6)
        return x + self.linear(gelu(self.linear(y, at + "mlp.fc1")), at + "mlp.fc2")

    # Q-Former

    def queries(self, tokens, query_map=None):
        """Image tokens [n, C] → query embeddings [Q, E] of unit length. query_map(layer, head) → [d, d], or None."""
        bert = "Qformer.bert."
        x = self.norm(self.state["query_tokens"][0], bert + "embeddings.LayerNorm", 1e-12)
        for number in range(self.layers):
            at = f"{bert}encoder.layer.{number}."
            own = [self.linear(x, f"{at}attention.self.{name}") for name in ("query", "key", "value")]
            x = self.closed(attention(*own, self.heads), x, at + "attention.output")
            q = self.linear(x, at + "crossattention.self.query")
            if query_map is not None:
                q = np.hstack([part @ query_map(number, head) for head, part in enumerate(self.split(q))])
            k, v = (self.linear(tokens, f"{at}crossattention.self.{name}") for name in ("key", "value"))
            x = self.closed(attention(q, k, v, self.heads), x, at + "crossattention.output")
            x = self.closed(gelu(self.linear(x, at + "intermediate_query.dense")), x, at + "output_query")
        found = self.linear(x, "vision_proj")
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    @property
    def layers(self):
        return len({name.split(".")[4] for name in self.state if name.startswith("Qformer.bert.encoder.layer.")})

    def keys(self, tokens, layer, head):
        """[N, d]: the keys of one head."""
        keys = self.linear(tokens, f"Qformer.bert.encoder.layer.{layer}.crossattention.self.key")
        return self.split(keys)[head]

    def split(self, x):
        return np.split(x, self.heads, axis=1)

    # Parts

    def linear(self, x, name):
        return x @ self.state[name + ".weight"].T + self.state[name + ".bias"]

    def norm(self, x, name, eps):
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + eps)
        return scaled * self.state[name + ".weight"] + self.state[name + ".bias"]

    def closed(self, x, residual, name):
        return self.norm(self.linear(x, name + ".dense") + residual, name + ".LayerNorm", 1e-12)


def attention(q, k, v, heads):
    found = []
    for one, keys, values in zip(*(np.split(x, heads, axis=1) for x in (q, k, v)), strict=True):
        scores = one @ keys.T / np.sqrt(one.shape[1])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        found.append(weights / weights.sum(axis=1, keepdims=True) @ values)
    return np.hstack(found)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def masked(box, size, grid):
    """[N]: the share of each patch that a box (x1, y1, x2, y2) in a picture of `size` covers; 0 for CLS."""
    width, height = size
    found = [0.0]
    for row in range(grid):
        for column in range(grid):
            left, right = column * width / grid, (column + 1) * width / grid
            top, bottom = row * height / grid, (row + 1) * height / grid
            across = max(0.0, min(right, box[2]) - max(left, box[0])) / (right - left)
            down = max(0.0, min(bottom, box[3]) - max(top, box[1])) / (bottom - top)
            found.append(across * down)
    return np.array(found)


def projector(keys, threshold):
    """(P, margin) of keys [n, d] that were multiplied by their mask: the leading eigenvectors whose cumulative share of
    the spectrum stays below the threshold, at least one. margin: how far the two ratios at the cut are from it."""
    values, vectors = np.linalg.eigh(keys.T @ keys)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if not values.sum():
        return np.zeros((keys.shape[1],) * 2), np.inf
    shares = np.cumsum(values) / values.sum()
    count = max(1, int((shares < threshold).sum()))
    kept = vectors[:, :count]
    return kept @ kept.T, float(np.abs(shares[count - 1 : count + 1] - threshold).min())
