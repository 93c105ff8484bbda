"""The error codes of qpert: found in the source, described in docs/reference/error_codes.txt, one line a code.

    python docs/_ext/error_codes.py            prints the codes without a description, and descriptions without a code

A code is the `code="…"` of a raised error. An f-string counts as all codes that its alternatives make; those whose
alternatives the source cannot show are listed in `COMPOSED`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTIONS = ROOT / "docs" / "reference" / "error_codes.txt"
PACKAGES = ("runtime", "graphs", "exporter", "calibration")
OTHER_ENVIRONMENTS = {"lavis_worker.py", "modelopt_worker.py", "open_clip_worker.py"}
WORKERS = ("lavis", "open-clip")
"""Keys of the environments of stock implementations (`Environment.key`)."""
COMPOSED = {
    "box-*": ("box-labels", "box-sources"),
    "image-*": ("image-resample", "image-fit", "image-rounding"),
    "tokenizer-*": ("tokenizer-kind", "tokenizer-clean", "tokenizer-pad", "tokenizer-pad_side"),
    "os-*": (),  # from the table of `errno` names in runtime/cli/edge.py
    **{f"*-{end}": tuple(f"{key}-{end}" for key in WORKERS) for end in ("worker-closed", "worker-died")},
    **{
        f"*-{end}": tuple(f"{key}-{end}" for key in WORKERS)
        for end in ("environment-missing", "environment-incomplete")
    },
    "checkpoint-rejected-by-*": tuple(f"checkpoint-rejected-by-{key}" for key in WORKERS),
}
"""Codes made by an f-string, with * for what is filled in: the source shows the alternatives a few lines away."""

TOPICS = (
    ("Boxes and detectors", ("box", "boxes", "detect", "too-many-boxes")),
    ("Pictures", ("image", "images", "no-images", "picture", "file-name")),
    ("Texts and tokenizers", ("text", "texts", "token", "tokenizer", "caption", "captions")),
    ("Checkpoints", ("checkpoint", "hub", "hf", "shard", "weights", "vision", "git", "heads", "download", "tensor")),
    ("Bundles", ("bundle", "manifest", "samples", "sample", "case", "graph", "score", "perturb", "perturbation")),
    ("Galleries and search", ("gallery", "search", "rerank", "feature", "features")),
    ("Data sets and evaluation", ("annotation", "dataset", "entities", "coco", "work", "journal", "split", "data")),
    ("Engines and providers", ("engine", "tensorrt", "provider", "gpu", "cuda", "nvidia", "trt", "arch", "precision")),
    ("This machine", ("os", "out", "missing", "no-onnxruntime", "onnxruntime", "lavis", "modelopt", "forked")),
)
"""Where a code goes on the page, by its first word; the rest goes last."""
REST = "Everything else"
ERRNO_TABLE = "runtime/cli/edge.py"
CODE = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


@dataclass(frozen=True)
class ErrorCode:
    """A code as the source has it: the exit code of its class, and the modules that raise it."""

    code: str
    exit_codes: frozenset[int]
    modules: frozenset[str]


@dataclass
class Found:
    """What one walk over the source collects."""

    exit_codes: dict[str, set[int]] = field(default_factory=dict)
    modules: dict[str, set[str]] = field(default_factory=dict)

    def add(self, code: str, exit_code: int, module: str) -> None:
        self.exit_codes.setdefault(code, set()).add(exit_code)
        self.modules.setdefault(code, set()).add(module)


def collect(root: Path = ROOT) -> dict[str, ErrorCode]:
    """Every code by name.

    Raises:
        ValueError: a code is composed in a way that `COMPOSED` does not know.
    """
    parsed = {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        if path.name not in OTHER_ENVIRONMENTS
    }
    classes = _error_classes(parsed.values())
    found = Found()
    for module, tree in parsed.items():
        owners = _owners(tree, classes)
        for node in ast.walk(tree):
            for code, exit_code in _codes(node, classes, module):
                found.add(code, owners.get(id(node), exit_code), module)
    return {
        code: ErrorCode(code, frozenset(found.exit_codes[code]), frozenset(found.modules[code]))
        for code in sorted(found.exit_codes)
    }


def _error_classes(trees: Iterable[ast.Module]) -> dict[str, int]:
    """Exit code by name of `QpertError` and all its subclasses."""
    defined = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def exit_code(name: str, seen: tuple[str, ...] = ()) -> int | None:
        node = defined.get(name)
        if node is None or name in seen:
            return None
        inherited = [exit_code(ast.unparse(base).split(".")[-1], (*seen, name)) for base in node.bases]
        known = [code for code in inherited if code is not None]
        if not known and name != "QpertError":
            return None
        for statement in node.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "exit_code":
                return int(ast.literal_eval(statement.value))
        return known[0]

    return {name: code for name in defined if (code := exit_code(name)) is not None}


def _owners(tree: ast.Module, classes: Mapping[str, int]) -> dict[int, int]:
    """The exit code of the class, by the identity of each `super().__init__(…)` in an error class."""
    return {
        id(node): classes[owner.name]
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef) and owner.name in classes
        for node in ast.walk(owner)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"
    }


def _codes(node: ast.AST, classes: Mapping[str, int], module: str) -> Iterator[tuple[str, int]]:
    """The codes that one node gives, with their exit codes."""
    if isinstance(node, ast.Call):
        raised = ast.unparse(node.func).split(".")[-1]
        for keyword in node.keywords:
            if keyword.arg == "code":
                yield from ((code, classes.get(raised, 2)) for code in _constants(keyword.value, module))
    elif isinstance(node, ast.ClassDef) and node.name in classes:
        for statement in node.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "code":
                yield from ((code, classes[node.name]) for code in _constants(statement.value, module))
    elif isinstance(node, ast.FunctionDef):
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            if argument.arg == "code" and default is not None:
                yield from ((code, 2) for code in _constants(default, module))
    elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("code", "CODES_OF_STATUS"):
        if not isinstance(node.value, ast.Constant):  # a table or a choice; a bare word is no code of an error
            yield from ((code, 2) for code in _constants(node.value, module))
    elif module == ERRNO_TABLE and isinstance(node, ast.Attribute) and ast.unparse(node.value) == "errno":
        yield from ((f"os-{name.lower()}", 3) for name in {node.attr} - {"errorcode", "EPIPE"})


def _constants(value: ast.expr, module: str) -> Iterator[str]:
    """The codes in an expression."""
    if isinstance(value, ast.JoinedStr):
        pattern = "".join(part.value if isinstance(part, ast.Constant) else "*" for part in value.values)
        if pattern not in COMPOSED:
            raise ValueError(f"{module}:{value.lineno} composes a code as {ast.unparse(value)}; add it to COMPOSED")
        yield from COMPOSED[pattern]
        return
    for node in ast.walk(value):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
            yield node.value


def descriptions(path: Path = DESCRIPTIONS) -> dict[str, tuple[str, str]]:
    """Meaning and remedy by code.

    Raises:
        ValueError: a line is not `code | meaning | what to do`, or describes a code again.
    """
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        parts = [part.strip() for part in line.split(" | ")]
        if len(parts) != 3 or not all(parts) or parts[0] in found:
            raise ValueError(f"{path.name}:{number}: expected `code | meaning | what to do`, each code once: {line!r}")
        found[parts[0]] = (parts[1], parts[2])
    return found


def topic_of(code: str) -> str:
    first = code.split("-")[0]
    return next((title for title, words in TOPICS if code in words or first in words), REST)


def page() -> str:
    """The reference, in Markdown, by topic; codes without a description are left out, and a test fails."""
    codes, texts = collect(), descriptions()
    lines = []
    for title in (*(title for title, _ in TOPICS), REST):
        lines += [f"## {title}", ""]
        for code in (found for name, found in codes.items() if name in texts and topic_of(name) == title):
            meaning, remedy = texts[code.code]
            exits = " or ".join(map(str, sorted(code.exit_codes)))
            lines += [
                f"({code.code})=",
                f"`{code.code}` (exit {exits})",
                f": {meaning}",
                f"  *What to do:* {remedy}",
                "",
            ]
    return "\n".join(lines)


def differences() -> tuple[list[str], list[str]]:
    """Codes without a description, and descriptions of codes that no longer exist."""
    codes, texts = collect(), descriptions()
    return sorted(codes.keys() - texts.keys()), sorted(texts.keys() - codes.keys())


if __name__ == "__main__":
    missing, unknown = differences()
    for code in missing:
        print(f"{code} | … | …   ({', '.join(sorted(collect()[code].modules))})")
    for code in unknown:
        print(f"no longer in the source: {code}")
    raise SystemExit(1 if missing or unknown else 0)
