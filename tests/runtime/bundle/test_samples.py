"""Recorded samples on disk."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from qpert.runtime.bundle.samples import BoxSample, Case, Samples
from qpert.runtime.errors import BundleError


def samples():
    rng = np.random.default_rng(0)
    arrays = {"image_embeds": rng.random((2, 3, 4), np.float32), "box_weights": np.zeros((2, 0), np.float32)}
    return Samples(
        (
            Case(
                "vision",
                "pictures",
                {"pixel_values": rng.random((2, 3, 4, 4), np.float32)},
                {"image_embeds": arrays["image_embeds"]},
            ),
            Case("itm", "no_boxes", arrays, {"itm_scores": rng.random((2, 3), np.float32)}),
            Case("itm", "many_boxes", arrays, {"itm_scores": rng.random((2, 3), np.float32)}),
        ),
        ((rng.integers(0, 256, (5, 7, 3), np.uint8), rng.random((3, 4, 4), np.float32)),) * 2,
        (("a dog, twice", np.array([2, 7, 3])), ('"quoted" 猫', np.array([2, 3, 3, 3]))),
        (BoxSample(rng.random((2, 4)), np.array([7, 5]), rng.random((2, 5), np.float32), np.ones(2, np.float32)),),
    )


def store(path, arrays, metadata):
    save_file(arrays, str(path), metadata=metadata)
    return path


def test_samples_survive_the_disk(tmp_path):
    before = samples()
    after = Samples.load(store(tmp_path / "s.safetensors", *before.to_arrays()), ["vision", "itm"])
    assert [(case.graph, case.name) for case in after.cases] == [
        ("vision", "pictures"),
        ("itm", "many_boxes"),
        ("itm", "no_boxes"),
    ]
    by_name = {(case.graph, case.name): case for case in before.cases}
    for case in after.cases:
        own = by_name[case.graph, case.name]
        for found, expected in ((case.inputs, own.inputs), (case.expected, own.expected)):
            assert found.keys() == expected.keys()
            for name in found:
                np.testing.assert_array_equal(found[name], expected[name])
                assert found[name].dtype == expected[name].dtype
    for found, expected in zip(after.pictures + after.captions, before.pictures + before.captions, strict=True):
        assert str(found[0]) == str(expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def without(arrays, metadata, name):
    return {key: array for key, array in arrays.items() if key != name}, metadata


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays, metadata: (arrays, {}),
        lambda arrays, metadata: (arrays, {"captions": "not json"}),
        lambda arrays, metadata: (arrays, {"captions": "5"}),
        lambda arrays, metadata: without(arrays, metadata, "caption/1/input_ids"),
        lambda arrays, metadata: without(arrays, metadata, "picture/0/pixel_values"),
        lambda arrays, metadata: (arrays | {"vision/short": np.zeros(1)}, metadata),
        lambda arrays, metadata: (arrays | {"vision": np.zeros(1)}, metadata),
    ],
)
def test_a_file_that_lacks_something_is_an_error_that_names_it(tmp_path, damage):
    path = store(tmp_path / "s.safetensors", *damage(*samples().to_arrays()))
    with pytest.raises(
        BundleError, match=r"s\.safetensors cannot be read as recorded samples .*export the bundle again"
    ):
        Samples.load(path, ["vision", "itm"])


def test_a_truncated_or_missing_file_is_an_error_that_names_it(tmp_path):
    path = store(tmp_path / "s.safetensors", *samples().to_arrays())
    path.write_bytes(path.read_bytes()[:-10])
    for broken in (path, tmp_path / "none.safetensors"):
        with pytest.raises(BundleError, match=f"{broken.name} cannot be read as recorded samples"):
            Samples.load(broken, ["vision", "itm"])
