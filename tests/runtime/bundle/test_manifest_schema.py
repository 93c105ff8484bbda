"""The published JSON Schema of the manifest, held against the reader by a validator that the reader does not use."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from qpert.runtime.bundle.manifest import Manifest, manifest_values, read_manifest
from qpert.runtime.bundle.schema import DETECTOR_MANIFEST, MANIFEST, check_against, read_schema
from qpert.runtime.bundle.upgrade import upgrade_schema_1
from qpert.runtime.errors import BundleError

ROOT = Path(__file__).parents[3]
SCHEMA_1 = ROOT / "tests" / "fixtures" / "schema1" / "bundle"
BEYOND = {
    *(f"graphs.{graph}.inputs.{row}.slot" for graph in ("image_query", "itm", "text", "vision") for row in range(3)),
    *(f"graphs.{graph}.outputs.0.slot" for graph in ("image_query", "itm", "text", "vision", "preprocess", "boxes")),
    *(f"graphs.{graph}.inputs.{row}.slot" for graph in ("preprocess", "boxes") for row in range(3)),
}
"""What only the reader can tell: whether the slots of a role are complete."""


@pytest.fixture(scope="module")
def values(tiny_bundle: Path) -> dict[str, Any]:
    return manifest_values(tiny_bundle)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document but its root."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*prefix, key)
        yield from paths(inner, (*prefix, key))


def changed(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value there; `...` deletes it."""
    made = copy.deepcopy(values)
    parent = made
    for key in path[:-1]:
        parent = parent[key]
    if new is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return made


def refused(values: Any) -> bool:
    try:
        Manifest.from_dict(values)
    except (BundleError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return True
    except Exception as error:  # noqa: BLE001 any other error of the reader is a finding
        return "qpert" in type(error).__module__
    return False


@pytest.mark.parametrize("name", [MANIFEST, DETECTOR_MANIFEST])
def test_the_schemas_are_schemas_and_up_to_date(name: str) -> None:
    spec = importlib.util.spec_from_file_location("manifest_schema", ROOT / "tools" / "manifest_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    schema = read_schema(name)
    Draft7Validator.check_schema(schema)
    assert json.loads(module.schemas()[f"{name}.schema.json"]) == schema, "run tools/manifest_schema.py --write"
    assert all(field.get("description") for field in schema["properties"].values())


def test_bundles_of_both_schemas_are_accepted(values: dict[str, Any]) -> None:
    validator = Draft7Validator(read_schema(MANIFEST))
    assert list(validator.iter_errors(values)) == []
    old = upgrade_schema_1(manifest_values(SCHEMA_1))
    assert list(validator.iter_errors(old)) == []
    assert not refused(manifest_values(SCHEMA_1))


def test_what_the_schema_refuses_the_reader_refuses_and_the_other_way_round(values: dict[str, Any]) -> None:
    """Every place of a manifest, deleted and with four wrong values: both say the same, but for whether slots fit."""
    validator = Draft7Validator(read_schema(MANIFEST))
    tried, both = 0, 0
    differences = []
    for path in paths(values):
        if path[0] in ("verification", "architecture", "calibration", "files", "tools"):
            continue
        for new in (..., None, "wrong", -1, [], {}):
            made = changed(values, path, new)
            by_schema, by_reader = not validator.is_valid(made), refused(made)
            tried, both = tried + 1, both + (by_schema and by_reader)
            place = ".".join(map(str, path))
            if by_schema and not by_reader:
                differences.append(f"only the schema refuses {place} = {new!r}")
            if by_reader and not by_schema and not only_readers(values, made, place):
                differences.append(f"only the reader refuses {place} = {new!r}")
    assert differences == []
    assert tried > 1000
    assert both > tried / 2


def only_readers(values: dict[str, Any], made: dict[str, Any], place: str) -> bool:
    """Whether a change is of the kinds that take arithmetic or another field to judge."""
    if place in BEYOND or any(place.startswith(f"graphs.{name}") for name in values["graphs"]):
        last = place.rsplit(".", 1)[-1]
        kinds = {"role", "dtype", "slot", "inputs", "outputs", "shape", "ranges", "flops", "min", "max"}
        return last in kinds or last.isdigit() or place.count(".") == 1 or ".ranges." in place or ".flops" in place
    related = ("preprocessing.std", "preprocessing.fit", "perturbation.reduction", "perturbation.keep_stock")
    places = {"graphs", "patches.0", "patches.1", "prefix_tokens", "scores.second", "scores.final"}
    return place in places or place.startswith(related)


def test_a_fault_is_named_with_its_place(tmp_path: Path, values: dict[str, Any]) -> None:
    made = changed(values, ("graphs", "text", "inputs", 0, "slot"), ...)
    with pytest.raises(ValueError, match=r"graphs\.text\.inputs\[0\] must contain \['slot'\]"):
        check_against(MANIFEST, made)
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(BundleError, match=r"graphs\.text\.inputs\[0\]") as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "manifest-fields"
