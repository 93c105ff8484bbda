"""Makes the JSON Schemas of manifests from the dataclasses that read them.

    python tools/manifest_schema.py            says whether runtime/bundle/*.schema.json are up to date (exit 1 if not)
    python tools/manifest_schema.py --write    writes them

Run it after changing a field of a dataclass that a manifest holds. Draft 7, which fastjsonschema and all common
validators read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qpert.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from qpert.runtime.bundle.manifest import SCHEMA_VERSION, CheckpointRecord, Manifest
from qpert.runtime.bundle.roles import DETECTOR, ROLES
from qpert.runtime.bundle.schema import DETECTOR_MANIFEST, MANIFEST
from qpert.runtime.bundle.score_rules import FORMULAS, ScoreRules
from qpert.runtime.detection.bundle import DETECTOR_SCHEMA, DetectorManifest
from qpert.runtime.detection.geometry import CHANNEL_ORDERS, DETECTOR_FITS, DetectorGeometry
from qpert.runtime.detection.options import DetectionOptions
from qpert.runtime.inputs.perturbation import ADDED_LATER, Perturbation
from qpert.runtime.inputs.preprocessing import FITS, RESAMPLES, ROUNDINGS, ImagePreprocessing
from qpert.runtime.inputs.text import CLEANINGS, KINDS, PADDINGS, SIDES, TokenizerSpec

SCHEMAS = Path(__file__).resolve().parents[1] / "runtime" / "bundle"
DRAFT = "http://json-schema.org/draft-07/schema#"

CHOICES: Mapping[tuple[type, str], Sequence[str | None]] = {
    (TokenizerSpec, "kind"): KINDS,
    (TokenizerSpec, "clean"): CLEANINGS,
    (TokenizerSpec, "pad"): PADDINGS,
    (TokenizerSpec, "pad_side"): SIDES,
    (ImagePreprocessing, "resample"): RESAMPLES,
    (ImagePreprocessing, "fit"): FITS,
    (ImagePreprocessing, "rounding"): ROUNDINGS,
    (DetectorGeometry, "fit"): DETECTOR_FITS,
    (DetectorGeometry, "channels"): CHANNEL_ORDERS,
    (DetectorGeometry, "resample"): RESAMPLES,
    **{(ScoreRules, name): tuple(values) for name, values in FORMULAS.items()},
}
"""Fields whose values are names of a table, which the type does not show."""

ABOUT = {
    "schema_version": "the version of this layout; a reader refuses later ones",
    "kind": "what sets a detector's manifest apart",
    "family": "the model family of the exporter; shown only",
    "architecture": "the exporter's dimensions or name of the network; shown only",
    "checkpoint": "where the weights came from",
    "precision": "the precision of the graphs: fp32, fp16, bf16, int8 or fp8",
    "graphs": "the graphs by name; what a graph is for says its role",
    "patches": "rows and columns of image tokens",
    "patch_size": "pixels of a patch's side",
    "prefix_tokens": "tokens before those of the patches",
    "preprocessing": "from a picture to the pixels that the first graph takes",
    "tokenizer": "from a text to token ids",
    "perturbation": "how boxes act",
    "scores": "how images are ranked",
    "samples": "the file of recorded inputs and outputs",
    "tools": "versions of what made the bundle",
    "command": "the command that made the bundle",
    "created": "when, in ISO 8601",
    "files": "SHA-256 by path, of every other file of the bundle",
    "notes": "what a user of the bundle should know",
    "verification": "the verdict of the last `qpert verify`, or null",
    "quantization": "what `qpert quantize` did, or null",
    "calibration": "the search in which `qpert calibrate` found the settings, or null",
    "labels": "names by label id",
    "defaults": "the options of `qpert detect` where none is given",
    "decoding": "what the graph does after the network, for people",
}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
ANY_OBJECT_OR_NULL = {"type": ["object", "null"]}
WHOLE = {"type": "integer"}


def of_type(hint: Any) -> dict[str, Any]:
    """The schema of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    simple: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    if hint in simple:
        return {"type": simple[hint]}
    if hint is Any:
        return {}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [of_type(argument) for argument in arguments]}
    if origin is tuple and Ellipsis in arguments:
        return {"type": "array", "items": of_type(arguments[0])}
    if origin is tuple:
        return {"type": "array", "items": of_type(arguments[0]), "minItems": len(arguments), "maxItems": len(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": of_type(arguments[1])}
    raise TypeError(f"{hint!r} has no schema here; add it to `of_type`")


def of_dataclass(cls: type, *, also: Mapping[str, Any] | None = None, lenient: Sequence[str] = ()) -> dict[str, Any]:
    """The schema of a dataclass whose fields the manifest holds, none more, under their names.

    `also`: narrower schemas of some fields. `lenient`: fields that may be absent though they have no default, or, with
    `*`, whatever has a default.
    """
    hints = typing.get_type_hints(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        made = of_type(hints[field.name])
        if (cls, field.name) in CHOICES:
            made = {"enum": list(CHOICES[cls, field.name])}
        properties[field.name] = made | dict((also or {}).get(field.name, {}))
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in lenient and not ("*" in lenient and has_default):
            required.append(field.name)
    text = " ".join((cls.__doc__ or "").split())
    return {
        "description": text,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def tensor() -> dict[str, Any]:
    axis = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}
    made = of_dataclass(TensorSpec, also={"shape": {"items": axis}}, lenient=("*",))
    return made | {"additionalProperties": True}


def graph() -> dict[str, Any]:
    axis = {
        "type": "object",
        "properties": {"min": {"type": "integer", "minimum": 0}, "max": {"type": "integer", "minimum": 0}},
        "required": ["min", "max"],
    }
    tensors = {"type": "array", "items": {"$ref": "#/definitions/tensor"}}
    return {
        "description": " ".join((GraphSpec.__doc__ or "").split())
        + f" Known roles: {', '.join(ROLES)}; a graph of another role is kept and not run.",
        "type": "object",
        "properties": {
            "role": {"type": "string"},
            "file": {"type": "string"},
            "inputs": tensors,
            "outputs": tensors,
            "ranges": {"type": "object", "additionalProperties": axis},
            "flops": {"type": "object", "additionalProperties": WHOLE},
        },
        "required": ["role", "file", "inputs", "outputs", "ranges"],
    }


def checkpoint() -> dict[str, Any]:
    return of_dataclass(CheckpointRecord, lenient=("*",))


def document(title: str, about: str, properties: Mapping[str, Any], optional: Sequence[str]) -> dict[str, Any]:
    """A whole schema; every property gets its text."""
    described = {name: made | {"description": ABOUT[name]} for name, made in properties.items() if "$ref" not in made}
    linked = {
        name: {"allOf": [made], "description": ABOUT[name]} for name, made in properties.items() if "$ref" in made
    }
    return {
        "$schema": DRAFT,
        "title": title,
        "description": about,
        "type": "object",
        "properties": {name: (described | linked)[name] for name in properties},
        "required": [name for name in properties if name not in optional],
        "definitions": {"checkpoint": checkpoint(), "graph": graph(), "tensor": tensor()},
    }


def manifest() -> dict[str, Any]:
    """Of bundles that search, schema 2. Schema 1 is upgraded first (`qpert.runtime.bundle.upgrade`)."""
    graphs = {"type": "object", "additionalProperties": {"$ref": "#/definitions/graph"}}
    size = {"type": "integer", "minimum": 1}
    share = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
    properties = {
        "schema_version": {"const": SCHEMA_VERSION},
        "family": {"type": "string"},
        "architecture": {"type": "object"},
        "checkpoint": {"$ref": "#/definitions/checkpoint"},
        "precision": {"type": "string"},
        "graphs": graphs,
        "patches": {"type": "array", "items": size, "minItems": 2, "maxItems": 2},
        "patch_size": size,
        "prefix_tokens": {"type": "integer", "minimum": 0},
        "preprocessing": {"$ref": "#/definitions/preprocessing"},
        "tokenizer": {"$ref": "#/definitions/tokenizer"},
        "perturbation": {"$ref": "#/definitions/perturbation"},
        "scores": {"$ref": "#/definitions/scores"},
        "samples": {"type": "string"},
        "tools": STRINGS,
        "command": {"type": "string"},
        "created": {"type": "string"},
        "files": STRINGS,
        "notes": {"type": "array", "items": {"type": "string"}},
        "verification": ANY_OBJECT_OR_NULL,
        "quantization": ANY_OBJECT_OR_NULL,
        "calibration": ANY_OBJECT_OR_NULL,
    }
    written = {field.name for field in dataclasses.fields(Manifest)} - {"host_graphs", "schema_read"}
    if unknown := written ^ (properties.keys() - {"schema_version"}):
        raise TypeError(f"the manifest and its schema differ in {sorted(unknown)}; add them to `manifest`")
    made = document(
        "manifest.json of a qpert bundle",
        "What a bundle is. Keys that are not listed are kept out of the way of later versions and ignored.",
        properties,
        ("quantization", "calibration"),
    )
    made["definitions"] |= {
        "preprocessing": of_dataclass(
            ImagePreprocessing, also={"size": size}, lenient=("fit", "shortest_side", "rounding")
        ),
        "tokenizer": of_dataclass(TokenizerSpec, lenient=("*",)),
        "perturbation": of_dataclass(Perturbation, also={"threshold": share}, lenient=sorted(ADDED_LATER)),
        "scores": of_dataclass(ScoreRules) | {"additionalProperties": True},
    }
    return made


def detector() -> dict[str, Any]:
    """Of detectors."""
    graphs = {
        "type": "object",
        "additionalProperties": {"$ref": "#/definitions/graph"},
        "minProperties": 1,
        "maxProperties": 1,
    }
    share = {"minimum": 0, "maximum": 1}
    properties = {
        "kind": {"const": DETECTOR},
        "schema_version": {"const": DETECTOR_SCHEMA},
        "architecture": {"type": "string"},
        "checkpoint": {"$ref": "#/definitions/checkpoint"},
        "precision": {"type": "string"},
        "graphs": graphs,
        "labels": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "preprocessing": {"$ref": "#/definitions/preprocessing"},
        "defaults": {"$ref": "#/definitions/options"},
        "decoding": {"type": "object"},
        "tools": STRINGS,
        "command": {"type": "string"},
        "created": {"type": "string"},
        "notes": {"type": "array", "items": {"type": "string"}},
        "verification": ANY_OBJECT_OR_NULL,
        "quantization": ANY_OBJECT_OR_NULL,
        "files": STRINGS,
    }
    written = {field.name for field in dataclasses.fields(DetectorManifest)} - {"graph"}
    if unknown := written ^ (properties.keys() - {"schema_version", "kind", "graphs"}):
        raise TypeError(f"the detector's manifest and its schema differ in {sorted(unknown)}; add them to `detector`")
    made = document("manifest.json of a qpert detector", "What a detector is.", properties, ())
    made["definitions"] |= {
        "preprocessing": of_dataclass(DetectorGeometry),
        "options": of_dataclass(DetectionOptions, also={"threshold": share, "suppression": share}),
    }
    return made


def schemas() -> dict[str, str]:
    """Text by file name."""
    made = {MANIFEST: manifest(), DETECTOR_MANIFEST: detector()}
    return {
        f"{name}.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for name, schema in made.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them")
    options = parser.parse_args()
    stale = []
    for name, text in schemas().items():
        path = SCHEMAS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if options.write:
                path.write_text(text, encoding="utf-8")
    print(f"{'written' if options.write else 'out of date'}: {', '.join(stale)}" if stale else "up to date")
    return 1 if stale and not options.write else 0


if __name__ == "__main__":
    raise SystemExit(main())
