"""Memory has a bound, whatever is asked, however long: the check itself is held against a service that does leak."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from mixed_load import drawn_pictures, drive, growth, mixed_request, resident
from running_service import running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc"),
]
WINDOW, WARM, MEASURED = 250, 16, 16
"""Requests between two looks at the memory, and how many windows are asked before measuring and while measuring. It
takes 4,000 requests to fill malloc's arenas (from 200 MB to 336); then they stay."""
LIMIT = 16.0
"""Megabytes that the line through the 16 looks may rise by. It was 5 in the second half of 8,000 requests: what is left
of the arenas' filling, and noise. A leak of the pixels (0.15 MB) of one picture in twelve, of 1,300, would be 16."""
LEAK = """
from qpert.runtime.serving import pictures
plain, kept = pictures.prepare, []
def prepare(*arguments):
    made = plain(*arguments)
    kept.append((len(kept) % 4 == 0) and made)
    return made
pictures.prepare = prepare
"""
"""As `sitecustomize`: one picture in four is never let go."""


def rise(bundle, gallery, environment=None):
    """Megabytes by which the line rises, and the statuses of the answers."""
    rng, statuses, looks = random.Random(5), Counter(), []
    pictures = drawn_pictures(rng, 40)
    with running(bundle, "--gallery", gallery, environment=environment) as service:
        for window in range(WARM + MEASURED):
            statuses += drive(service, [mixed_request(rng, pictures) for _ in range(WINDOW)])
            if window >= WARM:
                looks.append(resident(service.process.pid))
        assert service.client.get("/health/ready").status_code == 200
        assert not any("Traceback" in line for line in service.lines)
    return growth(looks), statuses, looks


def test_memory_has_a_bound_and_no_request_makes_the_service_fail(demo_bundle, photo_gallery):
    risen, statuses, looks = rise(demo_bundle, photo_gallery)
    assert set(statuses) <= {200, 400, 404, 413, 422, 503}, statuses
    assert statuses[200] > 1_000, "most of what was asked is answered"
    assert risen < LIMIT, looks


def test_a_leak_would_be_noticed(demo_bundle, photo_gallery, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LEAK)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    risen, _, looks = rise(demo_bundle, photo_gallery, {"PYTHONPATH": path})
    assert risen > LIMIT, looks
