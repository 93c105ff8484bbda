"""One graph to one engine: parse, set up, build; whatever goes wrong is told in the library's own words.

The same calls for TensorRT 10, TensorRT 11 and TensorRT-RTX. Networks are strongly typed: precision is what the graph
says, and no builder flag changes it.
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
from qpert.runtime.sessions.tensorrt.log import make_log


class EngineError(QpertError):
    """TensorRT refused a graph, or gave no engine for it."""


@dataclass(frozen=True)
class BuildJob:
    """What one engine is made from.

    architectures: `("sm80", "sm89")`: one engine for all of them; empty for the GPU of this machine.
    workspace: most bytes of GPU memory that a layer may use for itself; None leaves it to the library.
    timing_cache: what an earlier build knew about speeds, b"" at first; None where the library has no use for it.
    """

    graph: str
    onnx: Path
    profile: Profile
    architectures: tuple[str, ...]
    workspace: int | None = None
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """The serialised engine, and the timing cache with what this build has added (None as in the job)."""

    plan: Any
    timing_cache: bytes | None


def build_engine(library: Any, job: BuildJob, advance: Advance) -> BuiltEngine:
    """Build one engine.

    Args:
        library: the module `tensorrt` or `tensorrt_rtx`.
        job: what to build.
        advance: hears of every step of the build, 100 in all.

    Raises:
        EngineError: the graph cannot be parsed or built, with what the library logged.
        KeyboardInterrupt: the user broke it off; the library has stopped when this is raised.
    """
    log = make_log(library)
    builder = library.Builder(log)
    network, parser = parsed_network(library, builder, log, job)
    config = configured(library, builder, log, job)
    cancelled = threading.Event()
    config.progress_monitor = monitor = make_monitor(library, advance, cancelled)
    cache = attached_cache(config, job)
    # The network points into weights that the parser owns, and the builder to the monitor, without holding either.
    alive = (parser, monitor)
    # In a thread of its own, so that Ctrl-C is heard here and stops the build at its next step.
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
            f"{library.__name__} built no engine for graph {job.graph!r}: {log.told()}", code="engine-not-built"
        )
    return BuiltEngine(plan, None if cache is None else bytes(cache.serialize()))


def parsed_network(library: Any, builder: Any, log: Any, job: BuildJob) -> tuple[Any, Any]:
    """The network of a graph's file, and the parser that owns its weights. Given the file itself, not its content, the
    library finds the external data.
    """
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(str(job.onnx)):
        errors = [parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(
            f"{library.__name__} {library.__version__} cannot read {job.onnx}: "
            f"{'; '.join(errors) or log.told()}; if the file is as it was exported, please report this",
            code="engine-onnx-unreadable",
        )
    return network, parser


def parser_error(error: Any) -> str:
    """`operator Foo (node a/b): what is wrong`; the operator is missing where the file itself cannot be read."""
    where = f"operator {error.node_operator()} (node {error.node_name()!r}): " if error.node_operator() else ""
    return f"{where}{error.desc()}"


def configured(library: Any, builder: Any, log: Any, job: BuildJob) -> Any:
    """The builder's configuration: no TF32, one profile, the architectures, the workspace.

    TF32 is cleared in half precision too: the perturbation runs in float32 there as well, and rounding the inputs of
    its products to 10 bits moves its result.
    """
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)
    if job.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, job.workspace)
    if job.architectures:
        config.num_compute_capabilities = len(job.architectures)
    for index, architecture in enumerate(job.architectures):
        capability = getattr(library.ComputeCapability, architecture.upper(), None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise EngineError(
                f"{library.__name__} {library.__version__} does not take {architecture}: {log.told()}",
                code="engine-architecture-refused",
            )
    profile = builder.create_optimization_profile()
    for name, (smallest, commonest, largest) in job.profile.items():
        profile.set_shape(name, smallest, commonest, largest)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(
            f"{library.__name__} does not take the profile of graph {job.graph!r}: {log.told()}",
            code="engine-profile-refused",
        )
    return config


def attached_cache(config: Any, job: BuildJob) -> Any:
    """The timing cache that the build reads and adds to, or None.

    Where the old one is damaged, or of another GPU or version, a new one is begun.
    """
    if job.timing_cache is None:
        return None
    cache = config.create_timing_cache(job.timing_cache)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
