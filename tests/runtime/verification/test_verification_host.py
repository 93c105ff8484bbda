"""The preprocessing gate on bundles that were recorded while Pillow 13 resized tall pictures rows first."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qpert.runtime.bundle.manifest import Manifest, read_manifest
from qpert.runtime.bundle.samples import Samples
from qpert.runtime.inputs.images import preprocess_images
from qpert.runtime.verification.host import pixel_distance, preprocessing_gate, runtime_pixels

OLD = Path(__file__).parents[2] / "fixtures" / "schema1" / "bundle"
"""Exported by 94133b9 with Pillow 13.0.0: schema 1; its second picture is 97×640."""


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest(OLD)


@pytest.fixture(scope="module")
def samples(manifest) -> Samples:
    return Samples.load(OLD / "samples.safetensors", tuple(manifest.graphs))


def gate(manifest, samples):
    return preprocessing_gate(SimpleNamespace(manifest=manifest), samples)


def test_an_old_bundle_passes_although_its_tall_picture_is_resized_in_another_order_now(manifest, samples):
    assert manifest.tools["pillow"] == "13.0.0"
    tall, recorded = samples.pictures[1]
    assert tall.shape == (640, 97, 3)
    one_level = 1 / 255 / min(manifest.preprocessing.std)
    now = np.abs(preprocess_images([tall], manifest.preprocessing)[0] - recorded).max()
    assert 1e-3 < now <= 1.01 * one_level, "the recorded pixels are not those of another order of passes"
    found = gate(manifest, samples)
    assert found.passed
    assert found.limit == 1e-5


def test_no_other_bundle_may_hold_another_order(manifest, samples):
    for other in (
        replace(manifest, tools={**manifest.tools, "pillow": "12.3.0"}),
        replace(manifest, tools={}),
        replace(manifest, schema_read=2),
    ):
        assert not gate(other, samples).passed


def test_another_filter_or_other_pixels_fail_an_old_bundle_all_the_same(manifest, samples):
    bilinear = replace(manifest, preprocessing=replace(manifest.preprocessing, resample="bilinear"))
    assert not gate(bilinear, samples).passed
    tall, recorded = samples.pictures[1]
    one_level = np.float32(1 / 255 / max(manifest.preprocessing.std))
    changed = recorded.copy()
    changed[0, 3, 3] += one_level
    assert pixel_distance(runtime_pixels(manifest), tall, recorded, rows_first=True) <= 1e-5
    assert pixel_distance(runtime_pixels(manifest), tall, changed, rows_first=True) > 1e-3


def test_a_picture_that_is_not_tall_has_no_other_order(manifest):
    wide = np.random.default_rng(0).integers(0, 256, (60, 61, 3), dtype=np.uint8)
    turned = preprocess_images([wide.transpose(1, 0, 2)], manifest.preprocessing)[0].transpose(0, 2, 1)
    ours = preprocess_images([wide], manifest.preprocessing)[0]
    assert np.abs(turned - ours).max() > 1e-3
    assert pixel_distance(runtime_pixels(manifest), wide, turned, rows_first=True) == np.abs(turned - ours).max()
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    assert pixel_distance(runtime_pixels(manifest), tall, ours.transpose(0, 2, 1), rows_first=True) == 0
    assert pixel_distance(runtime_pixels(manifest), tall, ours.transpose(0, 2, 1), rows_first=False) > 1e-3
