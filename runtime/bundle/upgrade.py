"""Schema 1 to schema 2, as a manifest is read: bundles of qpert 0.1 stay readable.

Schema 1 knew one model, BLIP-2, by the names of its graphs and tensors; this module alone remembers them.
"""

from __future__ import annotations

from typing import Any

from qpert.runtime.bundle import roles

GRAPH_ROLES = {
    "vision": roles.IMAGE_TOWER,
    "image_query": roles.QUERY_HEAD,
    "text": roles.TEXT_TOWER,
    "itm": roles.PAIR_SCORER,
}
TENSOR_SLOTS = {
    "pixel_values": roles.PIXELS,
    "image_embeds": roles.IMAGE_TOKENS,
    "object_masks": roles.OBJECT_MASKS,
    "box_weights": roles.BOX_WEIGHTS,
    "input_ids": roles.TOKEN_IDS,
    "attention_mask": roles.TOKEN_MASK,
    "query_embeds": roles.IMAGE_VECTORS,
    "text_embeds": roles.TEXT_VECTORS,
    "itm_scores": roles.PAIR_SCORES,
}
CLS_TOKENS = 1
PAD_ID = 0
"""Of [PAD] in BERT's vocabulary, and in the demonstration's."""


def upgrade_schema_1(values: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a schema-1 bundle in the form of schema 2. Raises KeyError or TypeError where it is none."""
    vision = values["architecture"]["vision"]
    side = int(vision["image_size"]) // int(vision["patch_size"])
    checkpoint = dict(values["checkpoint"])
    source, _, vision_file = split_source(checkpoint["source"])
    return values | {
        "schema_version": 2,
        "family": "blip2",
        "checkpoint": {
            "name": checkpoint["name"],
            "source": source,
            "format": checkpoint["family"],
            "sha256": checkpoint["sha256"],
            "license": checkpoint["license"],
        }
        | ({"parts": {"vision": vision_file}} if vision_file else {}),
        "graphs": {name: upgrade_graph(name, graph) for name, graph in values["graphs"].items()},
        "patches": [side, side],
        "patch_size": int(vision["patch_size"]),
        "prefix_tokens": CLS_TOKENS,
        "tokenizer": values["tokenizer"] | {"kind": "wordpiece", "clean": "lavis", "pad": "longest", "pad_id": PAD_ID},
        "scores": {"first": "max_cosine", "second": "logit", "final": "sum"},
    }


def split_source(source: str) -> tuple[str, str, str]:
    """A schema-1 source at the ` and ` that joins a checkpoint and its vision file; ("…", "", "") for one file.

    Both parts of such a pair end in a weight file's suffix, so a folder called `cats and dogs` is left whole.
    """
    for place in range(len(source)):
        before, joint, after = source[:place], source[place : place + 5], source[place + 5 :]
        if joint == " and " and before.endswith(WEIGHT_SUFFIXES) and after.endswith(WEIGHT_SUFFIXES):
            return before, joint, after
    return source, "", ""


WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def upgrade_graph(name: str, graph: dict[str, Any]) -> dict[str, Any]:
    """Adds the role and the slots."""

    def with_slots(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [spec | {"slot": TENSOR_SLOTS[spec["name"]]} for spec in specs]

    inputs, outputs = with_slots(graph["inputs"]), with_slots(graph["outputs"])
    return graph | {"role": GRAPH_ROLES[name], "inputs": inputs, "outputs": outputs}
