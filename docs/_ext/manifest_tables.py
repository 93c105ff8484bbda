"""The manifests' schemas as tables, for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).resolve().parents[2] / "runtime" / "bundle"


def page() -> str:
    lines = []
    for name, title in (("manifest", "A bundle's manifest"), ("detector", "A detector's manifest")):
        schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
        lines += [f"## {title}", "", *table(schema)]
        for part, definition in schema["definitions"].items():
            lines += [f"### {title.split(chr(39))[0]}: {part}", "", definition.get("description", ""), ""]
            lines += table(definition)
    return "\n".join(lines)


def table(schema: dict[str, Any]) -> list[str]:
    required = set(schema.get("required", ()))
    rows = ["| key | is | |", "| --- | --- | --- |"]
    for key, field in schema["properties"].items():
        text = field.get("description", "") + ("" if key in required else (" *(may be absent)*"))
        rows.append(f"| `{key}` | {kind(field)} | {text.strip()} |")
    return [*rows, ""]


def kind(field: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "allOf" in field:
        return kind(field["allOf"][0])
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind(one) for one in field["anyOf"]))
    if field.get("type") == "array":
        count = f"{field['minItems']} " if field.get("minItems") == field.get("maxItems", -1) else ""
        return f"list of {count}{kind(field['items'])}"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"object of {kind(field['additionalProperties'])}"
    found = field.get("type", "anything")
    words = found if isinstance(found, str) else " or ".join(found)
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join([words, *(f"{sign} {field[name]}" for name, sign in bounds.items() if name in field)])
