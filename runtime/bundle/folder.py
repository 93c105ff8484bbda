"""A bundle on disk: its manifest, its files, and whether the files are the ones that were exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import MANIFEST_NAME, Manifest, read_manifest
from qpert.runtime.bundle.paths import bundle_path
from qpert.runtime.bundle.samples import Samples
from qpert.runtime.errors import BundleError
from qpert.runtime.files import cache_folder, sha256_of, write_atomically

REPORTS = "reports/"


@dataclass(frozen=True)
class FileState:
    """What was found of one file: its hash agrees, it is missing, or it differs."""

    path: str
    expected: str
    found: str | None

    @property
    def ok(self) -> bool:
        return self.found == self.expected


class GraphManifest(Protocol):
    """What every manifest says, whatever its graphs are for: the graphs, their precision, and SHA-256 by path."""

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        """Those that sessions and engines are made from."""
        ...

    @property
    def all_graphs(self) -> dict[str, GraphSpec]: ...

    @property
    def precision(self) -> str: ...

    @property
    def files(self) -> dict[str, str]: ...

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What `qpert quantize` did; None where nothing is quantised."""
        ...


class GraphBundle(Protocol):
    """A folder of graphs with a manifest, which sessions and engines are made from: a `Bundle`, or a detector's."""

    @property
    def folder(self) -> Path: ...

    @property
    def manifest(self) -> GraphManifest: ...

    def path(self, name: str) -> Path: ...

    def graph_path(self, graph: GraphSpec) -> Path: ...


@dataclass(frozen=True)
class HashedFolder:
    """A folder whose manifest gives the hash of every other file. A subclass narrows the type of `manifest`."""

    folder: Path
    manifest: GraphManifest

    def path(self, name: str) -> Path:
        return bundle_path(self.folder, name)

    def graph_path(self, graph: GraphSpec) -> Path:
        return self.path(graph.file)

    def check_files(self) -> list[FileState]:
        """Hash every file, whatever was remembered."""
        return [FileState(name, digest, self._digest(name)) for name, digest in self.manifest.files.items()]

    def require_files(self) -> None:
        """Raise BundleError for the first missing or altered file; remember what was found to be right.

        Reports are left to `check_files`: nothing runs them, and a `verify` that is interrupted between a report and
        the manifest, or a second one at the same time, must not make a good bundle unusable.
        """
        memory = HashMemory.load()
        for name, digest in self.manifest.files.items():
            if name.startswith(REPORTS):
                continue
            path = self.path(name)
            if not path.is_file():
                raise BundleError(
                    f"{path} is missing from the bundle; copy the whole folder again, or export it again",
                    code="bundle-file-missing",
                )
            if memory.knows(path, digest):
                continue
            found = sha256_of(path)
            if found != digest:
                raise BundleError(
                    f"{path} was altered: its SHA-256 is {found}, the manifest says {digest}; "
                    "restore the file or export the bundle again",
                    code="bundle-file-altered",
                )
            memory.remember(path, digest)
        memory.save()

    def remember_files(self) -> None:
        """Remember the manifest's hashes as right: this process has just computed them."""
        memory = HashMemory.load()
        for name, digest in self.manifest.files.items():
            memory.remember(self.path(name), digest)
        memory.save()

    def _digest(self, name: str) -> str | None:
        path = self.path(name)
        return sha256_of(path) if path.is_file() else None


def existing_folder(folder: str | Path, what: str) -> Path:
    """The folder of a bundle, known to be one. `what` is what the error expects.

    Raises:
        BundleError: no path, or no folder.
    """
    if not isinstance(folder, str | Path):
        raise BundleError(f"the bundle is a {type(folder).__name__}; expected the path of a folder", code="path")
    root = Path(folder)
    if not root.is_dir():
        raise BundleError(f"{root} is not a folder; expected {what}", code="bundle-missing")
    return root


@dataclass(frozen=True)
class Bundle(HashedFolder):
    """An opened bundle. Use `Bundle.open`."""

    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read the manifest and check every file's hash, unless size and modification time say it was done before.

        Raises:
            BundleError: not a bundle, a newer schema, a missing or altered file, a path outside the bundle.
        """
        root = existing_folder(folder, "a bundle made by `qpert export`")
        bundle = cls(root, read_manifest(root))
        bundle.require_files()
        return bundle

    @classmethod
    def just_written(cls, folder: Path) -> Bundle:
        """Open a bundle whose hashes this process has just computed: they are remembered, not computed again."""
        bundle = cls(folder, read_manifest(folder))
        bundle.remember_files()
        return bundle

    def samples(self) -> Samples:
        """The recorded samples, cases in the order of the graphs. Raises BundleError."""
        return Samples.load(self.path(self.manifest.samples), list(self.manifest.graphs))

    def add_reports(self, reports: Mapping[str, str], *, verification: Mapping[str, object] | None = None) -> Bundle:
        """Write `reports/<name>` for each, enter them in the manifest, and return the bundle as it is then.

        The manifest is read again first: others may have written reports since this bundle was opened. What a newer
        or older version wrote into it is kept, its schema version included.

        Raises:
            OSError: the bundle cannot be written.
        """
        manifest_path = self.folder / MANIFEST_NAME
        values = json.loads(manifest_path.read_text(encoding="utf-8"))
        for name, content in reports.items():
            path = self.path(REPORTS + name)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
            values["files"][REPORTS + name] = sha256_of(path)
        if verification is not None:
            values["verification"] = dict(verification)
        write_atomically(manifest_path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        return replace(self, manifest=read_manifest(self.folder))


@dataclass
class HashMemory:
    """Which files were already found to have which hash, by size and modification time; lives in the cache folder."""

    entries: dict[str, list[object]]
    changed: bool = False

    @classmethod
    def load(cls) -> HashMemory:
        try:
            entries = json.loads(cls._file().read_text(encoding="utf-8"))
        except (OSError, ValueError):  # nothing remembered, or not readable: hash again
            entries = {}
        return cls(entries if isinstance(entries, dict) else {})

    @staticmethod
    def _file() -> Path:
        return cache_folder() / "hashes.json"

    @staticmethod
    def _entry(path: Path, digest: str) -> list[object]:
        state = path.stat()
        return [state.st_size, state.st_mtime_ns, digest]

    def knows(self, path: Path, digest: str) -> bool:
        return self.entries.get(str(path.resolve())) == self._entry(path, digest)

    def remember(self, path: Path, digest: str) -> None:
        self.entries[str(path.resolve())] = self._entry(path, digest)
        self.changed = True

    def save(self) -> None:
        """Write what is new; a read-only home is no reason to fail, the files are only hashed again next time."""
        if not self.changed:
            return
        try:
            self._file().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(), json.dumps(self.entries))
        except OSError:
            return
