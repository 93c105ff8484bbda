"""`examples/ray` and `examples/daft` as their readers run them, with a worker that is killed midway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qpert.runtime import Boxes, Retriever
from qpert.runtime.cli import run

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
WAIT = 600.0
"""Seconds until a job has failed: Ray alone takes up to a minute to start on a loaded machine."""
STARTS = 5
COUNT = 480
BOX = [3, 4, 20, 25]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, random_pictures):
    """Pictures, of which number 5 has a box."""
    root = tmp_path_factory.mktemp("set")
    (root / "images").mkdir()
    rng = np.random.default_rng(5)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (40 + number % 9, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:03d}.png")
    row = dict(zip(("image", "x1", "y1", "x2", "y2"), ("005.png", *BOX), strict=True))
    (root / "boxes.jsonl").write_text(json.dumps(row) + "\n")
    return root


@pytest.fixture(scope="module")
def expected(demo_bundle, pictures):
    """What the runtime gives, by name: float32 [Q, E] each."""
    files = sorted((pictures / "images").glob("*.png"))
    boxes = [Boxes.empty(Image.open(file).size) for file in files]
    boxes[5] = Boxes(np.array([BOX], float), Image.open(files[5]).size)
    with Retriever.open(demo_bundle, threads=1) as retriever:
        vectors = retriever.encode_images(files, boxes).query_embeds
    return {file.name: vectors[row] for row, file in enumerate(files)}


def start(example: str, *arguments: object) -> subprocess.Popen:
    # Ray's sockets lie below its folder, and their paths may have 107 bytes
    variables = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp(prefix="qpert-ray-"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / example / "encode.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def finish(example: str, *arguments: object, meanwhile: Callable[[subprocess.Popen], None] | None = None) -> dict:
    """What the job prints at its end. It is started again where Ray itself did not come up: it gives its own agent some
    15 seconds, which nothing can change, and a loaded machine needs more."""
    for _ in range(STARTS):
        job = start(example, *arguments)
        if meanwhile is not None:
            meanwhile(job)
        out, err = job.communicate(timeout=WAIT)
        if "timed out during startup" not in err:
            break
    assert job.returncode == 0, err
    (result,) = [line for line in out.splitlines() if line.startswith("{")]  # Ray writes of a killed actor to stdout
    return json.loads(result)


def descendants(pid: int) -> list[int]:
    """Processes below one, by /proc."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def actors(pid: int) -> set[int]:
    """The processes below one in which Ray's actors of this job run."""
    named = set()
    for process in descendants(pid):
        try:
            title = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and b"EncodeImages" in title:
            named.add(process)
    return named


def rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def check(found: list[dict], expected: dict) -> None:
    """Every image exactly once, without an error, with the runtime's vectors bit for bit."""
    assert sorted(row["image"] for row in found) == sorted(expected)
    assert [row["error"] for row in found] == [None] * len(expected)
    for row in found:
        np.testing.assert_array_equal(np.array(row["query_embeds"], np.float32), expected[row["image"]], row["image"])


def test_ray_finds_every_image_once_though_an_actor_is_killed_and_resumes(demo_bundle, pictures, expected, tmp_path):
    out = tmp_path / "vectors"
    arguments = (demo_bundle, pictures / "images", out, "--boxes", pictures / "boxes.jsonl", "--batch", 4)
    arguments += ("--memory", 256)
    written = []

    def kill_one(job: subprocess.Popen) -> None:
        """As soon as there are two actors and the first vectors."""
        seen, end = set(), time.monotonic() + WAIT
        while job.poll() is None and not written and time.monotonic() < end:
            if len(seen) < 2:
                seen = actors(job.pid)
            elif out.is_dir() and any(out.glob("*.parquet")):
                os.kill(min(seen), signal.SIGKILL)
                written.append(len(list(out.glob("*.parquet"))))
            time.sleep(0.01)

    report = finish("ray", *arguments, meanwhile=kill_one)
    assert report["found"] == 0
    assert written, "the job ended before an actor could be killed"
    assert written[0] < len(list(out.glob("*.parquet"))), "work was left when the actor was killed"
    check(rows(out), expected)

    files = sorted(out.glob("*.parquet"))  # a job that was stopped: one file is missing, one not finished
    lost = sum(pq.read_metadata(path).num_rows for path in files[:2])
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-100])
    report = finish("ray", *arguments)
    assert report["found"] == COUNT - lost
    check(rows(out), expected)

    gallery = str(tmp_path / "gallery")
    assert run(["index", str(demo_bundle), "--from", str(out), "--out", gallery]) == 0
    with Retriever.open(demo_bundle) as retriever, retriever.open_gallery(gallery) as opened:
        assert sorted(opened.images) == sorted(expected)
        assert len(retriever.search("a cup", opened, k=3)) == 3


def test_ray_reads_parquet_of_file_bytes(demo_bundle, pictures, expected, tmp_path):
    import pyarrow as pa

    files = sorted((pictures / "images").glob("*.png"))[6:18]
    columns = {"path": [file.name for file in files], "bytes": [file.read_bytes() for file in files]}
    pq.write_table(pa.table(columns), tmp_path / "pictures.parquet")
    report = finish("ray", demo_bundle, tmp_path / "pictures.parquet", tmp_path / "out", "--memory", 256)
    assert report["found"] == 0
    check(rows(tmp_path / "out"), {file.name: expected[file.name] for file in files})


def test_daft_gives_the_same_with_the_same_callable(demo_bundle, pictures, expected, tmp_path):
    arguments = (demo_bundle, pictures / "images", tmp_path / "out", "--boxes", pictures / "boxes.jsonl")
    assert finish("daft", *arguments)["images"] == COUNT
    check(rows(tmp_path / "out"), expected)


def test_a_wrong_bundle_is_said_in_one_line_before_ray_starts(pictures, tmp_path):
    job = start("ray", tmp_path / "nothing", pictures / "images", tmp_path / "out")
    _, err = job.communicate(timeout=WAIT)
    assert job.returncode == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
