"""Optimisation profiles, against shapes written down by hand from the contract's table of inputs."""

from __future__ import annotations

import pytest

from qpert.exporter.engines.profiles import lengths_of, profile_of
from qpert.exporter.families.blip2.graph_specs import graph_specs
from qpert.exporter.families.declare import Limits
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.bundle.graph_spec import AxisRange

LIMITS = Limits(batch=8, boxes=32, texts=64, length=35)


def graphs(stages):
    return graph_specs(CONFIGS["coco"], precision="fp16", stages=stages, limits=LIMITS)


def test_every_input_of_the_full_size_graphs_has_its_shapes():
    made = {name: profile_of(spec) for name, spec in graphs("both").items()}
    tokens = 677  # (364 / 14)² patches and the class token
    assert made["vision"] == {"pixel_values": ((1, 3, 364, 364), (8, 3, 364, 364), (8, 3, 364, 364))}
    assert made["text"]["attention_mask"] == ((1, 2), (64, 16), (64, 35))
    assert made["image_query"] == {
        "image_embeds": ((1, tokens, 1408), (8, tokens, 1408), (8, tokens, 1408)),
        "object_masks": ((1, 1, tokens), (8, 8, tokens), (8, 32, tokens)),
        "box_weights": ((1, 1), (8, 8), (8, 32)),
    }
    assert made["itm"]["input_ids"] == ((1, 1, 2), (1, 64, 16), (8, 64, 35))
    assert made["itm"]["object_masks"] == ((1, 1, tokens), (1, 8, tokens), (8, 32, tokens))


def test_without_perturbation_there_are_no_boxes_in_the_profile():
    assert list(profile_of(graphs("none")["image_query"])) == ["image_embeds"]


@pytest.mark.parametrize(
    ("axis", "declared", "lengths"),
    [
        ("O", (0, 32), (1, 8, 32)),  # one box of weight zero stands for none
        ("O", (0, 4), (1, 4, 4)),
        ("L", (2, 12), (2, 12, 12)),
        ("I", (1, 1), (1, 1, 1)),
        ("T", (1, 500), (1, 500, 500)),
        ("B", (3, 3), (3, 3, 3)),
    ],
)
def test_lengths_stay_within_the_declared_range_and_in_order(axis, declared, lengths):
    assert lengths_of(axis, AxisRange(*declared)) == lengths
