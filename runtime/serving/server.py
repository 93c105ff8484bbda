"""Starting and stopping: uvicorn around the application."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from qpert.runtime.errors import UnavailableError
from qpert.runtime.serving.app import create_app
from qpert.runtime.serving.settings import Settings

GRACE_SECONDS = 5.0
"""After the deadline of the last request, before the server stops waiting for it."""
KEEP_ALIVE_SECONDS = 30
BACKLOG = 2048


class Server(uvicorn.Server):
    """Ends with exit code 0 when asked to end, once the requests that it has are answered."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal does not wait."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    `say` gets a line when the address is bound.

    Raises:
        UnavailableError: the address cannot be bound (`serve-address`).
        QpertError: the bundle or the gallery cannot be opened.
    """
    sockets = [bound(settings)]
    server: Server
    app = create_app(settings, stop=lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.limits.seconds + GRACE_SECONDS),
        h11_max_incomplete_event_size=1 << 16,
    )
    server = Server(config)
    host, port = sockets[0].getsockname()[:2]
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server.run(sockets=sockets)
    failure = app.state.qpert.failure
    if failure is not None:
        raise failure


def bound(settings: Settings) -> socket.socket:
    """A listening socket; port 0 is any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        if sys.platform != "win32":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)  # from here on clients wait instead of being refused
    except OSError as error:
        raise UnavailableError(
            f"{settings.host}:{settings.port} cannot be bound ({error.strerror or error}); choose another "
            "--port or --host",
            code="serve-address",
        ) from error
    return found
