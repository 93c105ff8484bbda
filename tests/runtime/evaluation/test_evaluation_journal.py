"""What survives in the journal of an evaluation, and what is computed again."""

import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.evaluation.journal import DiskJournal, NullJournal, key_of

KEY = key_of(np.arange(3))
VALUES = np.array([0.5, -2.25, 1e-30], np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.sqlite"


def test_what_was_put_is_found_again_by_another_process_bit_by_bit(path):
    with DiskJournal(path) as journal:
        journal.put("pairs", 7, KEY, VALUES)
    with DiskJournal(path) as journal:
        found = journal.get("pairs", 7, KEY)
        assert found.tobytes() == VALUES.tobytes()
        assert journal.get("pairs", 8, KEY) is None
        assert journal.get("texts", 7, KEY) is None


def test_a_record_of_other_texts_is_not_there(path):
    with DiskJournal(path) as journal:
        journal.put("pairs", 7, KEY, VALUES)
        assert journal.get("pairs", 7, key_of(np.arange(4))) is None
        assert journal.get("pairs", 7, key_of(np.arange(3, dtype=np.int32))) is None


def test_a_damaged_record_is_not_there(path):
    with DiskJournal(path) as journal:
        journal.put("pairs", 7, KEY, VALUES)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE records SET data = ?", ((VALUES + 1).tobytes(),))
    connection.commit()
    connection.close()
    with DiskJournal(path) as journal:
        assert journal.get("pairs", 7, KEY) is None


def test_a_second_process_is_refused_in_words_and_the_lock_dies_with_its_process(path):
    program = (
        "import sys; from pathlib import Path; from qpert.runtime.evaluation.journal import DiskJournal\n"
        "journal = DiskJournal(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "open\n"
    with pytest.raises(InputError, match=r"another process is evaluating in .*--work"):
        DiskJournal(path)
    process.kill()
    process.wait()
    DiskJournal(path).close()


def test_a_full_disk_is_said_and_what_was_committed_stays(path):
    journal = DiskJournal(path)
    journal.put("pairs", 0, KEY, VALUES)
    journal.commit()
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be out of room
    with pytest.raises(UnavailableError, match=r"database or disk is full") as caught:
        journal.put("pairs", 1, KEY, np.zeros(100_000, np.float32))
    assert caught.value.code == "journal-write"
    journal.close()
    with DiskJournal(path) as again:
        assert again.get("pairs", 0, KEY).tolist() == VALUES.tolist()


def test_a_file_that_is_no_journal_is_refused(path):
    path.write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(InputError) as caught:
        DiskJournal(path)
    assert caught.value.code == "journal-unreadable"


def test_without_a_journal_nothing_is_kept():
    journal = NullJournal()
    journal.put("pairs", 0, KEY, VALUES)
    assert journal.get("pairs", 0, KEY) is None
