"""Engines of a bundle and their fingerprints: what each was built from, with and for, and whether it runs here.

    BUNDLE/engines/sm89-rtx1.7.1.116/engine.json, vision.engine, image_query.engine, …

Engines are a disposable cache of the ONNX graphs, so the manifest does not list them: their own record holds their
hashes. An engine is used only if library, version, GPU and graphs match the record. Otherwise the error explains the
difference and gives the command that rebuilds the engine, because the library itself says "tag mismatch" at best.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qpert.runtime.bundle.folder import FileState, GraphBundle, GraphManifest, HashMemory
from qpert.runtime.bundle.paths import bundle_path
from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.files import sha256_of
from qpert.runtime.sessions.device import Device
from qpert.runtime.sessions.gpus import Gpu
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS, Flavor, flavor_version, load_flavor

ENGINES = "engines"
RECORD_NAME = "engine.json"
ENGINE_SCHEMA_VERSION = 1

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""By input: the smallest, the most common and the largest shape of a call."""


@dataclass(frozen=True)
class EngineFile:
    """The engine of one graph.

    file: next to the record. sha256, bytes: of the engine. sources: SHA-256 of the ONNX file and of its external data,
    by their paths in the bundle (`onnx/vision.onnx`), as they were when it was built. seconds: what the build took.
    """

    file: str
    sha256: str
    bytes: int
    sources: dict[str, str]
    profile: Profile
    seconds: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineFile:
        """Raises LookupError, TypeError or ValueError for what `to_dict` of a record does not write."""
        return cls(
            file=text_of(values, "file"),
            sha256=text_of(values, "sha256"),
            bytes=int(values["bytes"]),
            sources={str(name): str(digest) for name, digest in values["sources"].items()},
            profile={name: shapes_of(shapes) for name, shapes in values["profile"].items()},
            seconds=float(values["seconds"]),
        )


@dataclass(frozen=True)
class EngineRecord:
    """What `engine.json` holds.

    flavor: `rtx` or `classic`. flavor_version: the library's, all its numbers. architectures: GPUs that the engines
    run on, `("sm89",)`. tf32: whether float32 products may be rounded to TF32. gpu, driver, cuda: of the machine that
    built, None if it has none. command: the command line.
    """

    flavor: str
    flavor_version: str
    architectures: tuple[str, ...]
    precision: str
    tf32: bool
    graphs: dict[str, EngineFile]
    qpert: str
    command: str
    created: str
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None
    schema_version: int = field(default=ENGINE_SCHEMA_VERSION)

    @property
    def target(self) -> str:
        """As `--target` takes it: `sm89`, or `sm80+sm89`."""
        return "+".join(self.architectures)

    @property
    def title(self) -> str:
        """`TensorRT-RTX 1.7.1.116`."""
        return f"{FLAVORS[self.flavor].title} {self.flavor_version}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"target": self.target}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineRecord:
        """Raises BundleError for a newer schema; LookupError, TypeError or ValueError for what is no record."""
        version = values["schema_version"]
        if isinstance(version, int) and version > ENGINE_SCHEMA_VERSION:
            raise BundleError(
                f"its schema version is {version}, this qpert reads up to {ENGINE_SCHEMA_VERSION}: upgrade qpert",
                code="engine-schema-newer",
            )
        architectures = tuple(str(name) for name in values["architectures"])
        if version != ENGINE_SCHEMA_VERSION or values["flavor"] not in FLAVORS or not architectures:
            raise ValueError(f"schema {version!r}, flavour {values['flavor']!r}, architectures {architectures}")
        return cls(
            flavor=values["flavor"],
            flavor_version=text_of(values, "flavor_version"),
            architectures=architectures,
            precision=text_of(values, "precision"),
            tf32=bool(values["tf32"]),
            graphs={name: EngineFile.from_dict(graph) for name, graph in values["graphs"].items()},
            qpert=text_of(values, "qpert"),
            command=text_of(values, "command"),
            created=text_of(values, "created"),
            gpu=values["gpu"],
            driver=values["driver"],
            cuda=values["cuda"],
        )


@dataclass(frozen=True)
class Engine:
    """One folder below `engines/`, read and found to name nothing outside itself."""

    bundle: Path
    folder: Path
    record: EngineRecord

    def path(self, graph: str) -> Path:
        return self.folder / self.record.graphs[graph].file

    def check(self) -> list[FileState]:
        """Hash every engine file, whatever was remembered."""
        return [
            FileState(str(path.relative_to(self.bundle)), item.sha256, sha256_of(path) if path.is_file() else None)
            for path, item in ((self.path(graph), item) for graph, item in self.record.graphs.items())
        ]

    def require(self, graph: str) -> Path:
        """The engine file of a graph, hashed unless size and modification time say that it was done before.

        Raises:
            BundleError: it is missing, cut short or altered.
        """
        path, item = self.path(graph), self.record.graphs[graph]
        if not path.is_file():
            raise BundleError(
                f"{path} is missing; build it again: {rebuild_command(self.bundle, self.record)}",
                code="engine-file-missing",
            )
        memory = HashMemory.load()
        if not memory.knows(path, item.sha256):
            found = sha256_of(path)
            if found != item.sha256:
                raise BundleError(
                    f"{path} was cut short or altered: it has {path.stat().st_size} bytes with SHA-256 {found}, the "
                    f"record says {item.bytes} with {item.sha256}; build it again: "
                    f"{rebuild_command(self.bundle, self.record)}",
                    code="engine-file-altered",
                )
            memory.remember(path, item.sha256)
            memory.save()
        return path


