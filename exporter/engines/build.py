"""Builds a bundle's engines and writes each one atomically.

`engines/<target>-<flavor><version>/` holds one file per graph and the record of how they were built. An engine is
written to a scratch folder, then renamed, then added to the record. If the process is killed at any point, the record
names finished engines only, and the next build resumes from there.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qpert.exporter.engines.builder import BuildJob, BuiltEngine, build_engine
from qpert.exporter.engines.monitor import STEPS
from qpert.exporter.engines.profiles import profile_of
from qpert.exporter.engines.targets import BuildPlan, Target, plan_build
from qpert.runtime.bundle.folder import GraphBundle
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.staging import scratch_folder
from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.files import cache_folder, sha256_of, sync_folder, write_atomically
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.sessions.gpus import first_gpu
from qpert.runtime.sessions.tensorrt.engines import ENGINES, RECORD_NAME, Engine, EngineFile, EngineRecord, read_engine


@dataclass(frozen=True)
class BuildRequest:
    """What the user asked for. `graphs`: empty for all; `workspace`: bytes; None for the library's own limit."""

    flavor: str = "auto"
    target: str = "auto"
    graphs: tuple[str, ...] = ()
    workspace: int | None = None
    force: bool = False
    command: str = ""

    def plan(self, precision: str) -> BuildPlan:
        """Choose library and targets, see `plan_build`. It is quick, so that errors come before long work."""
        return plan_build(flavor=self.flavor, target=self.target, precision=precision, gpu=first_gpu())


@dataclass(frozen=True)
class EngineReport:
    """One engine of a build. `file` is relative to the bundle; `kept`: it existed already."""

    target: str
    graph: str
    file: str
    bytes: int
    seconds: float
    kept: bool


