"""Downloads, from a server on this machine that misbehaves in the ways servers do."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import small_lavis
import torch

from qpert.exporter.checkpoints.checkpoint import load_state
from qpert.exporter.checkpoints.download import download
from qpert.exporter.families.blip2 import checkpoint as checkpoint_module
from qpert.exporter.families.blip2.checkpoint import NamedCheckpoint, open_checkpoint
from qpert.runtime.errors import CheckpointError, UnavailableError

CONTENT = bytes(range(256)) * 4000  # 1 MB


@dataclass
class Script:
    """How the server behaves: one entry of `cuts` for each request, the bytes after which it hangs up (None: never)."""

    files: dict[str, bytes] = field(default_factory=lambda: {"/model.pth": CONTENT})
    cuts: list[int | None] = field(default_factory=list)
    ranges: bool = True
    etag: str | None = '"one"'
    status: list[int] = field(default_factory=list)
    claim: int = 0  # added to Content-Length
    length: bool = True
    requests: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        script: Script = self.server.script
        script.requests.append(self.headers.get("Range"))
        status = script.status.pop(0) if script.status else 200
        body = script.files.get(self.path)
        if status != 200 or body is None:
            return self.send_error(404 if status == 200 else status)
        start = self.start_of_range(script, len(body))
        if start > len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if script.length:
            self.send_header("Content-Length", str(len(body) - start + script.claim))
        if script.etag:
            self.send_header("ETag", script.etag)
        self.end_headers()
        cut = script.cuts.pop(0) if script.cuts else None
        self.wfile.write(body[start : len(body) if cut is None else start + cut])
        return None

    def start_of_range(self, script: Script, length: int) -> int:
        wanted = self.headers.get("Range")
        if not wanted or not script.ranges or self.headers.get("If-Range", script.etag) != script.etag:
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))


@pytest.fixture
def server() -> Iterator[Script]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.script = Script(url=f"http://127.0.0.1:{http.server_address[1]}/model.pth")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield http.script
        http.shutdown()
        thread.join()


def fetch(server: Script, target: Path, *, attempts: int = 3) -> list[tuple[str, int, int | None]]:
    heard: list[tuple[str, int, int | None]] = []
    download(server.url, target, progress=lambda *step: heard.append(step), attempts=attempts, pause=0.001, timeout=120)
    return heard


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_its_hash_beside_it(server: Script, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model.pth"
    heard = fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert (
        tmp_path / "cache" / "model.pth.sha256"
    ).read_text() == f"{hashlib.sha256(CONTENT).hexdigest()}  model.pth\n"
    assert left_in(target.parent) == ["model.pth", "model.pth.sha256"]
    assert ("downloading model.pth", len(CONTENT), len(CONTENT)) in heard


def test_a_connection_that_breaks_off_is_continued_where_it_broke(server: Script, tmp_path: Path) -> None:
    server.cuts = [300_000, 200_000]
    fetch(server, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=500000-"]


def test_breaks_that_each_brought_something_do_not_use_up_the_attempts(server: Script, tmp_path: Path) -> None:
    server.cuts = [100_000] * 8
    fetch(server, tmp_path / "model.pth", attempts=2)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_later_run_continues_what_an_earlier_one_left(server: Script, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 0, 0]
    with pytest.raises(UnavailableError, match=r"at 300,000 of 1,024,000 bytes, after 3 attempts"):
        fetch(server, tmp_path / "model.pth")
    assert left_in(tmp_path) == ["model.pth.part", "model.pth.part.json"]
    server.requests.clear()
    server.cuts.clear()
    fetch(server, tmp_path / "model.pth")
    assert server.requests == ["bytes=300000-"]
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_an_interrupt_leaves_what_arrived_and_nothing_that_opens(server: Script, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url, tmp_path / "model.pth", progress=interrupt)
    assert left_in(tmp_path) == ["model.pth.part", "model.pth.part.json"]
    fetch(server, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server: Script, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [300_000]
    fetch(server, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-"]


@pytest.mark.parametrize("etags", [('"one"', '"two"'), ('W/"one"', 'W/"two"'), (None, None)])
def test_a_file_that_changed_meanwhile_is_fetched_anew(
    server: Script, tmp_path: Path, etags: tuple[str | None, str | None]
) -> None:
    server.etag, server.cuts = etags[0], [300_000, 0]
    with pytest.raises(UnavailableError):
        fetch(server, tmp_path / "model.pth", attempts=2)
    other = b"another" * 100_000
    server.etag, server.files = etags[1], {"/model.pth": other}
    fetch(server, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == other


def test_a_part_longer_than_the_file_is_fetched_anew(server: Script, tmp_path: Path) -> None:
    server.etag, server.cuts = None, [300_000, 0]
    with pytest.raises(UnavailableError):
        fetch(server, tmp_path / "model.pth", attempts=2)
    server.files = {"/model.pth": b"short"}
    fetch(server, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == b"short"


def test_a_length_that_the_body_does_not_have_is_an_error(server: Script, tmp_path: Path) -> None:
    server.claim, server.ranges = 10, False
    with pytest.raises(UnavailableError, match=r"at 1,024,000 of 1,024,010 bytes, after 3 attempts"):
        fetch(server, tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


def test_a_server_that_does_not_tell_the_length_is_read_to_its_end(server: Script, tmp_path: Path) -> None:
    server.length = False
    fetch(server, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_server_that_is_busy_is_asked_again(server: Script, tmp_path: Path) -> None:
    server.status = [503, 429]
    fetch(server, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == CONTENT
    server.status = [500] * 3
    with pytest.raises(UnavailableError, match=r"the server answered 500 .*after 3 attempts"):
        fetch(server, tmp_path / "other.pth")


def test_a_file_that_is_not_there_is_not_asked_for_twice(server: Script, tmp_path: Path) -> None:
    server.files = {}
    with pytest.raises(UnavailableError) as caught:
        fetch(server, tmp_path / "model.pth")
    message = str(caught.value)
    assert "the server answered 404" in message
    assert server.url in message
    assert f"copy it to {tmp_path / 'model.pth'}" in message
    assert caught.value.code == "download-failed"
    assert caught.value.exit_code == 3
    assert len(server.requests) == 1


def test_no_network_is_one_clear_error(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/blip2.pth"  # the discard port: nobody listens
    with pytest.raises(UnavailableError, match=r"cannot download .*no connection \(.*refused.*blip2.pth"):
        download(url, tmp_path / "blip2.pth", progress=lambda *_: None, attempts=2, pause=0.001)


def test_a_folder_that_cannot_be_written_is_one_clear_error(server: Script, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnavailableError, match=r"cannot be written"):
        fetch(server, tmp_path / "file" / "model.pth")


# Names.


@pytest.fixture
def published(server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tiny`, a named checkpoint in two files on the server, and an empty cache folder."""
    state = small_lavis.random_state()
    vision = {n.removeprefix("visual_encoder."): t for n, t in state.items() if n.startswith("visual_encoder.")}
    more = {n.replace("blocks.2.", "blocks.3."): t for n, t in vision.items() if n.startswith("blocks.2.")}
    torch.save(vision | more, tmp_path / "vision.pth")
    small_lavis.save(tmp_path / "tiny.pth", {n: t for n, t in state.items() if not n.startswith("visual_encoder.")})
    server.files = {f"/{name}": (tmp_path / name).read_bytes() for name in ("tiny.pth", "vision.pth")}
    spec = NamedCheckpoint("tiny.pth", small_lavis.EVA, "vision.pth")
    monkeypatch.setattr(checkpoint_module, "NAMED", {"tiny": spec})
    monkeypatch.setattr(checkpoint_module, "LAVIS_URL", server.url.removesuffix("model.pth"))
    monkeypatch.setenv("QPERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


def test_a_named_checkpoint_is_downloaded_once_with_its_vision_file(server: Script, published: Path) -> None:
    for _ in range(2):
        with open_checkpoint("tiny") as checkpoint:
            got = load_state(checkpoint)
        expected = small_lavis.random_state()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert checkpoint.config.vision.layers == 3, "of the four in the file"
        assert checkpoint.notes == (), "heads and eps are known, not assumed"
        assert checkpoint.record.license == "BSD-3-Clause (LAVIS)"
        base = server.url.removesuffix("model.pth")
        assert checkpoint.record.source == f"{base}tiny.pth"
        assert checkpoint.record.parts == {"vision": f"{base}vision.pth"}
    assert len(server.requests) == 2
    assert left_in(published) == ["tiny.pth", "tiny.pth.sha256", "vision.pth", "vision.pth.sha256"]


def test_a_file_put_into_the_cache_by_hand_is_used(server: Script, published: Path) -> None:
    published.mkdir(parents=True)
    for path, content in server.files.items():
        (published / path.strip("/")).write_bytes(content)
    open_checkpoint("tiny").close()
    assert server.requests == []


def test_a_damaged_file_in_the_cache_says_what_to_delete(server: Script, published: Path) -> None:
    published.mkdir(parents=True)
    (published / "tiny.pth").write_bytes(server.files["/tiny.pth"][:5000])
    with pytest.raises(CheckpointError, match=r"Delete .*tiny.pth to download it again") as caught:
        open_checkpoint("tiny")
    assert caught.value.code == "checkpoint-truncated"


# Hugging Face ids.


def test_an_id_without_huggingface_hub_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnavailableError, match=r"Salesforce/blip2-itm-vit-g .*pip install 'qpert\[hf\]'") as caught:
        open_checkpoint("Salesforce/blip2-itm-vit-g")
    assert caught.value.exit_code == 3


def test_an_id_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(repository: str, **_: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network and nothing in the cache\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = (
        r"cannot be downloaded from huggingface.co \(no network and nothing in the cache\).*hf download some/model"
    )
    with pytest.raises(UnavailableError, match=message):
        open_checkpoint("some/model")


def test_an_id_that_does_not_exist_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def absent(repository: str, **_: object) -> str:
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(CheckpointError, match=r"some/model") as caught:
        open_checkpoint("some/model")
    assert caught.value.code == "hub-repository-not-found"


def test_an_id_is_opened_from_the_folder_that_huggingface_hub_gives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from stock_models import small_hf_folder

    folder, asked = small_hf_folder(tmp_path, "a"), []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(folder)
    )
    with open_checkpoint("some/model") as checkpoint:
        assert checkpoint.record.source == "https://huggingface.co/some/model"
        assert checkpoint.config.name == checkpoint.record.name == "some/model"
        assert checkpoint.tokenizer == folder / "tokenizer.json"
    patterns = asked[0][1]["allow_patterns"]
    assert asked[0][0] == "some/model"
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in patterns)
