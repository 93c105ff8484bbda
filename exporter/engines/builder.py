"""Builds one engine from one graph: parse, configure, build. Errors quote the library's log.

The same calls serve TensorRT 10, TensorRT 11 and TensorRT-RTX. Networks are strongly typed: the graph sets the
precision, and no builder flag changes it.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpert.exporter.engines.monitor import make_monitor
from qpert.runtime.errors import QpertError
from qpert.runtime.progress import Advance
from qpert.runtime.sessions.tensorrt.engines import Profile
from qpert.runtime.sessions.tensorrt.libraries import builds_ahead
from qpert.runtime.sessions.tensorrt.log import make_log


class EngineError(QpertError):
    """TensorRT rejected a graph, or built no engine for it."""

    code = "engine"


@dataclass(frozen=True)
class BuildJob:
    """The input of one build.

    architectures: `("sm80", "sm89")` for one engine that runs on both; empty for this machine's GPU.
    workspace: most bytes of GPU scratch memory per layer; None for the library's own limit.
    timing_cache: kernel timings of earlier builds, b"" at first; None if the library does not use it.
    """

    graph: str
    onnx: Path
    profile: Profile
    architectures: tuple[str, ...]
    workspace: int | None = None
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """The serialised engine, and the timing cache with this build's additions (None if the job's is None)."""

    plan: Any
    timing_cache: bytes | None


def build_engine(library: Any, job: BuildJob, advance: Advance) -> BuiltEngine:
    """Build one engine.

    Args:
        library: the module `tensorrt` or `tensorrt_rtx`.
        job: what to build.
        advance: called with the progress of the build, 100 units in total.

    Raises:
        EngineError: the graph cannot be parsed or built; the message quotes the library's log.
        KeyboardInterrupt: the user interrupted; the library has stopped by then.
    """
    log = make_log(library)
    builder = library.Builder(log)
    network, parser = parsed_network(library, builder, log, job)
    config = configured(library, builder, log, job)
    cancelled = threading.Event()
    config.progress_monitor = monitor = make_monitor(library, advance, cancelled)
    cache = attached_cache(config, job)
    # The network refers to weights that the parser owns, and the builder to the monitor, without keeping them alive.
    alive = (parser, monitor)
    # In a separate thread, so that Ctrl-C arrives here and stops the build at its next step.
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt") as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            plan = future.result()
        except BaseException:
            cancelled.set()
            raise
    del alive
    if plan is None:
        raise EngineError(
            f"{library.__name__} built no engine for graph {job.graph!r}: {log.summary()}", code="engine-not-built"
        )
    return BuiltEngine(plan, None if cache is None else bytes(cache.serialize()))


def parsed_network(library: Any, builder: Any, log: Any, job: BuildJob) -> tuple[Any, Any]:
    """The network of a graph's file, and the parser that owns its weights. The library gets the path rather than the
    content, because it finds the external data relative to it.
    """
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(str(job.onnx)):
        errors = [parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(
            f"{library.__name__} {library.__version__} cannot read {job.onnx}: "
            f"{'; '.join(errors) or log.summary()}; if the file is as it was exported, please report this",
            code="engine-onnx-unreadable",
        )
    return network, parser


def parser_error(error: Any) -> str:
    """`operator Foo (node a/b): what is wrong`; without the operator if the file itself cannot be read."""
    where = f"operator {error.node_operator()} (node {error.node_name()!r}): " if error.node_operator() else ""
    return f"{where}{error.desc()}"


def configured(library: Any, builder: Any, log: Any, job: BuildJob) -> Any:
    """The builder's configuration: no TF32, one profile, the architectures, the workspace.

    TF32 is also off in half precision: the perturbation always runs in float32, and rounding the inputs of its
    products to 10 bits changes its result.
    """
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)
    if job.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, job.workspace)
    if builds_ahead(library):
        choose_architectures(library, config, log, job)
    profile = builder.create_optimization_profile()
    for name, (smallest, optimal, largest) in job.profile.items():
        profile.set_shape(name, smallest, optimal, largest)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(
            f"{library.__name__} rejects the profile of graph {job.graph!r}: {log.summary()}",
            code="engine-profile-refused",
        )
    return config


def choose_architectures(library: Any, config: Any, log: Any, job: BuildJob) -> None:
    """Set the GPUs that the engine is for; none are named for this machine's own."""
    if job.architectures:
        config.num_compute_capabilities = len(job.architectures)
    for index, architecture in enumerate(job.architectures):
        capability = getattr(library.ComputeCapability, architecture.upper(), None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise EngineError(
                f"{library.__name__} {library.__version__} does not support {architecture}: {log.summary()}",
                code="engine-architecture-refused",
            )


def attached_cache(config: Any, job: BuildJob) -> Any:
    """The timing cache that the build reads and extends, or None.

    A cache that is damaged, or of another GPU or version, is replaced by an empty one.
    """
    if job.timing_cache is None:
        return None
    cache = config.create_timing_cache(job.timing_cache)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
