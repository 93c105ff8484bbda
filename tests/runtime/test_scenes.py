"""The generated scenes: their boxes against pixels, their captions against facts, their split against what is asked."""

import hashlib
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from qpert.runtime.errors import InputError
from qpert.runtime.evaluation.metrics import size_bins
from qpert.runtime.scenes import (
    Salience,
    caption_ceiling,
    describe_large,
    draw_scene,
    generate,
    object_map,
    sample_scene,
    write_dataset,
)
from qpert.runtime.scenes.captions import MOST_WORDS, Caption
from qpert.runtime.scenes.facts import Claim, Mention, Relation, is_true
from qpert.runtime.scenes.objects import KINDS
from qpert.runtime.scenes.scene import LEAST_VISIBLE, Scene, SceneObject


@pytest.fixture(scope="module")
def samples():
    return list(generate("test", 150, 3))


def extent(pixels):
    """x1, y1, x2, y2 around the true pixels of [H, W]."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_boxes_are_the_extent_of_the_pixels_that_an_object_paints(samples):
    marker = (255, 0, 255)
    for scene, _ in samples[:60]:
        for item in scene.objects:
            alone = replace(scene, objects=(item,))
            painted = np.asarray(draw_scene(alone, markers=[marker]))
            assert extent((painted == marker).all(2)) == item.box


def test_the_real_painting_stays_inside_the_silhouettes(samples):
    for scene, _ in samples[:20]:
        bare = np.asarray(draw_scene(replace(scene, objects=())), np.int64)
        changed = (np.asarray(draw_scene(scene), np.int64) != bare).any(2)
        assert not (changed & (np.asarray(object_map(scene)) == 0)).any()


def test_no_object_is_hidden_by_more_than_the_limit(samples):
    for scene, _ in samples:
        seen = np.asarray(object_map(scene))
        for index, item in enumerate(scene.objects):
            alone = np.asarray(object_map(replace(scene, objects=(item,))))
            assert (seen == index + 1).sum() >= LEAST_VISIBLE * (alone == 1).sum()


def test_some_objects_hide_others_in_part(samples):
    hidden = 0
    for scene, _ in samples:
        seen = np.asarray(object_map(scene))
        alone = [np.asarray(object_map(replace(scene, objects=(item,)))) for item in scene.objects]
        hidden += any((seen == i + 1).sum() < (mask == 1).sum() for i, mask in enumerate(alone))
    assert hidden > 30


def test_every_kind_touches_the_sides_of_its_place():
    for kind in KINDS:
        item = SceneObject(kind, "red", "plain", (10, 20, 60, 50), mirrored=False, group=0)
        x1, y1, x2, y2 = item.box
        assert abs(x1 - 10) <= 1
        assert abs(y1 - 20) <= 1
        assert abs(x2 - 70) <= 3
        assert abs(y2 - 70) <= 3


def test_a_seed_gives_the_same_scene_and_captions_and_other_seeds_others():
    first, again = list(generate("val", 5, 1)), list(generate("val", 5, 1))
    assert first == again
    assert draw_scene(first[0][0]).tobytes() == draw_scene(again[0][0]).tobytes()
    others = [
        scene.objects
        for split, seed in (("val", 2), ("test", 1), ("train", 1))
        for scene, _ in generate(split, 5, seed)
    ]
    assert not {scene.objects for scene, _ in first} & set(others)


def test_every_caption_is_true_of_its_own_scene_and_fits_into_a_text(samples):
    for scene, captions in samples:
        assert len({caption.text for caption in captions}) == 5
        for caption in captions:
            assert is_true(caption.claim, scene)
            assert len(caption.text.replace(",", " ,").split()) <= MOST_WORDS


def test_some_captions_speak_of_one_small_object_only_and_some_of_relations(samples):
    claims = [(scene, caption.claim) for scene, captions in samples for caption in captions]
    single = [claim for scene, claim in claims if len(claim.mentions) == 1]
    assert 0.05 < len(single) / len(claims) < 0.3
    assert sum(bool(claim.relations) for _, claim in claims) > 0.2 * len(claims)


def scene_of(*objects, background="grass"):
    items = tuple(SceneObject(*one, mirrored=False, group=index) for index, one in enumerate(objects))
    return Scene((200, 200), background, items, "by hand")


RED_BALL = ("ball", "red", "striped", (10, 10, 40, 40))
BLUE_CAR = ("car", "blue", "plain", (120, 80, 64, 40))


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (Claim((Mention("ball", "red"),), (), None), True),
        (Claim((Mention("ball", "red"),), (), "sand"), False),
        (Claim((Mention("ball", "red", texture="striped", size="small", cell="upper left"),), (), "grass"), True),
        (Claim((Mention("ball", "red", texture="plain"),), (), None), False),
        (Claim((Mention("ball", "red", size="tiny"),), (), None), False),
        (Claim((Mention("ball", "red", count=2),), (), None), False),
        (Claim((Mention("ball", "blue"),), (), None), False),
        (Claim((Mention("ball", "red"), Mention("ball", "red")), (), None), False),
        (Claim((Mention("ball", "red"), Mention("car", "blue")), (Relation(0, "left of", 1),), None), True),
        (Claim((Mention("ball", "red"), Mention("car", "blue")), (Relation(1, "left of", 0),), None), False),
        (Claim((Mention("ball", "red"), Mention("car", "blue")), (Relation(1, "right of", 0),), None), True),
        (Claim((Mention("ball", "red"), Mention("car", "blue")), (Relation(0, "above", 1),), None), False),
    ],
)
def test_the_truth_of_claims_about_a_scene_made_by_hand(claim, expected):
    assert is_true(claim, scene_of(RED_BALL, BLUE_CAR)) is expected


def test_the_ceiling_of_a_case_worked_by_hand():
    scenes = [scene_of(RED_BALL), scene_of(RED_BALL, BLUE_CAR)]
    ball = Caption(("a red ball",), Claim((Mention("ball", "red"),), (), None))
    both = Caption(("both",), Claim((Mention("ball", "red"), Mention("car", "blue")), (), None))
    ceiling = caption_ceiling(scenes, [[ball], [ball, both]])
    # T2I@1: "ball" is true of both pictures (1/2, twice), "both" of one (1): mean 2/3.
    assert ceiling.t2i[1] == pytest.approx(200 / 3)
    # I2T@1: picture 0 has two true captions, one its own (1/2); picture 1 three, two its own (2/3).
    assert ceiling.i2t[1] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert ceiling.t2i[5] == ceiling.i2t[5] == 100
    assert ceiling.ambiguous_captions == 2


def test_the_test_split_fills_every_size_bin_and_has_small_ones():
    areas = np.array([sample_scene(f"test/0/{index}").largest_area for index in range(1000)])
    counts = np.bincount(size_bins(areas), minlength=10)
    assert counts.min() >= 25
    assert counts[0] >= 60


def test_the_written_annotations_name_chains_scenes_and_several_boxes(tmp_path):
    write_dataset(tmp_path, "val", 40, seed=2)
    several = 0
    for index, (scene, captions) in enumerate(generate("val", 40, 2)):
        stem = f"{100_000_001 + index:010d}"
        root = ET.parse(tmp_path / "flickr30k_entities" / "Annotations" / f"{stem}.xml").getroot()
        assert (int(root.findtext("size/width")), int(root.findtext("size/height"))) == scene.size
        objects = root.findall("object")
        assert objects[0].findtext("nobndbox") == objects[0].findtext("scene") == "1"
        names = [one.findtext("name") for one in objects[1:]]
        several += len(names) > len(set(names))
        lines = (tmp_path / "flickr30k_entities" / "Sentences" / f"{stem}.txt").read_text().splitlines()
        assert len(lines) == len(captions) == 5
        assert all(line.startswith(("[/EN#", "There", "there", "We", "we", "You", "you", "a")) for line in lines)
    assert several > 3


def test_writing_twice_gives_the_same_files(tmp_path):
    digests = []
    for name in ("one", "two"):
        write_dataset(tmp_path / name, "test", 6, seed=1, layout="coco")
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        assert len(files) == 1 + 3 * 6
        digests.append(
            [(file.relative_to(tmp_path / name), hashlib.sha256(file.read_bytes()).digest()) for file in files]
        )
    assert digests[0] == digests[1]
    entries = json.loads((tmp_path / "one" / "annotations" / "test.json").read_text())
    assert entries[0]["image"] == "val2014/COCO_val2014_000200000001.jpg"
    with Image.open(tmp_path / "one" / entries[0]["image"]) as picture:
        assert picture.format == "JPEG"


def test_an_unknown_split_or_layout_is_an_error(tmp_path):
    with pytest.raises(InputError, match="expected one of train, val, test"):
        write_dataset(tmp_path, "dev", 1)
    with pytest.raises(InputError, match="expected one of flickr30k, coco"):
        write_dataset(tmp_path, "test", 1, layout="voc")


def test_captions_of_the_smallest_object_name_it_and_nothing_else():
    usual = {scene.seed: captions for scene, captions in generate("val", 60, 1)}
    for scene, captions in generate("val", 60, 1, captions="smallest"):
        assert scene.seed in usual, "the same pictures"
        assert len({caption.text for caption in captions}) == 2
        areas = [max(scene.area(item) for item in group) for group in scene.groups]
        smallest = scene.groups[areas.index(min(areas))]
        for caption in captions:
            (mention,) = caption.claim.mentions
            assert (mention.kind, mention.colour) == (smallest[0].kind, smallest[0].colour)


def test_captions_with_salience_speak_of_large_objects_more_often():
    """Over 300 scenes; the chance of an object of one tenth of the picture is one half by definition."""
    named = {"small": [], "large": []}
    for scene, _ in generate("val", 300, 1):
        captions = describe_large(scene, f"{scene.seed}/large", Salience())
        for group in scene.groups:
            area = max(scene.area(item) for item in group)
            said = [
                (group[0].kind, group[0].colour) in {(m.kind, m.colour) for m in c.claim.mentions} for c in captions
            ]
            if area < 0.03 or area > 0.2:
                named["small" if area < 0.03 else "large"] += said
    assert Salience().chance(0.1) == 0.5
    assert np.mean(named["small"]) < 0.2
    assert np.mean(named["large"]) > 0.6
