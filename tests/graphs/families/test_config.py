"""The architecture as data."""

import json

import pytest

from qpert.graphs.families.blip2.config import CONFIGS, Blip2Config, QFormerConfig, VisionConfig


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_config_survives_json(name):
    config = CONFIGS[name]
    assert Blip2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.name == name


@pytest.mark.parametrize(
    ("name", "grid", "tokens", "width", "cross"),
    [
        # LAVIS: eva_vit_g at 224 px gives 257 tokens of 1408; the COCO checkpoint runs at 364 px: 26² + 1.
        ("pretrain", 16, 257, 1408, (0, 2, 4, 6, 8, 10)),
        ("coco", 26, 677, 1408, (0, 2, 4, 6, 8, 10)),
        ("pretrain_vitL", 16, 257, 1024, (0, 2, 4, 6, 8, 10)),
    ],
)
def test_the_published_models_have_their_published_dimensions(name, grid, tokens, width, cross):
    config = CONFIGS[name]
    assert (config.vision.grid, config.vision.tokens, config.vision.width) == (grid, tokens, width)
    assert config.qformer.cross_layers == cross
    assert (config.qformer.queries, config.qformer.head_dim, config.embed_dim) == (32, 64, 256)


@pytest.mark.parametrize(
    ("frequency", "layers", "cross"), [(1, 3, (0, 1, 2)), (2, 5, (0, 2, 4)), (3, 4, (0, 3)), (9, 4, (0,))]
)
def test_every_nth_layer_attends_to_the_image_beginning_with_the_first(frequency, layers, cross):
    assert QFormerConfig(8, layers, 2, 8, frequency, 4, 10, 10).cross_layers == cross


def test_an_image_size_between_two_multiples_of_the_patch_is_refused_with_both():
    with pytest.raises(ValueError, match=r"120 is not a multiple of the patch size 14; .* 112 and 126"):
        CONFIGS["demo"].with_image_size(120)


@pytest.mark.parametrize("size", [0, -14])
def test_an_image_size_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=rf"image size {size} is smaller than one patch of 14"):
        CONFIGS["demo"].with_image_size(size)


def test_another_image_size_changes_nothing_else():
    resized = CONFIGS["coco"].with_image_size(224)
    assert resized.vision.tokens == 257
    assert resized.with_image_size(364) == CONFIGS["coco"]


def test_a_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="vision width 30 is not a multiple of its 4 heads"):
        VisionConfig("eva", 28, 14, 30, 1, 4, 8, 1e-6)
    with pytest.raises(ValueError, match="Q-Former width 30 is not a multiple of its 4 heads"):
        QFormerConfig(30, 1, 4, 8, 1, 4, 10, 10)
