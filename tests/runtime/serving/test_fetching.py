"""Pictures by URL: from named hosts, from the internet's addresses, and no further than that."""

from __future__ import annotations

import ipaddress
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qpert.runtime.errors import ImageError
from qpert.runtime.serving.fetching import Fetcher, is_public
from qpert.runtime.serving.settings import Limits

LIMITS = Limits(picture_bytes=1_000)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *((text, True) for text in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34")),
        *((text, False) for text in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((text, False) for text in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1")),
        *((text, False) for text in ("::1", "::", "fe80::1", "fd00::1", "ff02::1")),
        # IPv4 inside IPv6: mapped, 6to4 of 10.1.2.3, NAT64 of 169.254.169.254, Teredo of a private client
        *((text, False) for text in ("::ffff:127.0.0.1", "2002:0a01:0203::1", "64:ff9b::a9fe:a9fe")),
        ("2001:0000:4136:e378:8000:63bf:f5fe:fdfc", False),
    ],
)
def test_which_addresses_are_the_internets(address, expected):
    assert is_public(ipaddress.ip_address(address)) is expected


class Host(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
        elif self.path.startswith("/picture?size=3"):
            self.answer(b"abc")
        elif self.path == "/announced":
            self.answer(b"x" * 2_000)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(10):
                self.wfile.write(b"x" * 500)
        else:
            self.send_error(404)

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def everywhere(address):
    """A host on this machine stands in for one of the internet."""
    return True


def test_a_named_host_gives_its_bytes(host):
    fetcher = Fetcher(("localhost",), LIMITS, permits=everywhere)
    assert fetcher.fetch(f"http://localhost:{host}/picture?size=3", "input 0") == b"abc"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/elsewhere", "url-failed"),
        ("/nothing", "url-failed"),
        ("/announced", "picture-bytes"),
        ("/endless", "picture-bytes"),
    ],
)
def test_a_host_that_answers_otherwise(host, path, code):
    with pytest.raises(ImageError, match=r"^input 0") as refused:
        Fetcher(("localhost",), LIMITS, permits=everywhere).fetch(f"http://localhost:{host}{path}", "input 0")
    assert refused.value.code == code


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_named_host_inside_the_network_is_refused_all_the_same(host, name):
    with pytest.raises(ImageError, match="not an address of the internet") as refused:
        Fetcher((name,), LIMITS).fetch(f"http://{name}:{host}/picture?size=3", "input 0")
    assert refused.value.code == "url-refused"


@pytest.mark.parametrize(
    "url",
    [
        *("http://other.example/a.jpg", "ftp://localhost/a", "http://localhost.other.example/a"),
        *("http://user@localhost/a", "http://localhost@other.example/a", "http:///a", "http://[::1/a"),
    ],
)
def test_hosts_that_are_not_named_are_not_asked(url):
    with pytest.raises(ImageError) as refused:
        Fetcher(("localhost",), LIMITS, permits=everywhere).fetch(url, "input 0")
    assert refused.value.code == "url-refused"


def test_a_host_that_does_not_listen_is_an_error_of_the_request():
    with pytest.raises(ImageError) as refused:
        Fetcher(("localhost",), LIMITS, permits=everywhere).fetch("http://localhost:9/a.jpg", "input 0")
    assert refused.value.code == "url-failed"
