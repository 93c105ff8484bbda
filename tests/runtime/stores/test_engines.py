"""Every engine does what `VectorStore` says, against NumPy and the oracle of filters."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from filter_oracle import CONDITIONS, METADATA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpert.runtime.errors import GalleryError, InputError, UnavailableError
from qpert.runtime.filters.parsing import parse
from qpert.runtime.gallery.spec import GallerySpec
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.stores.opening import open_store
from qpert.runtime.stores.protocol import StoredImage, StoreSpec, id_of

ENGINES = ("gallery", "postgresql", "qdrant-edge", "qdrant-local")
EXACT = ("gallery", "postgresql")
"""Keep vectors as float32."""
WIDTH, QUERIES = 16, 4
HALF = 2.0**-11
"""What float16 rounds a number by, as a share; of unit vectors the product is off by no more (Cauchy-Schwarz)."""
SIZES = (QUERIES, WIDTH, 4, 8, "float32", False)
SPEC = StoreSpec(GallerySpec("identity", "/bundle", "demo", Perturbation().to_dict(), "recomputed", *SIZES))


def image(number, random, metadata=None, sets=None):
    sets = sets or 1 + number % 3
    vectors = random.standard_normal((sets * QUERIES, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    boxes = json.dumps({"xyxy": [[1, 2, 3, 4]], "size": [5, 6]}) if number % 2 else None
    name = f"folder é/{number}.png"
    return StoredImage(
        name, f"/{name}", 10 + number, 2**60 + number, f"{number:064x}", boxes, metadata or {}, sets, vectors
    )


def facts(one):
    return json.dumps(one.facts(), sort_keys=True)


def expected(images, text, count):
    scores = {one.name: float((one.vectors @ text).max()) for one in images}
    return sorted(scores.items(), key=lambda item: (-item[1], id_of(item[0])))[:count]


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def store(engine, open_engine, tmp_path, request):
    name = "t" + f"{abs(hash(request.node.nodeid)) % 10**9}"
    with open_engine(engine, tmp_path, name) as opened:
        assert opened.spec() is None
        opened.create(SPEC)
        yield opened


def texts(random, count=5):
    found = random.standard_normal((count, WIDTH)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_searches_are_the_maximum_over_an_images_vectors_exactly(store, engine):
    random = np.random.default_rng(3)
    images = [image(number, random, {"even": number % 2 == 0}) for number in range(60)]
    store.upsert(images)
    assert store.count() == 60
    for text in texts(random):
        for where, among in ((None, images), (parse("even = true"), images[::2]), (parse("even = 1"), [])):
            found = store.search(text, 20, where)
            wanted = expected(among, text, 20)
            tolerance = 1e-6 if engine in EXACT else HALF  # float32 sums in another order
            np.testing.assert_allclose([one.score for one in found], [score for _, score in wanted], atol=tolerance)
            exact = dict(expected(among, text, 60))
            assert len({one.image.name for one in found}) == len(wanted)
            for one in found:
                assert abs(exact[one.image.name] - one.score) <= tolerance
            if engine in EXACT:
                assert [one.image.name for one in found] == [name for name, _ in wanted]


def test_images_come_back_as_they_were_put_in(store, engine):
    random = np.random.default_rng(4)
    images = [image(number, random, {"a": "x'\"", "n": 1.5, "i": 2**53, "b": False}) for number in range(7)]
    store.upsert(images)
    found = store.get([one.id for one in images] + [12345], vectors=True)
    assert set(found) == {one.id for one in images}
    for one in images:
        assert facts(found[one.id]) == facts(one)
        assert type(found[one.id].metadata["i"]) is int
        assert found[one.id].same_as(one)
        error = 0 if engine in EXACT else np.abs(one.vectors) * HALF + 2.0**-24  # of numbers near zero
        assert (np.abs(found[one.id].vectors - one.vectors) <= error).all() or engine == "qdrant-local"
    scanned = list(store.scan(vectors=True))
    assert [one.id for one in scanned] == sorted(one.id for one in images)
    assert [one.vectors.shape for one in scanned] == [found[one.id].vectors.shape for one in scanned]
    assert all(one.vectors is None for one in store.scan())


def test_upsert_replaces_relabel_keeps_vectors_and_delete_takes_out(store):
    random = np.random.default_rng(5)
    images = [image(number, random, {"album": "a"}) for number in range(6)]
    store.upsert(images)
    other = image(2, random, {"album": "b"}, sets=1)
    store.upsert([other])
    store.relabel([images[3].relabelled({"album": "c"})])
    assert store.count() == 6
    assert store.count(parse("album = 'a'")) == 4
    best = store.search(images[3].vectors[1], 1, parse("album = 'c'"))
    assert best[0].image.name == images[3].name
    assert best[0].score == pytest.approx(1.0, abs=2 * HALF)
    assert store.search(other.vectors[0], 1)[0].score == pytest.approx(1.0, abs=2 * HALF)
    assert store.get([other.id], vectors=True)[other.id].vectors.shape == (QUERIES, WIDTH)
    assert store.delete([images[0].name, "never there"]) == 1
    assert store.delete([images[0].name]) == 0
    assert store.count() == 5
    assert images[0].name not in {one.image.name for one in store.search(images[0].vectors[0], 10)}


def test_a_store_is_there_when_it_is_opened_again(engine, open_engine, tmp_path):
    random = np.random.default_rng(6)
    images = [image(number, random) for number in range(3)]
    with open_engine(engine, tmp_path, "again") as store:
        store.create(SPEC)
        store.upsert(images)
    with open_engine(engine, tmp_path, "again") as store:
        assert store.spec() == SPEC
        assert store.count() == 3
        store.create(StoreSpec(SPEC.gallery, "/features"))
        assert store.spec().features_in == "/features"
        assert {one.name for one in store.scan()} == {one.name for one in images}


def test_names_that_are_no_text_are_refused(store):
    wrong = image(1, np.random.default_rng(7))
    with pytest.raises(InputError) as found:
        store.upsert([StoredImage(**{**vars(wrong), "path": "/a\udcff.png"})])
    assert found.value.code == "store-name"
    assert store.count() == 0


@pytest.fixture(scope="module", params=ENGINES)
def labelled(request, open_engine, tmp_path_factory):
    """A store whose images' metadata change with each example."""
    with open_engine(request.param, tmp_path_factory.mktemp("labelled"), "labelled") as store:
        store.create(SPEC)
        random = np.random.default_rng(8)
        images = [image(number, random) for number in range(12)]
        store.upsert(images)
        yield store, images


