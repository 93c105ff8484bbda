"""Engines for a bundle: which, in which order, and how each gets into its folder whole or not at all.

`engines/<target>-<flavor><version>/` holds one file for each graph and the record of how they came to be. An engine is
written aside, then renamed, then entered in the record: whatever ends the process, the record names finished engines
only, and the next build goes on from there.
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
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.staging import scratch_folder
from qpert.runtime.errors import BundleError, UnavailableError
from qpert.runtime.files import cache_folder, sha256_of, sync_folder, write_atomically
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.sessions.gpus import first_gpu
from qpert.runtime.sessions.tensorrt.engines import ENGINES, RECORD_NAME, Engine, EngineFile, EngineRecord, read_engine


@dataclass(frozen=True)
class BuildRequest:
    """What the user asked for. `graphs`: empty for all; `workspace`: bytes, None for the library's own limit."""

    flavor: str = "auto"
    target: str = "auto"
    graphs: tuple[str, ...] = ()
    workspace: int | None = None
    force: bool = False
    command: str = ""

    def plan(self, precision: str) -> BuildPlan:
        """Settle library and targets, see `plan_build`: quick, so that a refusal comes before long work."""
        return plan_build(flavor=self.flavor, target=self.target, precision=precision, gpu=first_gpu())


@dataclass(frozen=True)
class EngineReport:
    """One engine of a build; `file` is relative to the bundle, `kept` says that it was there already."""

    target: str
    graph: str
    file: str
    bytes: int
    seconds: float
    kept: bool


@dataclass(frozen=True)
class BuildReport:
    """What a build did, and what was chosen for it and why."""

    bundle: str
    flavor: str
    version: str
    why: str
    targets: tuple[str, ...]
    engines: tuple[EngineReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_engines(
    bundle: Bundle, request: BuildRequest, plan: BuildPlan, progress: Progress | None = None
) -> BuildReport:
    """Build what the plan says and the bundle does not have yet, one graph at a time.

    Raises:
        EngineError: TensorRT refused a graph; engines that were finished before it stay.
        UnavailableError: no room for an engine.
        BundleError: the bundle's `engines` leads out of it.
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
    """The engines of one target, in a folder of their own."""

    bundle: Bundle
    request: BuildRequest
    plan: BuildPlan
    target: Target
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.bundle.path(f"{ENGINES}/{self.plan.folder(self.target)}")

    def run(self) -> Iterator[EngineReport]:
        """Build what is missing; each engine is entered in the record as soon as it is written."""
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
            self.progress.say(f"{name} for {self.target.name} is there already")
        file = f"{ENGINES}/{self.folder.name}/{item.file}"
        return EngineReport(self.target.name, name, file, item.bytes, item.seconds, kept)

    def record(self) -> EngineRecord:
        """The record to go on from: of what is there, the engines that are whole and of the bundle's present graphs."""
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
        except BundleError:  # none yet, or not to be read: everything is built
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
        """What earlier builds of any bundle have measured on this GPU; None where the library has no use for it."""
        if not self.plan.flavor.uses_timing_cache:
            return None
        try:
            return self.cache_file.read_bytes()
        except OSError:
            return b""

    def remember(self, built: BuiltEngine) -> None:
        """Keep the timings; a cache that cannot be written is no reason to fail, the next build only takes longer."""
        if built.timing_cache is None:
            return
        try:
            self.cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.cache_file, built.timing_cache)
        except OSError:
            return


def sources_of(bundle: Bundle, spec: GraphSpec) -> dict[str, str]:
    """SHA-256 of a graph's ONNX file and of the external data that it names, by path in the bundle.

    The file is searched for the names of the data files beside it: what would read it properly, the onnx package, is
    not there where engines are built on the machine that serves them.
    """
    files = bundle.manifest.files
    content = bundle.graph_path(spec).read_bytes()
    folder = Path(spec.file).parent
    beside = [name for name in files if Path(name).parent == folder and not name.endswith(".onnx")]
    data = [name for name in beside if Path(name).name.encode() in content]
    return {name: files[name] for name in (spec.file, *data)}


def write_engine(path: Path, plan: Any) -> tuple[int, str]:
    """Write a serialised engine and make it durable; its length in bytes and SHA-256.

    Raises:
        UnavailableError: it could not be written, for want of room as a rule.
    """
    content = memoryview(plan)
    try:
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UnavailableError(
            f"{path.name} has {content.nbytes:,} bytes and could not be written ({error.strerror or error}); make room "
            f"on the disk of {path.parent.parent} and run the same command again: finished engines are kept",
            code="engine-not-written",
        ) from error
    return content.nbytes, hashlib.sha256(content).hexdigest()
