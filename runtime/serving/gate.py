"""What every request passes before a route sees it: host, origin, token, room, and the length of its body.

Plain ASGI, so that a body is counted while it arrives and a refusal needs nothing of what follows.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from qpert.runtime.errors import QpertError
from qpert.runtime.serving.errors import RETRY_SECONDS, BusyError, RequestError, document_of, status_of
from qpert.runtime.serving.interruption import Interruption
from qpert.runtime.serving.metrics import Metrics
from qpert.runtime.serving.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token: the page, which holds no data, and what orchestrators ask. They take no room either."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
UNKNOWN_ROUTE = "other"


def refusal(error: QpertError, *, plain: bool = False) -> JSONResponse:
    """The answer that an error is. `plain`: the Open Inference Protocol's form, in which the error is a string."""
    headers = {}
    if (status := status_of(error)) == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": str(error)} if plain else document_of(error), status, headers)


def headers_of(scope: Scope) -> dict[str, str]:
    """By name in small letters; of several of one name, the first."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


class Gate:
    """Wraps the application. `active` counts requests that are being answered."""

    def __init__(self, app: Application, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.active = 0
        self.is_loopback = settings.is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        self.active += 1
        self.metrics.active.set(self.active)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self.check(scope)
                counted = self.counted(scope, receive, began)
            except QpertError as error:
                await refusal(error, plain=scope["path"].startswith("/v2"))(scope, receive, noting)
                return
            await self.app(scope, counted, noting)
        finally:
            self.active -= 1
            self.metrics.active.set(self.active)
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            method = scope["method"] if scope.get("route") is not None else "any"
            self.metrics.answered(route, method, status, time.perf_counter() - began)

    def check(self, scope: Scope) -> None:
        """Raises RequestError or BusyError for a request that may not go on."""
        headers = headers_of(scope)
        self.check_host(headers)
        self.check_origin(scope["method"], headers)
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        self.check_token(headers.get("authorization", ""))
        if self.active > self.settings.limits.requests:
            self.metrics.refused("requests")
            raise BusyError(
                f"{self.settings.limits.requests} requests are being answered, as many as this service takes; try "
                "again",
                code="too-many-requests",
            )

    def check_host(self, headers: Mapping[str, str]) -> None:
        """A service for this machine alone answers to this machine's names alone: a page of another site could make
        the browser call it by a name of its own that stands for 127.0.0.1 (DNS rebinding)."""
        if not self.is_loopback or "host" not in headers:  # browsers always say whom they call
            return
        host = urlsplit(f"//{headers['host']}").hostname or ""
        if host not in (*LOOPBACK_NAMES, self.settings.host, *self.settings.names):
            self.metrics.refused("origin")
            raise RequestError(
                f"the service was called as {host!a}, and answers to {', '.join(LOOPBACK_NAMES)}; behind a proxy that "
                "passes the name on, start it with --allow-host NAME",
                code="host-unknown",
                status=403,
            )

    def check_origin(self, method: str, headers: Mapping[str, str]) -> None:
        """Browsers let any page post forms to any address: only pages of this service and of allowed sites may."""
        origin = headers.get("origin")
        if method in SAFE_METHODS or origin is None or origin in self.settings.origins or "*" in self.settings.origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            self.metrics.refused("origin")
            raise RequestError(
                f"a page of {origin!a} may not call this service; start it with --cors {origin!a}",
                code="origin-refused",
                status=403,
            )

    def check_token(self, authorization: str) -> None:
        """Compared in a time that does not depend on how much of it is right."""
        if not self.settings.token:
            return
        scheme, _, given = authorization.partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.settings.token.encode())
        if scheme.lower() != "bearer" or not same:
            self.metrics.refused("token")
            raise RequestError(
                "the token is missing or wrong; send the header Authorization: Bearer TOKEN", code="token", status=401
            )

    def counted(self, scope: Scope, receive: Receive, began: float) -> Receive:
        """`receive`, which ends a body that is too long, or takes too long to arrive."""
        limits = self.settings.limits
        declared = headers_of(scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limits.body_bytes:
            raise self.too_long(int(declared))
        received, is_complete = 0, False

        async def receive_counted() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()  # waits for the client to go
            message: Message = {}
            interruption = Interruption()
            left = limits.seconds - (time.perf_counter() - began)
            late = asyncio.get_running_loop().call_later(max(0.001, left), interruption.interrupt)
            try:
                with interruption:
                    message = await receive()
            finally:
                late.cancel()
            if interruption.happened:
                raise self.too_slow()
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > limits.body_bytes:
                raise self.too_long(received)
            return message

        return receive_counted

    def too_slow(self) -> RequestError:
        self.metrics.refused("body")
        return RequestError(
            f"the body did not arrive within {self.settings.limits.seconds:.0f} s; send it faster, or less of it",
            code="body-timeout",
            status=408,
        )

    def too_long(self, count: int) -> RequestError:
        self.metrics.refused("body")
        return RequestError(
            f"the body has {count:,} bytes or more, expected at most {self.settings.limits.body_bytes:,}; send fewer "
            "or smaller pictures a request",
            code="body-bytes",
            status=413,
        )
