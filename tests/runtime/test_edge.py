"""Every command against a machine that refuses: full disks, folders that may not be read or written, broken streams.

Each runs as a process of its own, with exit code 3, one line of error and nothing half-written; never a traceback. A
full disk is a small tmpfs, a read-only folder a bind mount: both need root, and the tests are skipped elsewhere. Root
may do everything whatever a file's mode is, so those tests give that right up (`setpriv`).
"""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qpert.runtime import Retriever
from qpert.runtime.cli import edge, run
from qpert.runtime.cli.edge import BROKEN_PIPE, MACHINE, errno_of, machine_error
from qpert.runtime.errors import InputError
from qpert.runtime.files import local_path, portable_name, write_atomically
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX streams, modes and mounts")

PATIENCE = 600
QPERT = [sys.executable, "-m", "qpert.runtime.cli"]
TEXT_LOCALE = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line, *arguments, variables=TEXT_LOCALE):
    """Run a line of bash in which "$@" is `qpert ARGUMENTS`; returns (exit code, stdout, stderr) of it, as bytes."""
    command = ["bash", "-o", "pipefail", "-c", line, "bash", *QPERT, *map(os.fspath, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | variables, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def the_error(stderr):
    """The last line of stderr, which has to be the only error."""
    lines = stderr.decode(errors="replace").splitlines()
    assert "Traceback" not in stderr.decode(errors="replace"), stderr.decode(errors="replace")
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    return lines[-1]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, tiny_bundle, random_pictures):
    folder = tmp_path_factory.mktemp("gallery")
    entries = []
    for number, picture in enumerate(random_pictures(3)):
        Image.fromarray(picture).save(folder / f"{number}.png")
        entries.append(ImageEntry(f"{number}.png", folder / f"{number}.png"))
    with Retriever.open(tiny_bundle) as retriever:
        index_images(folder / "gallery", retriever.encoder, entries)
    return folder / "gallery"


# Streams


@pytest.fixture(params=["doctor", "inspect", "inspect --json", "search --json", "search", "--help", "export --help"])
def talking(request, tiny_bundle, gallery):
    """A command that prints something."""
    return {
        "doctor": ["doctor"],
        "inspect": ["inspect", tiny_bundle],
        "inspect --json": ["inspect", tiny_bundle, "--json"],
        "search": ["search", gallery, "a dog", "-k", "2"],
        "search --json": ["search", gallery, "a dog", "--json"],
        "--help": ["--help"],
        "export --help": ["export", "--help"],
    }[request.param]


def test_results_that_cannot_be_written_are_exit_3_and_one_line(talking):
    code, _, stderr = shell('"$@" > /dev/full', *talking)
    assert code == 3
    assert "the results cannot be written to standard output (No space left on device)" in the_error(stderr)
    assert stderr.count(b"\n") == 1


def test_a_reader_that_has_gone_ends_the_command_without_a_word(talking):
    code, _, stderr = shell('"$@" | true', *talking)
    assert (code, stderr) in ((BROKEN_PIPE, b""), (0, b"")), "0 where the line was in the pipe before its reader ended"


def test_the_first_line_can_be_taken_by_head(talking):
    code, stdout, stderr = shell('"$@" | head -n 1', *talking)
    assert code in (0, BROKEN_PIPE)
    assert (stdout.count(b"\n"), stderr) == (1, b"")


def test_a_closed_standard_output_is_refused_before_anything_is_done(talking):
    code, _, stderr = shell('"$@" >&-', *talking)
    assert code == 3
    assert "standard output is closed" in the_error(stderr)


def test_a_closed_or_full_standard_error_changes_no_result(talking):
    expected = shell('"$@"', *talking)
    assert expected[0] == 0
    for line in ('"$@" 2>&-', '"$@" 2> /dev/full', '"$@" 2>&- <&-'):
        code, stdout, stderr = shell(line, *talking)
        assert (code, len(stdout), stderr) == (0, len(expected[1]), b"")


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1"])
def test_a_terminal_that_lacks_characters_gets_them_escaped(talking, encoding):
    code, stdout, stderr = shell('"$@"', *talking, variables={"PYTHONIOENCODING": encoding})
    assert (code, stderr) == (0, b"")
    assert stdout


def test_the_c_locale_prints_everything(talking):
    code, stdout, stderr = shell('"$@"', *talking, variables=C_LOCALE)
    assert (code, stderr) == (0, b"")
    assert stdout


# File names


def test_bytes_that_are_no_text_are_named_so_that_they_can_be_stored():
    assert portable_name(os.fsdecode(b"b\xff.jpg")) == "b\\xff.jpg"
    assert portable_name("z\xe4.jpg") == "z\xe4.jpg"
    assert portable_name("z\udcc3\udca4.jpg") == "z\xe4.jpg", "what LC_ALL=C makes of it"
    assert os.fsencode(local_path("z\udcc3\udca4.jpg")) == "z\xe4.jpg".encode()
    with pytest.raises(InputError) as caught:
        portable_name("\ud800")
    assert caught.value.code == "file-name"


def test_json_with_such_a_name_is_read_back_as_it_was(tmp_path):
    write_atomically(tmp_path / "a.json", json.dumps({"path": "b\udcff"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": "b\udcff"}


@pytest.fixture
def odd_names(tmp_path, random_pictures):
    """Pictures called a, zäß and a byte that is no UTF-8."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, picture in zip((b"a.png", "z\xe4\xdf.png".encode(), b"b\xff.png"), random_pictures(3), strict=True):
        Image.fromarray(picture).save(folder / "picture.png")
        (folder / "picture.png").rename(folder / os.fsdecode(name))
    return folder


@pytest.mark.parametrize("first", [TEXT_LOCALE, C_LOCALE], ids=["UTF-8 first", "C first"])
@pytest.mark.parametrize("features", ["stored", "recomputed"])
def test_names_of_any_bytes_are_indexed_and_found_in_either_locale(tiny_bundle, odd_names, tmp_path, first, features):
    out, second = tmp_path / "g", C_LOCALE if first is TEXT_LOCALE else TEXT_LOCALE
    indexing = ["index", tiny_bundle, odd_names, "--out", out, "--features", features, "--json"]
    code, stdout, stderr = shell('"$@"', *indexing, variables=first)
    assert code == 0, stderr
    assert json.loads(stdout)["added"] == 3
    code, stdout, stderr = shell('"$@"', *indexing, variables=second)
    assert code == 0, stderr
    assert json.loads(stdout)["unchanged"] == 3
    for locale in (first, second):
        code, stdout, stderr = shell('"$@"', "search", out, "a café", "--json", variables=locale)
        assert code == 0, stderr
        found = json.loads(stdout)
        assert found["query"] == "a caf\xe9"
        assert sorted(hit["image"] for hit in found["hits"]) == ["a.png", "b\\xff.png", "z\xe4\xdf.png"]


def test_a_list_in_utf8_is_read_in_the_c_locale(tiny_bundle, odd_names, tmp_path):
    (odd_names / "list.txt").write_text("zäß.png\na.png\n", encoding="utf-8")
    indexing = ["index", tiny_bundle, odd_names / "list.txt", "--out", tmp_path / "g", "--json"]
    code, stdout, stderr = shell('"$@"', *indexing, variables=C_LOCALE)
    assert code == 0, stderr
    assert json.loads(stdout)["added"] == 2


# Disks


def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
    return folder


def unmount(folder):
    subprocess.run(["umount", str(folder)], check=False)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 kB."""
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("a small disk is mounted by root")
    folder = mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=128k", "tmpfs")
    yield folder
    unmount(folder)


@pytest.fixture
def read_only(tmp_path, tiny_bundle, gallery):
    """A read-only folder with a bundle and a gallery in it."""
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("a read-only folder is mounted by root")
    shutil.copytree(tiny_bundle, tmp_path / "source" / "bundle")
    shutil.copytree(gallery, tmp_path / "source" / "gallery")
    folder = mounted(tmp_path / "read-only", "--bind", str(tmp_path / "source"))
    done = subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=False)
    if done.returncode:
        unmount(folder)
        pytest.skip("this system does not mount read-only")
    yield folder
    unmount(folder)


def writing(name, bundle, folder, pictures, tiny_weights):
    """A command that writes into `folder`."""
    vocabulary = Path(__file__).parents[2] / "exporter" / "demo" / "vocab.txt"
    tiny = ["--tokenizer", vocabulary, "--max-length", "12", "--vision-heads", "2", "--qformer-heads", "2"]
    demo = ["--dataset", "demo", "--limit", "20"]
    search = ["--alphas", "2", "--weights", "constant", "--thresholds", "0.95", "--score", "r1", "--regardless"]
    return {
        "export": ["export", "blip2", "--checkpoint", tiny_weights, *tiny, "--out", folder / "x"],
        "index": ["index", bundle, pictures, "--out", folder / "x"],
        "eval": ["eval", bundle, *demo, "--work", folder / "x"],
        "calibrate": ["calibrate", bundle, *demo, *search, "--out", folder / "x"],
        "quantize": ["quantize", bundle, *demo, "--samples", "16", "--precision", "int8", "--out", folder / "x"],
    }[name]


@pytest.mark.parametrize("name", ["export", "index", "eval", "calibrate", "quantize"])
def test_a_full_disk_is_exit_3_and_leaves_no_part_of_a_result(
    small_disk, demo_bundle, tiny_bundle, gallery, tiny_weights, name
):
    bundle = demo_bundle if name in ("eval", "calibrate", "quantize") else tiny_bundle  # scenes have more boxes than 4
    arguments = writing(name, bundle, small_disk, gallery.parent, tiny_weights)
    (small_disk / "fill").write_bytes(bytes(116 << 10))
    code, _, stderr = shell('"$@"', *arguments)
    assert code == 3, stderr.decode()
    assert the_error(stderr)
    kept = {"index": "x", "eval": "x", "calibrate": None}.get(name)  # folders that the same command goes on from
    assert {path.name for path in small_disk.iterdir()} <= {"fill", kept}


@pytest.mark.parametrize("name", ["export", "index", "eval", "calibrate", "quantize"])
def test_a_read_only_folder_is_exit_3(read_only, demo_bundle, tiny_bundle, gallery, tiny_weights, name):
    bundle = demo_bundle if name in ("eval", "calibrate") else tiny_bundle
    code, _, stderr = shell('"$@"', *writing(name, bundle, read_only, gallery.parent, tiny_weights))
    assert code == 3, stderr.decode()
    assert "Read-only file system" in the_error(stderr) or "readonly database" in the_error(stderr)


def test_a_bundle_and_a_gallery_in_a_read_only_folder_are_used(read_only):
    for arguments in (
        ["search", read_only / "gallery", "a dog"],
        ["inspect", read_only / "bundle"],
        ["verify", read_only / "bundle"],
        ["bench", read_only / "bundle", "--stage", "text", "--batch", "1", "--repeats", "3"],
    ):
        code, _, stderr = shell('"$@"', *arguments)
        assert code == 0, stderr.decode()


def test_a_change_of_a_gallery_in_a_read_only_folder_is_exit_3(read_only, tiny_bundle):
    code, _, stderr = shell('"$@"', "index", tiny_bundle, "--delete", "0.png", "--out", read_only / "gallery")
    assert code == 3
    assert "cannot be written" in the_error(stderr)


# Rights


def without_rights(*arguments):
    """Run a command that may do with a file what the file's mode says, as everybody but root may."""
    if os.geteuid():
        return shell('"$@"', *arguments)
    if shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv to give that up")
    return shell('setpriv --bounding-set=-dac_override,-dac_read_search,-fowner "$@"', *arguments)


@pytest.mark.parametrize(
    ("closed", "command"),
    [
        ("bundle", "inspect"),
        ("bundle", "eval"),
        ("bundle", "bench"),
        ("bundle/manifest.json", "inspect"),
        ("bundle/onnx/text.onnx", "inspect"),
        ("bundle/onnx/text.onnx", "verify"),
        ("gallery", "search"),
        ("gallery/gallery.sqlite", "search"),
        ("gallery/query_embeds.1", "search"),
        ("gallery/features/001-000001.safetensors", "search"),
        ("gallery/gallery.sqlite", "index"),
        ("list.txt", "index"),
    ],
)
def test_what_may_not_be_read_is_exit_3(tmp_path, tiny_bundle, gallery, closed, command):
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    shutil.copytree(gallery, tmp_path / "gallery")
    (tmp_path / "list.txt").write_text(f"{gallery.parent}/0.png\n")
    bundle, place = tmp_path / "bundle", tmp_path / closed
    arguments = {
        "inspect": ["inspect", bundle],
        "eval": ["eval", bundle, "--dataset", "demo", "--limit", "2"],
        "bench": ["bench", bundle],
        "verify": ["verify", bundle],
        "search": ["search", tmp_path / "gallery", "a dog", "--bundle", tiny_bundle],
        "index": ["index", tiny_bundle, tmp_path / "list.txt", "--out", tmp_path / "gallery"],
    }[command]
    mode = place.stat().st_mode
    place.chmod(0)
    try:
        code, stdout, stderr = without_rights(*arguments)
    finally:
        place.chmod(mode)
    assert (code, stdout) == (3, b""), stderr.decode()
    assert "error: " in the_error(stderr)


def test_the_gallery_of_another_user_is_searched_and_not_written(tmp_path, tiny_bundle, gallery):
    copied = shutil.copytree(gallery, tmp_path / "gallery")
    places = [copied, *copied.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        found, _, said = without_rights("search", copied, "a dog")
        code, _, stderr = without_rights("index", tiny_bundle, "--delete", "0.png", "--out", copied)
    finally:
        for place in places:
            place.chmod(0o755)
    assert found == 0, said
    assert code == 3
    assert "cannot be written" in the_error(stderr)


# Which errors are the machine's


@pytest.mark.parametrize("number", list(MACHINE))
def test_every_error_of_the_table_is_exit_3_and_names_its_file(monkeypatch, capsys, number):
    def failing(*_, **__):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("qpert.runtime.cli.doctor.examine", failing)
    assert run(["doctor"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: /some/file: {os.strerror(number)}; {MACHINE[number]}\n"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EBADF, errno.EINVAL, errno.ENOTDIR, errno.EISDIR])
def test_an_error_that_is_a_bug_keeps_its_traceback(monkeypatch, number):
    def failing(*_, **__):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("qpert.runtime.cli.doctor.examine", failing)
    with pytest.raises(OSError) as caught:
        run(["doctor"])
    assert caught.value.errno == number


def test_a_pipe_to_another_process_that_breaks_is_a_bug_and_not_a_failed_gate(monkeypatch):
    def failing(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("qpert.runtime.cli.doctor.examine", failing)
    with pytest.raises(RuntimeError, match="a pipe to another process broke"):
        run(["doctor"])


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (sqlite3.OperationalError("database or disk is full"), errno.ENOSPC),
        (sqlite3.OperationalError("disk I/O error"), errno.EIO),
        (sqlite3.OperationalError("no such table: image"), 0),
        (OSError("262144 requested and 4096 written"), errno.ENOSPC),
        (ValueError("No space left on device"), 0),
    ],
)
def test_the_same_errors_in_other_words_are_recognised(error, number):
    assert errno_of(error) == number
    assert (machine_error(error) is None) == (number == 0)


def test_a_stream_is_written_to_no_more_once_it_has_failed():
    with open("/dev/full", "wb") as full:  # noqa: PTH123, its descriptor is what is needed
        progress = edge.Output(full.fileno(), results=False)
        assert progress.write(b"lost") == 4
        assert progress.is_broken


@pytest.mark.parametrize("variables", [TEXT_LOCALE, C_LOCALE], ids=["UTF-8", "C"])
def test_box_files_match_names_that_are_not_ascii_in_any_locale(tiny_bundle, random_pictures, tmp_path, variables):
    (picture,) = random_pictures(1)
    height, width, _ = picture.shape
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(picture).save(folder / "café.png")
    boxes = tmp_path / "boxes.jsonl"
    row = {"image": "café.png", "x1": 1, "y1": 1, "x2": width - 1, "y2": height - 1}
    boxes.write_text(json.dumps(row) + "\n", encoding="utf-8")
    out = tmp_path / "gallery"
    code, _, stderr = shell(
        '"$@"', "index", tiny_bundle, folder, "--boxes", boxes, "--out", out, "--json", variables=variables
    )
    assert code == 0, stderr
    with sqlite3.connect(out / "gallery.sqlite") as catalogue:
        ((name, stored),) = catalogue.execute("select name, boxes from image").fetchall()
    assert name == "café.png"
    assert json.loads(stored)["xyxy"] == [[1, 1, width - 1, height - 1]]
