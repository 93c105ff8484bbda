"""Pictures by URL, from hosts that the operator named, and from nowhere inside the network."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from qpert.runtime.errors import ImageError
from qpert.runtime.serving.pictures import check_bytes
from qpert.runtime.serving.settings import Limits

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
SCHEMES = {"http": 80, "https": 443}
SECONDS = 10.0
"""For the whole fetch."""
CHUNK = 1 << 16


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's. IPv4 inside IPv6 (mapped, 6to4, Teredo, NAT64) is taken out first.

    Source: the IANA special-purpose address registries, as `ipaddress` keeps them.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if embedded := [one for one in inner if one is not None]:
            return all(map(is_public, embedded))
    return address.is_global and not address.is_multicast


class PinnedConnection(http.client.HTTPConnection):
    """Connects to an address that was checked, and not to what the name says a moment later."""

    def __init__(self, host: str, port: int, address: str, *, secure: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._address, self._secure = address, secure

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


@dataclass(frozen=True)
class Fetcher:
    """Fetches from `hosts` alone. `permits` decides about addresses."""

    hosts: tuple[str, ...]
    limits: Limits
    permits: Callable[[Address], bool] = is_public
    seconds: float = SECONDS

    def fetch(self, url: str, name: str) -> bytes:
        """The bytes behind a URL. Redirects are not followed.

        Raises:
            ImageError: of code `url-refused` where the host is not named, or lies inside the network; `url-failed`
                where it does not answer with a picture in time; `picture-bytes` where it answers with too much.
        """
        until = time.monotonic() + self.seconds
        parts = self._checked(url, name)
        secure, host = parts.scheme == "https", parts.hostname or ""
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            port = parts.port or SCHEMES[parts.scheme]
            address = self._address(host, port, name)
            connection = PinnedConnection(host, port, address, secure=secure, timeout=self.seconds)
            try:
                connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "qpert"})
                return self._body(connection, name, until)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
            raise ImageError(f"{name} cannot be fetched from {host}: {error!r}", code="url-failed") from error

    def _checked(self, url: str, name: str) -> SplitResult:
        """The parts of a URL that may be fetched."""
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ImageError(f"{name} is not a URL ({error}); send the picture itself", code="url-refused") from error
        if parts.hostname not in self.hosts or parts.scheme not in SCHEMES or parts.username is not None:
            named = ", ".join(self.hosts) or "none"
            raise ImageError(
                f"{name} is a URL that this service does not fetch (hosts allowed: {named}); send the picture itself, "
                "or have the service started with --allow-url HOST",
                code="url-refused",
            )
        return parts

    def _address(self, host: str, port: int, name: str) -> str:
        """The address to connect to: all that the name stands for have to be permitted."""
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        inside = [one for one in found if not self.permits(ipaddress.ip_address(one.partition("%")[0]))]
        if inside or not found:
            raise ImageError(
                f"{name}: {host} is not an address of the internet, and none inside the network is fetched from; send "
                "the picture itself",
                code="url-refused",
            )
        return found[0]

    def _body(self, connection: PinnedConnection, name: str, until: float) -> bytes:
        answer = connection.getresponse()
        if answer.status != 200:
            raise ImageError(
                f"{name}: the host answered {answer.status}, expected 200 (redirects are not followed)",
                code="url-failed",
            )
        check_bytes(int(answer.headers.get("Content-Length") or 0), name, self.limits)
        data = bytearray()
        while chunk := answer.read1(CHUNK):
            data += chunk
            check_bytes(len(data), name, self.limits)
            if time.monotonic() > until:
                raise ImageError(f"{name} was not sent within {self.seconds:.0f} s", code="url-failed")
        return bytes(data)
