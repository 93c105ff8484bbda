"""Opening graphs on exactly the provider that was asked for."""

from __future__ import annotations

from pathlib import Path

from qpert.runtime.bundle.folder import Bundle, GraphBundle
from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.errors import InputError
from qpert.runtime.sessions.protocol import Session
from qpert.runtime.sessions.providers import find_provider
from qpert.runtime.sessions.tensorrt.libraries import FLAVORS


def open_sessions(
    bundle: GraphBundle, provider: str = "cpu", *, threads: int = 0, spin: bool = True
) -> dict[str, Session]:
    """Every graph of a bundle on exactly the provider that was asked for; all are open, or none.

    Args:
        bundle: the opened bundle.
        provider: `cpu` or `cuda` (ONNX Runtime), `openvino`, `tensorrt` or `rtx` (engines in the bundle).
        threads: CPU threads for one operator; 0 leaves it to ONNX Runtime or OpenVINO.
        spin: whether ONNX Runtime's idle threads wait for work by spinning. That answers a lone caller soonest; where
            several threads call the sessions, as in a server, it takes cores from them.

    Raises:
        UnavailableError: the provider is not there or did not start, or the bundle has no engine for this machine.
            Nothing else is used in its place.
        BundleError: a file is not the graph that the manifest describes.
    """
    chosen = find_provider(provider)
    if chosen.flavor:
        from qpert.runtime.sessions.tensorrt.session import open_engine_sessions

        return dict(open_engine_sessions(bundle, FLAVORS[chosen.flavor]))
    sessions: dict[str, Session] = {}
    try:
        for name, graph in bundle.manifest.graphs.items():
            sessions[name] = open_session(bundle.graph_path(graph), graph, provider, threads=threads, spin=spin)
    except BaseException:
        for session in sessions.values():
            session.close()
        raise
    return sessions


def open_host_graph(bundle: Bundle, role: str) -> Session | None:
    """The graph of one of `roles.HOST_ROLES` in ONNX Runtime on the CPU; None where the bundle has none.

    Nothing else opens it: the runtime computes the same in Python.

    Raises:
        UnavailableError: ONNX Runtime is not installed.
        BundleError: the file is not the graph that the manifest describes.
    """
    spec = bundle.manifest.find(role)
    return None if spec is None else open_session(bundle.graph_path(spec), spec, "cpu")


def open_session(path: Path, spec: GraphSpec, provider: str = "cpu", *, threads: int = 0, spin: bool = True) -> Session:
    """Open one ONNX file on exactly the provider that was asked for: `cpu`, `cuda` or `openvino`.

    Raises:
        UnavailableError: the provider is not there or did not start. Nothing else is used in its place.
        BundleError: the file is not the graph that `spec` describes.
        InputError: the provider runs engines.
    """
    chosen = find_provider(provider)
    if chosen.flavor:
        raise InputError(
            f"provider {provider!r} runs the engines of a bundle, not {path}; open the bundle with it",
            code="provider-needs-bundle",
        )
    if chosen.openvino:
        from qpert.runtime.sessions.openvino import OpenVinoSession

        return OpenVinoSession.open(path, spec, chosen, threads=threads)
    from qpert.runtime.sessions.onnx import OnnxRuntimeSession

    return OnnxRuntimeSession.open(path, spec, chosen, threads=threads, spin=spin)
