"""A folder appears whole or not at all, whatever happens while it is written."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from qpert.runtime.bundle import staging
from qpert.runtime.bundle.staging import check_target, staged_folder
from qpert.runtime.errors import InputError


def bundle(path, content="old"):
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    (path / "file").write_text(content)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, content="new", *, force=False):
    with staged_folder(target, force=force) as folder:
        (folder / "manifest.json").write_text("{}")
        (folder / "file").write_text(content)


def test_a_folder_appears_when_the_block_ends_and_not_before(tmp_path):
    target = tmp_path / "deep" / "b"
    with staged_folder(target, force=False) as folder:
        assert folder.is_dir()
        assert not target.exists()
        (folder / "file").write_text("x")
    assert names(tmp_path / "deep") == ["b"]
    assert (target / "file").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_or_an_interrupt_leaves_nothing(tmp_path, error):
    def interrupted():
        with staged_folder(tmp_path / "b", force=False) as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_bundle_that_was_to_be_replaced(tmp_path, error):
    bundle(tmp_path / "b")
    with pytest.raises(error), staged_folder(tmp_path / "b", force=True):
        raise error
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b" / "file").read_text() == "old"


def test_force_replaces_a_bundle_whole(tmp_path):
    bundle(tmp_path / "b")
    (tmp_path / "b" / "reports").mkdir()
    write(tmp_path / "b", force=True)
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["file", "manifest.json"]
    assert (tmp_path / "b" / "file").read_text() == "new"


def test_force_is_needed_for_whatever_exists(tmp_path):
    bundle(tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in names(tmp_path):
        with pytest.raises(InputError, match=f"{name} exists; pass --force to replace it, or another --out"):
            check_target(tmp_path / name, force=False)


def test_force_replaces_nothing_but_bundles_and_empty_folders(tmp_path):
    check_target(bundle(tmp_path / "bundle"), force=True)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("bundle")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("home", "file", "link", "dangling"):
        with pytest.raises(InputError, match=f"{name} exists and is not a bundle; --force replaces bundles only"):
            check_target(tmp_path / name, force=True)


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(InputError, match="b exists"), staged_folder(tmp_path / "b", force=False):
        bundle(tmp_path / "b", "somebody else's")
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b" / "file").read_text() == "somebody else's"


def test_a_failed_rename_puts_the_old_bundle_back(tmp_path, monkeypatch):
    bundle(tmp_path / "b")
    real = Path.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError("disk full")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "b", force=True)
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b" / "file").read_text() == "old"


def dead_pid():
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    return child.pid


@pytest.mark.parametrize("name", ["b", "a [1] *"])
def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_are_not(tmp_path, name):
    dead, target = dead_pid(), tmp_path / name
    for leftover in (
        f".{name}.partial-{dead}",
        f".{name}.partial-{os.getppid()}",
        f".{name}.partial-x",
        f".{name}2.partial-{dead}",
    ):
        bundle(tmp_path / leftover)
    write(target)
    assert names(tmp_path) == sorted(
        [name, f".{name}.partial-{os.getppid()}", f".{name}.partial-x", f".{name}2.partial-{dead}"]
    )


def killed(target, moment, old):
    """Runs in a child: kills itself at a moment of the replacement."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    real = Path.rename

    def rename(self, to):
        result = real(self, to)
        if moment == "old moved aside" and self.name == target.name:
            die()
        if moment == "new in place" and to.name == target.name:
            die()
        return result

    Path.rename = rename
    with staged_folder(target, force=old) as folder:
        (folder / "file").write_text("half")
        if moment == "writing":
            die()
        (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("moment", ["writing", "old moved aside", "new in place"])
def test_a_process_that_is_killed_leaves_a_whole_bundle_or_none_and_the_next_export_cleans_up(tmp_path, moment, old):
    if moment == "old moved aside" and not old:
        return  # nothing is moved
    target = tmp_path / "b"
    if old:
        bundle(target)
    child = multiprocessing.get_context("fork").Process(target=killed, args=(target, moment, old))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    if target.exists():
        assert (target / "file").read_text() == ("half" if moment == "new in place" else "old")
        assert (target / "manifest.json").exists()
    else:
        assert moment != "new in place"
    if moment == "old moved aside":  # the old bundle is not lost before the new one stands
        (aside,) = tmp_path.glob(".b.replaced-*")
        assert (aside / "file").read_text() == "old"
    write(target, force=target.exists())
    assert names(tmp_path) == ["b"]
    assert (target / "file").read_text() == "new"


def test_this_process_runs_and_a_dead_one_does_not():
    assert staging.process_runs(os.getpid())
    assert staging.process_runs(1)
    assert not staging.process_runs(dead_pid())