@dataclass(frozen=True)
class Machine:
    """What decides whether an engine runs here: the version of one flavour's library, and the GPU."""

    flavor: Flavor
    version: str
    gpu: Gpu


def this_machine(flavor: Flavor) -> Machine:
    """This machine, for engines of one flavour.

    Raises:
        UnavailableError: the library, CUDA or a GPU is missing.
    """
    library = load_flavor(flavor)
    device = Device()
    try:
        return Machine(flavor, flavor_version(library), device.gpu())
    finally:
        device.close()


def engine_folders(bundle: Path) -> list[Path]:
    """Folders below `engines/` in order of name; those that a build has not finished begin with a dot."""
    root = bundle / ENGINES
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_engine(bundle: Path, folder: Path) -> Engine:
    """Read and check `folder/engine.json`.

    Raises:
        BundleError: there is none, it is no record, of a newer schema, or a path leaves the folder.
    """
    path = folder / RECORD_NAME
    again = f"delete {folder} and build the engines again with `qpert build`"
    try:
        bundle_path(bundle, f"{ENGINES}/{folder.name}")
        record = EngineRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
        for item in record.graphs.values():
            bundle_path(folder, item.file)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} holds no {RECORD_NAME}; {again}", code="engine-record-missing") from error
    except BundleError as error:
        raise BundleError(f"{path} cannot be used ({error}); {again}", code="engine-record-unreadable") from error
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{path} is not the record of an engine ({error!r}); {again}", code="engine-record-fields"
        ) from error
    return Engine(bundle, folder, record)


def find_engines(bundle: GraphBundle) -> tuple[Engine, ...]:
    """Every engine of a bundle. Raises BundleError for the first that cannot be read."""
    return tuple(read_engine(bundle.folder, folder) for folder in engine_folders(bundle.folder))


def require_flavor(bundle: GraphBundle, flavor: Flavor) -> None:
    """Raises UnavailableError where the bundle has no engine of this flavour at all."""
    if not any(flavor_of(folder) == flavor.name for folder in engine_folders(bundle.folder)):
        raise UnavailableError(
            f"{bundle.folder} holds no {flavor.title} engine, and engines are built only on request; build one with: "
            f"{build_command(bundle.folder, flavor.name, 'current')}",
            code="engine-missing",
        )


def flavor_of(folder: Path) -> str:
    """The flavour of an engine's folder, from its name: `sm89-rtx1.7.1` → `rtx`."""
    _, _, library = folder.name.partition("-")
    return library.rstrip("0123456789.")


def engine_for(bundle: GraphBundle, machine: Machine) -> Engine:
    """The engine of the bundle that runs on this machine, the newest if there are several.

    Raises:
        UnavailableError: the bundle has none for it; the message goes through those that it has.
    """
    refused: list[str] = []
    fitting: list[Engine] = []
    for folder in engine_folders(bundle.folder):
        if flavor_of(folder) != machine.flavor.name:
            continue
        try:
            engine = read_engine(bundle.folder, folder)
        except BundleError as error:
            refused.append(str(error))
            continue
        reasons = explain(engine.record, machine, bundle.manifest)
        if reasons:
            refused.append(f"{folder.name}: {', and '.join(reasons)}")
        else:
            fitting.append(engine)
    if fitting:
        return max(fitting, key=lambda engine: engine.record.created)
    have = "; ".join(refused) or f"it has no {machine.flavor.title} engine"
    build = build_command(bundle.folder, machine.flavor.name, machine.gpu.architecture)
    raise UnavailableError(
        f"{bundle.folder} has no engine for this machine's {machine.gpu}: {have}; build one: {build}",
        code="engine-other-gpu",
    )


def explain(record: EngineRecord, machine: Machine, manifest: GraphManifest) -> list[str]:
    """Why an engine does not run here, as a sentence; empty if it does.

    TensorRT and TensorRT-RTX read only engines of exactly their own version, for the architectures they were built for.
    Another GPU of the same architecture is fine.
    """
    reasons = []
    if missing := [name for name in manifest.graphs if name not in record.graphs]:
        reasons.append(f"it has no engine of graph {', '.join(missing)}")
    if record.flavor != machine.flavor.name:
        reasons.append(f"it is for {record.title}, asked for is {machine.flavor.title}")
    elif record.flavor_version != machine.version:
        reasons.append(f"it was built with {record.title}, installed is {machine.version}")
    if machine.gpu.architecture not in record.architectures:
        reasons.append(f"it is for {' and '.join(record.architectures)}, this GPU is a {machine.gpu}")
    if changed := changed_sources(record, manifest):
        reasons.append(f"it was built from other graphs than the bundle's ({', '.join(changed)} differs)")
    return reasons


def changed_sources(record: EngineRecord, manifest: GraphManifest) -> list[str]:
    """Files of the bundle that are not what the engine was built from."""
    sources: Mapping[str, str] = {name: sha for item in record.graphs.values() for name, sha in item.sources.items()}
    return sorted(name for name, digest in sources.items() if manifest.files.get(name) != digest)


def rebuild_command(bundle: Path, record: EngineRecord) -> str:
    return build_command(bundle, record.flavor, record.target) + " --force"


def build_command(bundle: Path, flavor: str, target: str) -> str:
    return shlex.join(["qpert", "build", str(bundle), "--flavor", flavor, "--target", target])


def text_of(values: dict[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise TypeError(f"{key} is {values[key]!r}")
    return str(values[key])


def shapes_of(shapes: Any) -> tuple[Shape, Shape, Shape]:
    smallest, common, largest = (tuple(int(length) for length in shape) for shape in shapes)
    return smallest, common, largest
