"""What graphs are for, and what their tensors mean: the vocabulary that the runtime is written in.

A bundle's graphs and tensors may have any name. The manifest gives each graph a role and each tensor a slot, and the
runtime asks for those: it never sees a model family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

IMAGE_TOWER = "image_tower"
QUERY_HEAD = "query_head"
TEXT_TOWER = "text_tower"
PAIR_SCORER = "pair_scorer"
DETECTOR = "detector"
PREPROCESS = "preprocess"
BOXES = "boxes"

HOST_ROLES = (PREPROCESS, BOXES)
"""Graphs of what the runtime computes in Python, for applications without Python. They are opened on request only."""

PIXELS = "pixels"
IMAGE_TOKENS = "image_tokens"
OBJECT_MASKS = "object_masks"
BOX_WEIGHTS = "box_weights"
TOKEN_IDS = "token_ids"
TOKEN_MASK = "token_mask"
IMAGE_VECTORS = "image_vectors"
TEXT_VECTORS = "text_vectors"
PAIR_SCORES = "pair_scores"
IMAGE_SIZES = "image_sizes"
SCORES = "scores"
LABEL_IDS = "label_ids"
PICTURE = "image"
BOX_CORNERS = "boxes"
IMAGE_SIZE = "image_size"

BOX_SLOTS = (OBJECT_MASKS, BOX_WEIGHTS)
TOKEN_SLOTS = (TOKEN_IDS, TOKEN_MASK)


@dataclass(frozen=True)
class Role:
    """The slots of one role. `optional` inputs may be absent; other inputs and outputs may be added by a family."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    required: bool = False


ROLES: Mapping[str, Role] = {
    role.name: role
    for role in (
        Role(IMAGE_TOWER, (PIXELS,), (IMAGE_TOKENS,), required=True),
        Role(QUERY_HEAD, (IMAGE_TOKENS,), (IMAGE_VECTORS,), BOX_SLOTS, required=True),
        Role(TEXT_TOWER, (TOKEN_IDS,), (TEXT_VECTORS,), (TOKEN_MASK,), required=True),
        Role(PAIR_SCORER, (IMAGE_TOKENS, TOKEN_IDS), (PAIR_SCORES,), (TOKEN_MASK, *BOX_SLOTS)),
        Role(DETECTOR, (PIXELS, IMAGE_SIZES), (BOX_CORNERS, SCORES, LABEL_IDS)),
        Role(PREPROCESS, (PICTURE,), (PIXELS,)),
        Role(BOXES, (BOX_CORNERS, IMAGE_SIZE), BOX_SLOTS),
    )
}
"""Roles that the runtime knows. `required` are those that every searchable bundle has; `pair_scorer` turns re-ranking
on. A graph of another role is kept in the manifest and not run."""
