"""Sessions over a graph's ONNX file: what they have in common, whichever library runs it.

A library's session works in the process that made it, and only there. So a session keeps what it was opened from, and
opens that again where it was pickled or copied to, or in a forked child when it is first used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.errors import BundleError, InputError
from qpert.runtime.sessions.protocol import Arrays, check_inputs, closed_error
from qpert.runtime.sessions.providers import Provider, find_provider


def start_graph(path: Path, provider: Provider, threads: int, *, spin: bool = True) -> Any:
    """The library's own session of one ONNX file, which need not be a bundle's: `run(output names, inputs by name)`.

    Raises:
        UnavailableError: the provider is not there or did not start. Nothing else is used in its place.
        BundleError: the file is no graph that it can load.
    """
    if provider.openvino:
        from qpert.runtime.sessions.openvino import start_openvino

        return start_openvino(path, provider, threads)
    from qpert.runtime.sessions.onnx import start_onnxruntime

    return start_onnxruntime(path, provider, threads, spin=spin)


@dataclass(frozen=True)
class GraphSource:
    """What a session was opened from, so that another process can open the same. `stamp`: size and time of the file."""

    path: Path
    provider: str
    threads: int
    spin: bool
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: Path, provider: str, threads: int, *, spin: bool = True) -> GraphSource:
        return cls(path.absolute(), provider, threads, spin, file_stamp(path))

    def start(self) -> Any:
        """A new session of the library, of the same file.

        Raises:
            BundleError: the file is not the one that the first session was opened from.
        """
        if not self.path.is_file() or file_stamp(self.path) != self.stamp:
            raise BundleError(
                f"{self.path} was replaced since the bundle was opened, so this process cannot open the same graph; "
                "open the bundle again",
                code="bundle-replaced",
            )
        return start_graph(self.path, find_provider(self.provider), self.threads, spin=self.spin)


def file_stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


class FileSession:
    """A graph's file in a library. Subclasses say how it is run."""

    def __init__(self, spec: GraphSpec, session: Any, source: GraphSource | None = None) -> None:
        """`session` is the library's own, of `start_graph`, opened from `source`."""
        self.spec = spec
        self.source = source
        self._session = session
        self._process = os.getpid()

    def _ready(self, inputs: Arrays) -> Any:
        """The library's session, once it is known to be open and the inputs to be right."""
        if self._session is None:
            raise closed_error(self.spec)
        check_inputs(self.spec, inputs)
        if self._process != os.getpid():
            self._open_here()
        return self._session

    def _open_here(self) -> None:
        """Replace what a forked child has inherited by a session of its own."""
        if self.source is None:
            raise InputError(
                f"the session of graph {self.spec.name!r} was opened before this process was forked; open it here",
                code="forked-session",
            )
        self._session = self.source.start()
        self._process = os.getpid()

    def close(self) -> None:
        """Release the session. (In a forked child the inherited one stays in memory; see `qpert.runtime.forks`.)"""
        self._session = None

    def __reduce__(self) -> tuple[Callable[..., FileSession], tuple[object, ...]]:
        if self._session is None:
            raise closed_error(self.spec)
        if self.source is None:
            raise InputError(
                f"the session of graph {self.spec.name!r} was opened from no file and cannot be copied to another "
                "process; open it there",
                code="session-without-file",
            )
        return reopened, (type(self), self.spec, self.source)

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def reopened(kind: type[FileSession], spec: GraphSpec, source: GraphSource) -> FileSession:
    """What a pickled or copied session becomes: one that is opened from the same file."""
    return kind(spec, source.start(), source)


def check_declared(found: tuple[tuple[str, ...], tuple[str, ...]], spec: GraphSpec, path: Path) -> None:
    """The file's inputs and outputs, as the library found them, must be the manifest's.

    Raises:
        BundleError: they are others.
    """
    declared = (spec.input_names, spec.output_names)
    if found != declared:
        raise BundleError(
            f"{path} has inputs and outputs {found}, the manifest declares {declared}; export it again",
            code="graph-signature",
        )