@given(CONDITIONS, st.lists(METADATA, min_size=12, max_size=12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_filters_mean_the_same_in_every_engine(labelled, pair, rows):
    store, images = labelled
    text, oracle = pair
    condition = parse(text)
    store.relabel([one.relabelled(metadata) for one, metadata in zip(images, rows, strict=True)])
    wanted = {one.name for one, metadata in zip(images, rows, strict=True) if oracle(metadata)}
    assert store.count(condition) == len(wanted)
    assert {one.image.name for one in store.search(images[0].vectors[0], 12, condition)} == wanted


def test_what_another_program_has_made_is_left_alone(tmp_path, open_engine):
    from qpert.runtime.stores.address import parse_address
    from qpert.runtime.stores.qdrant_edge import EdgeStore

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GalleryError) as found:
        EdgeStore(parse_address(f"qdrant-edge:{tmp_path}"))
    assert found.value.code == "store-foreign"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_embedded_store_is_for_one_process(tmp_path, open_engine):
    with open_engine("qdrant-edge", tmp_path, "one") as store:
        store.create(SPEC)
        with pytest.raises(UnavailableError) as found:
            open_engine("qdrant-edge", tmp_path, "one")
        assert found.value.code == "store-unreachable"
    with open_engine("qdrant-edge", tmp_path, "one") as store:
        assert store.spec() == SPEC


WRITER = """
import sys
import numpy as np
from qpert.runtime.stores.opening import open_store
from qpert.runtime.stores.protocol import StoredImage, StoreSpec
with open_store(sys.argv[1]) as store:
    store.create(StoreSpec.from_json(sys.argv[2], "x"))
    for number in range(10_000):
        vectors = np.full((4, 16), 0.25, np.float32)
        store.upsert([StoredImage(f"{number}.png", "/x", 1, 1, "0", None, {"n": number}, 1, vectors)])
        print(number, flush=True)
"""


@pytest.mark.parametrize("kind", ["gallery", "postgresql", "qdrant-edge"])
def test_what_was_answered_survives_a_killed_writer(kind, request, tmp_path):
    server = request.getfixturevalue("postgres") if kind == "postgresql" else None
    folder = tmp_path / "killed"
    address = f"{server.url}?gallery=killed" if server else str(folder) if kind == "gallery" else f"{kind}:{folder}"
    command = [sys.executable, "-c", WRITER, address, SPEC.to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        said = [writer.stdout.readline() for _ in range(7)]
        writer.kill()
        said += writer.stdout.readlines()
    answered = [int(line) for line in said if line.endswith("\n")]
    assert len(answered) >= 7
    with open_store(address) as store:
        assert store.spec() == SPEC
        names = {one.name for one in store.scan()}
        assert {f"{number}.png" for number in answered} <= names
        assert len(names) <= len(answered) + 1, "one was under way"
        assert len(store.search(np.ones(16, np.float32), 100_000)) == len(names)


@pytest.mark.slow
def test_two_writers_of_the_same_images_wait_for_each_other(open_engine, tmp_path):
    random = np.random.default_rng(10)
    images = [image(number, random) for number in range(20)]
    with open_engine("postgresql", tmp_path, "two") as one, open_engine("postgresql", tmp_path, "two") as other:
        one.create(SPEC)
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(store.upsert, part) for _ in range(5)
                     for store, part in ((one, images), (other, images[::-1]))]  # fmt: skip
            for call in calls:
                call.result()
        found = one.get([each.id for each in images], vectors=True)
        assert {each.vectors.shape for each in found.values()} == {each.vectors.shape for each in images}
        assert all((found[each.id].vectors == each.vectors).all() for each in images)


def test_what_postgresql_answered_survives_its_crash(postgres, open_engine, tmp_path):
    random = np.random.default_rng(9)
    with open_engine("postgresql", tmp_path, "crash") as store:
        store.create(SPEC)
        for number in range(5):
            store.upsert([image(number, random)])
        postgres.stop()
        with pytest.raises(UnavailableError) as found:
            store.count()
        assert found.value.code == "store-unreachable"
        postgres.start()
        assert store.count() == 5
