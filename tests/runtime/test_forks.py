"""What is open when a process forks, is pickled or is copied: it works there, or says what to do. It never hangs.

Each case runs in a process of its own, which forks; the child ends by itself (`sys.exit`, with all destructors) or is
killed by its alarm clock, which the parent reports as signal 14.
"""

import copy
import json
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from qpert.runtime import Boxes, Gallery, Retriever, StoredGallery, TextGallery
from qpert.runtime.errors import BundleError, GalleryError, InputError, QpertError, UnavailableError
from qpert.runtime.gallery.entries import ImageEntry
from qpert.runtime.gallery.indexing import index_images
from qpert.runtime.gallery.writer import open_writer
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.sessions.device import Device, DeviceArray, DeviceMemory
from qpert.runtime.sessions.graph_files import GraphSource
from qpert.runtime.sessions.onnx import CudaSession
from qpert.runtime.sqlite import Connection

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

PATIENCE = 300
"""Seconds after which a child counts as hanging; it needs one or two, on a machine without load."""

FORK = """
import json, os, signal, sys
import numpy as np
from qpert.runtime import Retriever, StoredGallery
from qpert.runtime.errors import QpertError
bundle, gallery, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
retriever = Retriever.open(bundle, threads=threads)
picture = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
texts = ["a dog", "two cats on a sofa", "a cup of coffee"]
before = retriever.encode_texts(texts)
features = retriever.encode_images([picture])
{parent}
read, write = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm({patience})
    answer = None
    {child}
    os.write(write, json.dumps(answer).encode())
    sys.exit(0)
os.close(write)
answer = os.fdopen(read).read()
_, status = os.waitpid(child, 0)
after = retriever.encode_texts(texts)
print(json.dumps({{
    "signal": status & 127, "exit": status >> 8, "answer": json.loads(answer) if answer else "nothing",
    "parent": bool((after == before).all()),
}}))
"""


def forked(bundle, child, *, threads=2, parent="pass", gallery=""):
    """Run `child` in a forked process; returns its `answer`, after a look at how both processes ended."""
    program = FORK.format(parent=parent, child=child, patience=PATIENCE)
    command = [sys.executable, "-c", program, str(bundle), str(gallery), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * PATIENCE)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["signal"], result["exit"]) == (0, 0), f"the child ended with {result}: {done.stderr}"
    assert result["parent"], "the parent computes what it computed before"
    return result["answer"]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_forked_child_encodes_matches_and_closes(tiny_bundle, threads):
    child = (
        "answer = [bool((retriever.encode_texts(texts) == before).all()), "
        "retriever.encode_images([picture] * 3).query_embeds.shape[0], "
        "list(retriever.itm_scores(features, texts).shape)]; retriever.close()"
    )
    assert forked(tiny_bundle, child, threads=threads) == [True, 3, [1, 3]]


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("child", ["retriever.close()", "pass", "del retriever; import gc; gc.collect()"])
def test_a_child_that_closes_forgets_or_leaves_alone_what_it_inherited_ends(tiny_bundle, child, threads):
    assert forked(tiny_bundle, child, threads=threads) is None


def test_the_scan_in_8_bits_works_in_a_child(tiny_bundle):
    scan = (
        "from qpert.runtime.gallery import products; codes = np.arange(64, dtype=np.uint8).reshape(4, 2, 8); "
        "dots = lambda: products.best_products(codes, np.ones((8, 5), np.int8)).tolist()"
    )
    exact = (np.arange(64).reshape(4, 2, 8) - 128).sum(axis=2).max(axis=1).tolist()
    assert forked(tiny_bundle, "answer = dots()", parent=f"{scan}; dots()") == [exact] * 5


def test_a_gallery_that_was_opened_before_the_fork_is_searched_in_the_child(tiny_bundle, gallery):
    parent = "opened = retriever.open_gallery(gallery)"
    child = "answer = [hit.image for hit in retriever.search('a dog', opened, k=9)]; opened.close()"
    assert sorted(forked(tiny_bundle, child, parent=parent, gallery=gallery)) == ["0", "1", "2"]


def test_a_bundle_that_was_replaced_after_the_fork_is_not_mixed_with_the_old_one(export_again, tmp_path):
    folder = export_again(tmp_path / "bundle")
    child = """
    for path in __import__('pathlib').Path(bundle, 'onnx').iterdir():
        os.utime(path, ns=(1, 1))
    try:
        retriever.encode_texts(texts)
    except QpertError as error:
        answer = error.code
    """
    assert forked(folder, child) == "bundle-replaced"


WRITING = """
from pathlib import Path
from qpert.runtime.gallery.writer import open_writer
writing = open_writer(Path(gallery))
writer = writing.__enter__()
connection = writer.catalogue.connection
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE image SET live = 0 WHERE name = '1'")
"""


