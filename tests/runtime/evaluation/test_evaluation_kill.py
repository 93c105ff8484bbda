"""`kill -9` at random moments of `qpert eval`: the same command finishes with the same numbers, bit by bit.

Six kills in the suite; `QPERT_KILLS=50` for as many as the project promises.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from evaluation_sets import write_set

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("QPERT_KILLS", "6"))


@pytest.fixture(scope="module")
def command(tiny_bundle, tmp_path_factory):
    """The command line without its work folder: 30 images in one shard of the gallery, 90 texts, every pair."""
    folder = tmp_path_factory.mktemp("killed")
    bundle = shutil.copytree(tiny_bundle, folder / "bundle")
    root = write_set(folder / "set", images=30, captions=3)
    arguments = ["eval", str(bundle), "--dataset", str(root), "--threads", "1", "--json", "--work"]
    return [sys.executable, "-m", "qpert.runtime.cli", *arguments]


def result(output):
    """What has to be the same each time."""
    report = json.loads(output)
    return {key: value for key, value in report.items() if key not in ("seconds", "resumed", "environment")}


def records(work):
    """Every score that was kept, and every query embedding, as bytes."""
    connection = sqlite3.connect(work / "scores.sqlite")
    found = connection.execute("SELECT * FROM records ORDER BY kind, number").fetchall()
    connection.close()
    (queries,) = (work / "gallery").glob("query_embeds.*")
    return found, queries.read_bytes()


def test_kill_at_any_moment_loses_nothing_that_was_committed(command, tmp_path):
    began = time.monotonic()
    first = subprocess.run([*command, tmp_path / "whole"], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    seconds = time.monotonic() - began
    expected, bits = result(first.stdout), records(tmp_path / "whole")
    assert len(bits[0]) == 31  # the pairs of 30 images, and one record of texts
    chance = random.Random(7)
    work, killed, finished = tmp_path / "work", 0, 0
    while killed < KILLS:
        process = subprocess.Popen([*command, work], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, said = process.communicate(timeout=chance.uniform(0, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0, said
        assert result(out) == expected
        assert records(work) == bits
        finished += 1
        shutil.rmtree(work)
    last = subprocess.run([*command, work], capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert result(last.stdout) == expected
    assert records(work) == bits
    print(f"{killed} kills, {finished} runs that were quicker, {seconds:.1f} s undisturbed", file=sys.stderr)
