"""The manifest is read strictly: what is not right is one error that says what."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpert.runtime.bundle.manifest import SCHEMA_VERSION, Manifest, read_manifest
from qpert.runtime.bundle.paths import bundle_path
from qpert.runtime.errors import BundleError

GRAPH_NAMES = ("vision", "image_query", "text", "itm")


@pytest.fixture(scope="module")
def values(tiny_bundle):
    return json.loads((tiny_bundle / "manifest.json").read_text())


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def write(folder, values):
    (folder / "manifest.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_a_manifest_survives_the_disk(folder, values):
    manifest = read_manifest(write(folder, values))
    assert json.loads(json.dumps(manifest.to_dict())) == values
    assert read_manifest(write(folder, manifest.to_json())) == manifest


def test_a_manifest_has_what_the_contract_promises(values):
    for key in ("schema_version", "checkpoint", "precision", "graphs", "files", "perturbation"):
        assert key in values
    assert values["schema_version"] == SCHEMA_VERSION
    settings = [
        "semantics",
        "alpha",
        "beta",
        "gamma",
        "threshold",
        "coverage",
        "reduction",
        "stages",
        "preserve_norm",
        "keep_stock",
        "centre_keys",
    ]
    assert sorted(values["perturbation"]) == sorted(settings)
    assert tuple(values["graphs"]) == (*GRAPH_NAMES, "preprocess", "boxes")
    assert set(values["checkpoint"]) >= {"name", "sha256", "license"}
    assert {"torch", "onnx", "onnxscript"} <= values["tools"].keys()


def test_a_newer_schema_is_refused_with_both_versions(folder, values):
    with pytest.raises(BundleError, match=r"schema version 3, this qpert reads up to 2; upgrade qpert"):
        read_manifest(write(folder, values | {"schema_version": 3}))


@pytest.mark.parametrize("version", [None, "1", 1.5, True, 0, -3])
def test_a_schema_version_that_never_was_is_refused(folder, values, version):
    with pytest.raises(BundleError, match=r"schema_version is .*, expected"):
        read_manifest(write(folder, values | {"schema_version": version}))


def test_a_newer_schema_is_refused_as_such_whatever_else_it_holds(folder):
    with pytest.raises(BundleError, match="schema version 7"):
        read_manifest(write(folder, {"schema_version": 7, "everything": "different"}))


def test_a_folder_without_a_manifest_is_refused(folder):
    with pytest.raises(BundleError, match=r"holds no manifest\.json; expected a folder that `qpert export` made"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "holds a list, expected an object"), ("[" * 100_000, "cannot be read")],
)
def test_what_is_no_json_object_is_refused(folder, text, message):
    with pytest.raises(BundleError, match=message):
        read_manifest(write(folder, text))


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["vision", "image_query", "text"])
def test_a_missing_required_role_is_named(folder, values, name):
    changed = copy.deepcopy(values)
    role = changed["graphs"].pop(name)["role"]
    with pytest.raises(BundleError, match=f"no graph of role {role}") as caught:
        read_manifest(write(folder, changed))
    assert caught.value.code == "bundle-roles"


def test_two_graphs_of_one_role_are_refused(folder, values):
    changed = copy.deepcopy(values)
    changed["graphs"]["again"] = changed["graphs"]["text"]
    with pytest.raises(BundleError, match="two graphs of role text_tower"):
        read_manifest(write(folder, changed))


def test_a_second_score_needs_a_pair_scorer_and_the_other_way_round(folder, values):
    changed = copy.deepcopy(values)
    del changed["graphs"]["itm"]
    with pytest.raises(BundleError) as caught:
        read_manifest(write(folder, changed))
    assert caught.value.code == "bundle-scores"
    changed["scores"] |= {"second": None, "final": "first"}
    assert read_manifest(write(folder, changed)).pair_scorer is None


def test_a_graph_without_a_slot_of_its_role_is_refused(folder, values):
    changed = copy.deepcopy(values)
    changed["graphs"]["text"]["inputs"][0]["slot"] = "pixels"
    with pytest.raises(BundleError, match=r"expected .*token_ids"):
        read_manifest(write(folder, changed))


def test_patches_that_are_not_the_image_tokens_are_refused(folder, values):
    with pytest.raises(BundleError) as caught:
        read_manifest(write(folder, values | {"prefix_tokens": 0}))
    assert caught.value.code == "bundle-patches"


def test_a_graph_of_a_role_that_nobody_knows_yet_is_kept(folder, values):
    changed = copy.deepcopy(values)
    changed["graphs"]["caption"] = changed["graphs"]["text"] | {"role": "language_head"}
    assert read_manifest(write(folder, changed)).graphs["caption"].role == "language_head"


def test_an_axis_without_a_range_is_named(folder, values):
    changed = copy.deepcopy(values)
    del changed["graphs"]["text"]["ranges"]["L"]
    with pytest.raises(BundleError, match="graph 'text' gives no range for the axes L"):
        read_manifest(write(folder, changed))


def test_a_file_that_is_used_and_not_hashed_is_refused(folder, values):
    changed = copy.deepcopy(values)
    del changed["files"]["onnx/itm.onnx"]
    with pytest.raises(BundleError, match=r"gives no hash for onnx/itm\.onnx"):
        read_manifest(write(folder, changed))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "onnx/../../x", "..", "", "a\\..\\..\\x", "C:/x", "C:x", "file:x", "x\0y", "x" * 9000],
)
def test_a_path_that_leaves_the_bundle_is_refused(folder, name):
    with pytest.raises(BundleError, match=r"outside the bundle .*; do not trust this bundle"):
        bundle_path(folder, name)


@pytest.mark.parametrize("name", ["a", "onnx/vision.onnx", "a..b", "reports/x.json", "./a"])
def test_a_path_inside_the_bundle_is_not(folder, name):
    assert bundle_path(folder, name) == folder / name


@pytest.mark.parametrize("where", ["files", "samples", "tokenizer", "graph"])
def test_every_path_of_the_manifest_is_checked(folder, values, where):
    changed = copy.deepcopy(values)
    bad = "../../etc/shadow"
    if where == "files":
        changed["files"][bad] = "0"
    elif where == "samples":
        changed["samples"] = bad
    elif where == "tokenizer":
        changed["tokenizer"]["file"] = bad
    else:
        changed["graphs"]["text"]["file"] = bad
    with pytest.raises(BundleError, match=r"'\.\./\.\./etc/shadow', which is outside the bundle"):
        read_manifest(write(folder, changed))


def test_a_link_that_leads_out_is_refused_and_one_that_stays_inside_is_not(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "file").write_text("y")
    (folder / "inside").symlink_to("file")
    assert bundle_path(folder, "inside").read_text() == "y"
    for name, target in (("out", "../secret"), ("absolute", tmp_path / "secret"), ("loop", "loop")):
        (folder / name).symlink_to(target)
        with pytest.raises(BundleError, match="outside the bundle"):
            bundle_path(folder, name)
    (folder / "parent").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="outside the bundle"):
        bundle_path(folder, "parent/secret")


def test_a_bundle_that_is_itself_reached_by_a_link_is_read(folder, values, tmp_path):
    (tmp_path / "real").mkdir()
    write(tmp_path / "real", values)
    (tmp_path / "link").symlink_to("real")
    assert read_manifest(tmp_path / "link") == read_manifest(tmp_path / "real")


def places(values, path=()):
    """Every place in nested JSON, except inside `files`, `tools` and `verification`, which are free-form."""
    yield path
    if path and path[-1] in ("files", "tools", "verification", "notes", "architecture"):
        return
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


JUNK = st.sampled_from([None, True, -1, 0, 3.5, "", "x", "float32", [], ["x"], {}, {"x": 1}, [[]], 10**30])


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_damaged_manifest_is_read_or_is_a_bundle_error_and_nothing_else(tmp_path, values, data):
    changed = copy.deepcopy(values)
    path = data.draw(st.sampled_from([place for place in places(values) if place]))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and data.draw(st.booleans()):
        del holder[path[-1]]
    else:
        holder[path[-1]] = data.draw(JUNK)
    try:
        manifest = read_manifest(write(tmp_path, changed))
    except BundleError:
        return
    assert isinstance(manifest, Manifest)
    assert manifest.token_grid.rows >= 1
    assert all(spec.ranges[axis].min >= 0 for spec in manifest.graphs.values() for axis in spec.ranges)