def test_a_child_neither_uses_nor_undoes_a_transaction_of_its_parent(tiny_bundle, gallery):
    child = """
    try:
        writer.delete(['0'])
    except QpertError as error:
        answer = error.code
    writing.__exit__(None, None, None)
    """
    before = "\n".join((WRITING, "import atexit; atexit.register(lambda: connection.execute('COMMIT'))"))
    # The parent commits at its end, long after the child has ended with every destructor.
    after = before.replace("lambda: connection", "lambda: os.getpid() == parent and connection")
    assert forked(tiny_bundle, child, parent=f"parent = os.getpid()\n{after}", gallery=gallery) == "forked-database"
    with Retriever.open(tiny_bundle) as plain, plain.open_gallery(gallery) as opened:
        assert opened.images == ("0", "2")


def test_a_connection_of_the_parent_is_refused_in_the_child_and_left_open(tmp_path):
    connection = sqlite3.connect(tmp_path / "a.sqlite", factory=Connection)
    connection.execute("CREATE TABLE t (n)")
    connection._process += 1  # as a child sees it
    for call in (lambda: connection.execute("SELECT 1"), lambda: connection.executemany("SELECT ?", [(1,)])):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == "forked-database"
    assert not connection.in_transaction
    connection.close()
    connection._process -= 1
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)
    connection.close()


# Pickling and copying


@pytest.fixture(scope="module")
def retriever(tiny_bundle):
    with Retriever.open(tiny_bundle, threads=2, perturbation=tuned(tiny_bundle)) as opened:
        yield opened


def tuned(bundle):
    exported = Retriever.open(bundle).encoder.perturbation.to_dict()
    return Perturbation.from_dict(exported | {"alpha": 3.0})


@pytest.fixture
def gallery(tmp_path, retriever, tiny_bundle, random_pictures):
    from PIL import Image

    entries = []
    for number, picture in enumerate(random_pictures(3)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        entries.append(ImageEntry(str(number), tmp_path / f"{number}.png"))
    with Retriever.open(tiny_bundle) as plain:
        index_images(tmp_path / "gallery", plain.encoder, entries)
    return tmp_path / "gallery"


COPIES = [pytest.param(lambda it: pickle.loads(pickle.dumps(it)), id="pickle"), copy.deepcopy, copy.copy]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_retriever_has_the_same_bundle_provider_settings_and_threads(retriever, copied, random_pictures):
    again = copied(retriever)
    try:
        kept = [
            (one.encoder.provider, one.encoder.threads, one.encoder.perturbation.alpha) for one in (retriever, again)
        ]
        assert kept == [("cpu", 2, 3.0)] * 2
        (picture,) = random_pictures(1)
        boxes = [Boxes([[1, 2, 30, 33]], (60, 40))]
        one, other = (each.encode_images([picture], boxes) for each in (retriever, again))
        assert (one.query_embeds == other.query_embeds).all()
        assert retriever.itm_scores(one, ["a dog"]) == again.itm_scores(other, ["a dog"])
    finally:
        if copied is not copy.copy:  # which shares its encoder
            again.close()


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_session_runs_and_outlives_the_first(tiny_bundle, copied):
    encoder = Retriever.open(tiny_bundle).encoder
    session, inputs = (
        encoder.sessions["text"],
        {"input_ids": np.array([[2, 7, 3]]), "attention_mask": np.ones((1, 3), int)},
    )
    again = copied(session)
    expected = session.run(inputs)["text_embeds"]
    encoder.close()
    assert (again.run(inputs)["text_embeds"] == expected).all()
    with pytest.raises(InputError) as caught:
        pickle.dumps(session)
    assert caught.value.code == "session-closed"


def test_a_retriever_by_a_relative_path_is_found_from_another_folder(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_bundle.parent)
    with Retriever.open(tiny_bundle.name) as opened:
        monkeypatch.chdir(tmp_path)
        with pickle.loads(pickle.dumps(opened)) as again:
            assert again.encode_texts(["a dog"]).shape[0] == 1


def test_a_closed_retriever_cannot_be_copied(tiny_bundle):
    opened = Retriever.open(tiny_bundle)
    opened.close()
    with pytest.raises(InputError) as caught:
        copy.deepcopy(opened)
    assert caught.value.code == "encoder-closed"


def test_a_pickled_retriever_refuses_another_bundle_in_the_place_of_its_own(export_again, tmp_path):
    folder = export_again(tmp_path / "bundle")
    with Retriever.open(folder) as opened:
        stored = pickle.dumps(opened)
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["samples.safetensors"]
        manifest["samples"] = "tokenizer.json"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError) as caught:
            pickle.loads(stored)
    assert caught.value.code == "bundle-replaced"