@dataclass(frozen=True)
class BuildReport:
    """What a build did, and which library and targets it chose and why."""

    bundle: str
    flavor: str
    version: str
    why: str
    targets: tuple[str, ...]
    engines: tuple[EngineReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_engines(
    bundle: GraphBundle, request: BuildRequest, plan: BuildPlan, progress: Progress | None = None
) -> BuildReport:
    """Build the plan's engines that the bundle lacks, one graph at a time.

    Raises:
        EngineError: TensorRT rejected a graph; engines finished before it are kept.
        UnavailableError: no disk space for an engine.
        BundleError: the bundle's `engines` links to a folder outside it.
    """
    progress = progress or Silent()
    names = ", ".join(target.name for target in plan.targets)
    progress.say(f"engines for {names} with {plan.flavor.title} {plan.version} ({plan.why})")
    engines = [
        report for target in plan.targets for report in TargetBuild(bundle, request, plan, target, progress).run()
    ]
    return BuildReport(
        bundle=str(bundle.folder),
        flavor=plan.flavor.name,
        version=plan.version,
        why=plan.why,
        targets=tuple(target.name for target in plan.targets),
        engines=tuple(engines),
    )


@dataclass(frozen=True)
class TargetBuild:
    """The engines of one target, in one folder."""

    bundle: GraphBundle
    request: BuildRequest
    plan: BuildPlan
    target: Target
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.bundle.path(f"{ENGINES}/{self.plan.folder(self.target)}")

    def run(self) -> Iterator[EngineReport]:
        """Build missing engines; each is added to the record as soon as it is written."""
        record = self.record()
        with scratch_folder(self.folder) as scratch:
            for name in dict.fromkeys(self.request.graphs or self.bundle.manifest.graphs):
                kept = not self.request.force and name in record.graphs
                if not kept:
                    record = replace(record, graphs=record.graphs | {name: self.build(name, scratch)})
                    self.folder.mkdir(exist_ok=True)
                    (scratch / f"{name}.engine").replace(self.folder / f"{name}.engine")
                    sync_folder(self.folder)
                    write_atomically(self.folder / RECORD_NAME, record.to_json())
                yield self.report(name, record.graphs[name], kept=kept)

    def build(self, name: str, scratch: Path) -> EngineFile:
        """Build one graph's engine into `scratch`."""
        spec = self.bundle.manifest.graphs[name]
        job = BuildJob(
            graph=name,
            onnx=self.bundle.graph_path(spec),
            profile=profile_of(spec),
            architectures=self.target.architectures if self.plan.flavor.architectures else (),
            workspace=self.request.workspace,
            timing_cache=self.timing_cache(),
        )
        started = time.perf_counter()
        with self.progress.stage(f"building {name} for {self.target.name}", total=STEPS) as advance:
            built = build_engine(self.plan.library, job, advance)
        seconds = time.perf_counter() - started
        self.remember(built)
        path = scratch / f"{name}.engine"
        size, digest = write_engine(path, built.plan)
        self.progress.say(f"built {name} for {self.target.name}: {size / 1e6:,.1f} MB in {seconds:,.1f} s")
        return EngineFile(path.name, digest, size, sources_of(self.bundle, spec), job.profile, round(seconds, 2))

    def report(self, name: str, item: EngineFile, *, kept: bool) -> EngineReport:
        if kept:
            self.progress.say(f"{name} for {self.target.name} exists already")
        file = f"{ENGINES}/{self.folder.name}/{item.file}"
        return EngineReport(self.target.name, name, file, item.bytes, item.seconds, kept)

    def record(self) -> EngineRecord:
        """The record to resume from, with the existing engines that are intact and match the bundle's graphs."""
        gpu = self.plan.gpu
        return EngineRecord(
            flavor=self.plan.flavor.name,
            flavor_version=self.plan.version,
            architectures=self.target.architectures,
            precision=self.bundle.manifest.precision,
            tf32=False,
            graphs=self.finished(),
            qpert=version("qpert"),
            command=self.request.command,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            gpu=gpu.name if gpu else None,
            driver=gpu.driver if gpu else None,
        )

    def finished(self) -> dict[str, EngineFile]:
        try:
            engine = read_engine(self.bundle.folder, self.folder)
        except BundleError:  # none yet, or unreadable: everything is built
            return {}
        return {name: item for name, item in engine.record.graphs.items() if self.is_current(engine, name, item)}

    def is_current(self, engine: Engine, name: str, item: EngineFile) -> bool:
        spec = self.bundle.manifest.graphs.get(name)
        path = engine.path(name)
        return (
            spec is not None
            and item.file == f"{name}.engine"
            and item.sources == sources_of(self.bundle, spec)
            and item.profile == profile_of(spec)
            and not engine.record.tf32
            and path.is_file()
            and sha256_of(path) == item.sha256
        )

    @property
    def cache_file(self) -> Path:
        return cache_folder() / f"timings-{self.plan.folder(self.target)}"

    def timing_cache(self) -> bytes | None:
        """What earlier builds of any bundle measured on this GPU; None if the library does not use it."""
        if not self.plan.flavor.uses_timing_cache:
            return None
        try:
            return self.cache_file.read_bytes()
        except OSError:
            return b""

    def remember(self, built: BuiltEngine) -> None:
        """Save the timings. A cache that cannot be written is not an error: the next build only takes longer."""
        if built.timing_cache is None:
            return
        try:
            self.cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.cache_file, built.timing_cache)
        except OSError:
            return


def sources_of(bundle: GraphBundle, spec: GraphSpec) -> dict[str, str]:
    """SHA-256 of a graph's ONNX file and of its external data, by path in the bundle.

    The file's bytes are searched for the names of the data files in its folder, because the onnx package is not
    installed on a serving machine that builds its own engines.
    """
    files = bundle.manifest.files
    content = bundle.graph_path(spec).read_bytes()
    folder = Path(spec.file).parent
    siblings = [name for name in files if Path(name).parent == folder and not name.endswith(".onnx")]
    data = [name for name in siblings if Path(name).name.encode() in content]
    return {name: files[name] for name in (spec.file, *data)}


def write_engine(path: Path, plan: Any) -> tuple[int, str]:
    """Write a serialised engine to disk and sync it; returns its length in bytes and SHA-256.

    Raises:
        UnavailableError: it could not be written, usually because the disk is full.
    """
    content = memoryview(plan)
    try:
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UnavailableError(
            f"{path.name} has {content.nbytes:,} bytes and could not be written ({error.strerror or error}); free "
            f"space on the disk of {path.parent.parent} and run the same command again: finished engines are kept",
            code="engine-not-written",
        ) from error
    return content.nbytes, hashlib.sha256(content).hexdigest()
