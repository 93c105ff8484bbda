"""What qpert uses of TensorRT's Python API, found by following the library's module through the code.

    python tests/trt_usage.py MODULE FOLDER…

imports MODULE (`tensorrt_bindings`, `tensorrt_rtx`), reads every Python file below the folders that names TensorRT or
is imported by one that does, and prints one JSON object: the version, every use, and every use that this version does
not have. A value begins where `load_flavor` returns the module; from there it goes through assignments, attributes,
arguments, fields of dataclasses and returns, and pybind's docstrings say what a method of the library takes and gives
back. A branch on `hasattr(library, …)` is followed as it would run with this version. Needs nothing but the standard
library and MODULE.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = "load_flavor"
"""The function that returns the library's module."""

Values = frozenset  # of Object, Instance, Method, Pack, and True or False for what `hasattr` says
NOTHING: Values = frozenset()


@dataclass(frozen=True)
class Object:
    """The module, or what is found in it along a path of names: a class, a member of an enum, a function."""

    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """An object of one of its classes."""

    kind: type


@dataclass(frozen=True)
class Method:
    """A method of one of its objects."""

    kind: type
    name: str


@dataclass(frozen=True)
class Pack:
    """A tuple, part by part."""

    parts: tuple[Values, ...]


@dataclass(frozen=True)
class Signature:
    """One overload: names of its parameters without `self`, how many must be given, and what it returns."""

    names: tuple[str, ...]
    required: int
    returns: str

    def takes(self, positional: int, keywords: set[str]) -> bool:
        given = {*self.names[:positional], *keywords}
        return (
            positional <= len(self.names)
            and keywords <= set(self.names[positional:])
            and set(self.names[: self.required]) <= given
        )