def test_a_spawned_pool_takes_a_method_of_a_retriever(tiny_bundle):
    with (
        Retriever.open(tiny_bundle) as opened,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        found = pool.submit(opened.encode_texts, ["a dog", "a cat"]).result(timeout=PATIENCE)
        assert (found == opened.encode_texts(["a dog", "a cat"])).all()


def test_galleries_in_memory_are_pickled_with_their_features(retriever, random_pictures):
    features = retriever.encode_images(random_pictures(2), [None, Boxes([[1, 2, 30, 33]], (58, 43))])
    again = pickle.loads(pickle.dumps(Gallery(("a", "b"), features)))
    assert retriever.search("a dog", again) == retriever.search("a dog", Gallery(("a", "b"), features))
    texts = retriever.text_gallery(["a dog", "a cat"])
    copied = pickle.loads(pickle.dumps(texts))
    assert isinstance(copied, TextGallery)
    assert (copied.texts, copied.embeds.tobytes()) == (texts.texts, texts.embeds.tobytes())


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_stored_gallery_shows_the_moment_at_which_it_was_opened(tiny_bundle, gallery, tmp_path, copied):
    with Retriever.open(tiny_bundle) as plain, plain.open_gallery(gallery) as opened:
        before = opened.query_embeds.copy()
        with open_writer(gallery) as writer:
            writer.delete(["1"])
        again = copied(opened)
        assert isinstance(again, StoredGallery)
        assert again.images == ("0", "1", "2")
        assert again.query_embeds.tobytes() == before.tobytes()
        assert again.features_of([2, 0]).image_embeds.tobytes() == opened.features_of([2, 0]).image_embeds.tobytes()


@pytest.mark.parametrize("use", ["features", "closed", "pickled"])
def test_a_gallery_that_another_process_compacts_says_so(tiny_bundle, gallery, use):
    with Retriever.open(tiny_bundle) as plain, plain.open_gallery(gallery) as opened:
        stored = pickle.dumps(opened)
        with open_writer(gallery) as writer:
            writer.delete(["1"])
            writer.compact()
        if use == "closed":
            opened.close()
        text = plain.encode_texts(["a dog"])
        act = {
            "features": lambda: opened.features_of([0]),
            "closed": lambda: opened.nearest(text, 3),
            "pickled": lambda: pickle.loads(stored),
        }[use]
        with pytest.raises(GalleryError) as caught:
            act()
        assert caught.value.code == "gallery-compacted"
        assert "nothing is damaged" in str(caught.value)
        with plain.open_gallery(gallery) as again:
            assert again.images == ("0", "2")


def test_a_shard_that_is_gone_without_a_compaction_is_still_damage(tiny_bundle, gallery):
    with Retriever.open(tiny_bundle) as plain, plain.open_gallery(gallery) as opened:
        for path in (gallery / "features").iterdir():
            path.unlink()
        with pytest.raises(GalleryError) as caught:
            opened.features_of([0])
    assert caught.value.code == "gallery-shard-missing"


# On a GPU, as far as it goes without one: CUDA is a stand-in that counts the calls


class CountingCuda:
    """Answers every call of CUDA's runtime with success, and writes it down."""

    def __init__(self):
        self.calls = []
        self.cudaStreamNonBlocking = 0
        self.cudaError_t = SimpleNamespace(cudaSuccess=0)

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return (0, 4096)

        return call


def in_child(act):
    """What `act` returns in a forked child of this very process, which ends without destructors."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        try:
            answer = act()
        except QpertError as error:
            answer = error.code
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        answer = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(answer)


def test_a_device_makes_no_call_of_cuda_in_a_child_even_with_a_lock_that_a_thread_held():
    cuda = CountingCuda()
    device = Device(cuda)
    device.join()
    memory = DeviceMemory(device, 16)
    held, done = threading.Event(), threading.Event()

    def hold():
        with device.lock:
            held.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(PATIENCE)
    cuda.calls.clear()

    def act():
        device.leave()
        memory.close()
        return cuda.calls

    try:
        assert in_child(act) == []
        assert in_child(lambda: device.call("cudaMalloc", 1)) == "forked-gpu"
    finally:
        done.set()
        thread.join()
    memory.close()
    device.leave()
    assert cuda.calls == ["cudaFree", "cudaStreamDestroy"], "the parent gives back what the child did not"


def test_an_array_in_gpu_memory_is_pickled_as_its_copy_and_refused_in_a_child():
    array = DeviceArray((2,), np.dtype(np.float32), 4096, lambda: np.array([1, 2], np.float32), None)
    assert pickle.loads(pickle.dumps(array)).tolist() == [1, 2]
    assert in_child(lambda: array.numpy().tolist()) == "forked-gpu"


def test_a_session_of_the_cuda_provider_is_refused_in_a_child(tiny_bundle):
    encoder = Retriever.open(tiny_bundle).encoder
    spec = encoder.manifest.graphs["text"]
    source = GraphSource.of(encoder.bundle.graph_path(spec), "cuda", 0)
    session = CudaSession(spec, encoder.sessions["text"]._session, source)
    inputs = {"input_ids": np.array([[2, 7, 3]]), "attention_mask": np.ones((1, 3), np.int64)}
    assert in_child(lambda: session.run(inputs)) == "forked-gpu"
    with pytest.raises(UnavailableError):
        copy.deepcopy(session)  # opens it again with the same provider, which this machine may lack