def split_outside(text: str) -> list[str]:
    """Split at commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def signatures(function: Any) -> list[Signature]:
    """The overloads that pybind wrote into a docstring; none where it wrote none."""
    found = []
    for line in (getattr(function, "__doc__", None) or "").splitlines():
        match = re.match(r"\s*(?:\d+\. )?\w+\((.*)\) -> (.+?)\s*$", line)
        if not match or "*args" in match[1]:
            continue
        parameters = [part for part in split_outside(match[1]) if not part.startswith(("self:", "arg0: object", "/"))]
        parameters = [part for part in parameters if part != "self" and part != "*"]
        required = sum(" = " not in part for part in parameters)
        found.append(Signature(tuple(part.partition(":")[0] for part in parameters), required, match[2]))
    return found


class Usage:
    """Follows the module through parsed files until nothing new is learnt, then notes every use."""

    def __init__(self, library: Any, trees: dict[str, ast.Module]) -> None:
        self.library, self.trees = library, trees
        self.functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self.classes: dict[str, ast.ClassDef] = {}
        self.parameters: dict[tuple[int, str], Values] = defaultdict(frozenset)
        self.attributes: dict[str, Values] = defaultdict(frozenset)
        self.returns: dict[int, Values] = defaultdict(frozenset)
        self.reached: set[str] = set()
        self.uses: set[tuple[str, int, str]] = set()
        self.problems: set[tuple[str, int, str]] = set()
        self.file = ""
        words = (node.id for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Name))
        self.mentioned = set(words)
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions[node.name].append(node)
                elif isinstance(node, ast.ClassDef):
                    self.classes[node.name] = node

    def follow(self) -> None:
        before = -1
        while before != (now := self.size()):
            before = now
            self.uses, self.problems = set(), set()
            for file, tree in self.trees.items():
                self.file = file
                self.block(tree.body, {}, None)

    def size(self) -> int:
        stores = (self.parameters, self.attributes, self.returns)
        return len(self.reached) + sum(len(values) for store in stores for values in store.values())

    # Statements

    def block(self, body: list[ast.stmt], names: dict[str, Values], function: ast.FunctionDef | None) -> None:
        for statement in body:
            self.statement(statement, names, function)

    def statement(self, node: ast.stmt, names: dict[str, Values], function: ast.FunctionDef | None) -> None:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            inner = names | {one.arg: self.parameters[id(node), one.arg] for one in arguments}
            self.block(node.body, inner, node)
        elif isinstance(node, ast.ClassDef):
            if node.name in self.mentioned - self.reached:
                return  # only a branch that this version does not take makes one
            for base in node.bases:
                self.overridden(node, self.value(base, names))
            self.block(node.body, dict(names), None)
        elif isinstance(node, ast.Assign):
            values = self.value(node.value, names)
            for target in node.targets:
                self.assign(target, values, names)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value, names), names)
        elif isinstance(node, ast.Return) and node.value is not None:
            values = self.value(node.value, names)
            if function is not None:
                self.returns[id(function)] |= values
        elif isinstance(node, ast.If):
            found = self.value(node.test, names)
            if not found and self.asks(node.test):
                return  # not known yet, or no value of the library comes here
            if found != {False}:
                self.block(node.body, names, function)
            if found != {True}:
                self.block(node.orelse, names, function)
        else:
            self.other(node, names, function)

    def asks(self, test: ast.expr) -> bool:
        """Whether a condition is `hasattr(…)`, or a call of a function that returns just that."""
        name = test.func.id if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) else ""
        answers = [one.body[-1] for one in self.functions.get(name, ()) if isinstance(one.body[-1], ast.Return)]
        return name == "hasattr" or any(one.value is not None and self.asks(one.value) for one in answers)

    def other(self, node: ast.AST, names: dict[str, Values], function: ast.FunctionDef | None) -> None:
        """Loops, `with`, `try` and the rest: their parts, in order."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self.statement(child, names, function)
            elif isinstance(child, ast.expr):
                self.value(child, names)
            else:
                self.other(child, names, function)

    def assign(self, target: ast.expr, values: Values, names: dict[str, Values]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = values
        elif isinstance(target, ast.Attribute):
            owners = [one for one in self.value(target.value, names) if isinstance(one, Object | Instance)]
            for owner in owners:
                self.member(owner, target)
            if not owners:
                self.attributes[target.attr] |= values
        elif isinstance(target, ast.Tuple):
            packs = [one for one in values if isinstance(one, Pack) and len(one.parts) == len(target.elts)]
            for place, part in enumerate(target.elts):
                self.assign(part, frozenset().union(*(pack.parts[place] for pack in packs)), names)
        else:
            self.other(target, names, None)

    # Expressions

    def value(self, node: ast.expr | None, names: dict[str, Values]) -> Values:
        if isinstance(node, ast.Name):
            self.reached |= {node.id} & self.classes.keys()
            return names.get(node.id, NOTHING)
        if isinstance(node, ast.Attribute):
            owners = [one for one in self.value(node.value, names) if isinstance(one, Object | Instance)]
            if owners:
                return frozenset().union(*(self.member(owner, node) for owner in owners))
            return self.attributes[node.attr]
        if isinstance(node, ast.Call):
            return self.call(node, names)
        if isinstance(node, ast.Tuple):
            parts = tuple(self.value(part, names) for part in node.elts)
            return frozenset({Pack(parts)}) if any(parts) else NOTHING
        if isinstance(node, ast.IfExp):
            self.value(node.test, names)
            return self.value(node.body, names) | self.value(node.orelse, names)
        if isinstance(node, ast.NamedExpr):
            names[node.target.id] = found = self.value(node.value, names)
            return found
        if node is not None:
            self.other(node, names, None)
        return NOTHING

    def member(self, owner: Any, node: ast.Attribute) -> Values:
        """What `.attr` of one of the library's values is; notes the use, and whether there is such a thing."""
        holder = self.found(owner) if isinstance(owner, Object) else owner.kind
        self.note(node, f"{getattr(holder, '__name__', holder)}.{node.attr}", hasattr(holder, node.attr))
        found = getattr(holder, node.attr, None)
        if found is None:
            return NOTHING
        if isinstance(owner, Object):
            return frozenset({Object((*owner.path, node.attr))})
        if isinstance(found, property):
            return self.made(signatures(found.fget))
        return frozenset({Method(owner.kind, node.attr)}) if callable(found) else NOTHING

    def found(self, target: Any) -> Any:
        """The thing itself."""
        if isinstance(target, Method):
            return getattr(target.kind, target.name)
        return functools.reduce(getattr, target.path, self.library)

    def call(self, node: ast.Call, names: dict[str, Values]) -> Values:
        given = [self.value(one, names) for one in node.args]
        keywords = {one.arg: self.value(one.value, names) for one in node.keywords if one.arg}
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called == SOURCE:
            return frozenset({Object()})
        if called == "hasattr" and given[0]:
            wanted = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            return frozenset(hasattr(self.found(one), wanted) for one in given[0] if isinstance(one, Object))
        targets = self.value(node.func, names)
        if targets:
            return frozenset().union(*(self.library_call(one, node, given, keywords) for one in targets))
        return self.own_call(called, given, keywords)

    def library_call(self, target: Any, node: ast.Call, given: list[Values], keywords: dict[str, Values]) -> Values:
        if not isinstance(target, Object | Method):
            return NOTHING
        function = self.found(target)
        is_class = isinstance(function, type)
        known = signatures(function.__init__ if is_class else function)
        plain = not any(isinstance(one, ast.Starred) for one in node.args) and all(one.arg for one in node.keywords)
        unbound = isinstance(target, Object) and getattr(function, "__name__", "") == "__init__"
        if known and plain:
            fits = any(one.takes(len(given) - unbound, set(keywords)) for one in known)
            counts = ", ".join([f"{len(given)} given", *(f"{name}=" for name in keywords)])
            self.note(node, f"{getattr(function, '__name__', function)}({counts})", fits)
        return frozenset({Instance(function)}) if is_class else self.made(known)

    def made(self, known: list[Signature]) -> Values:
        """Objects of the library's classes that the overloads return."""
        names = (re.split(r"\.|::", one.returns)[-1].rstrip("]") for one in known)
        names = (name for short in names for name in (short, short.removeprefix("I")))  # ParserError is IParserError
        kinds = (getattr(self.library, name, None) for name in names)
        return frozenset(Instance(kind) for kind in kinds if isinstance(kind, type))

    def own_call(self, name: str, given: list[Values], keywords: dict[str, Values]) -> Values:
        """A call of qpert's own: arguments reach parameters and fields; what the function returns comes back."""
        found: Values = NOTHING
        made = self.classes.get(name)
        functions = list(self.functions.get(name, ()))
        if made is not None:
            inits = [one for one in made.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            functions += inits
            fields = [one.target.id for one in made.body if isinstance(one, ast.AnnAssign)] if not inits else []
            for field, values in [*zip(fields, given, strict=False), *keywords.items()]:
                if field in fields:
                    self.attributes[field] |= values
        for function in functions:
            arguments = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
            arguments = arguments[1:] if arguments[:1] == ["self"] else arguments
            for argument, values in [*zip(arguments, given, strict=False), *keywords.items()]:
                self.parameters[id(function), argument] |= values
            found |= self.returns[id(function)] if function.name != "__init__" else NOTHING
        return found

    def overridden(self, node: ast.ClassDef, bases: Values) -> None:
        """A class over one of the library's must define every method that its base wants to call."""
        for base in bases:
            if isinstance(base, Object) and isinstance(kind := self.found(base), type):
                methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
                for name, member in vars(kind).items():
                    if not name.startswith("_") and type(member).__name__ == "instancemethod":
                        self.note(node, f"{node.name} defines {kind.__name__}.{name}", name in methods)

    def note(self, node: ast.AST, what: str, there: bool) -> None:
        (self.uses if there else self.problems).add((self.file, node.lineno, what))


def usage_of(library: Any, files: dict[str, str]) -> Usage:
    usage = Usage(library, {name: ast.parse(text) for name, text in files.items()})
    usage.follow()
    return usage


def concerned(texts: dict[str, str]) -> dict[str, str]:
    """The files that name TensorRT, and those that they import."""
    named = {path for path, text in texts.items() if "tensorrt" in text}
    modules = {
        node.module.removeprefix("qpert.").replace(".", "/")
        for path in named
        for node in ast.walk(ast.parse(texts[path]))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    imported = {path for path in texts if any(path.endswith(f"{module}.py") for module in modules)}
    return {path: text for path, text in texts.items() if path in named | imported}


def main(module: str, *folders: str) -> None:
    library = importlib.import_module(module)
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    texts = {str(path): path.read_text("utf-8") for path in paths}
    usage = usage_of(library, concerned(texts))
    print(json.dumps({"version": library.__version__, "uses": sorted(usage.uses), "problems": sorted(usage.problems)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
