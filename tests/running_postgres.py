"""A real PostgreSQL with pgvector, from the environment of `make postgres-env`, on loopback in a temporary folder.

PostgreSQL refuses to run as root; there it runs as `nobody`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
USER, PASSWORD = "qpert", "s3cret/p@ss"
WAIT = 120.0


def server_folder() -> Path:
    return Path(os.environ.get("QPERT_POSTGRES_ENV", ROOT / ".cache" / "postgres")) / "server"


def is_available() -> bool:
    return (server_folder() / "bin" / "postgres").is_file()


class Postgres:
    """`url` has the password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.account = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid} if os.getuid() == 0 else {}
        self.server = self._reachable(server_folder().resolve())
        (folder / "password").write_text(PASSWORD)
        if self.account:
            shutil.chown(folder, **self.account)
            shutil.chown(folder / "password", **self.account)
        (folder / "password").chmod(0o600)
        self._run("initdb", "-D", folder / "data", "-U", USER, "--pwfile", folder / "password", "-A", "scram-sha-256",
                  "--locale=C", "-E", "UTF8")  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        from urllib.parse import quote

        return f"postgresql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [
            self.server / "bin" / "postgres",
            "-D",
            self.folder / "data",
            "-p",
            str(self.port),
            "-k",
            self.folder,
        ]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([*command, "-h", "127.0.0.1"], stderr=log, stdout=log, cwd="/", **self.account)
        log.close()
        import psycopg

        end = time.monotonic() + WAIT
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.1)

    def stop(self) -> None:
        """At once, as a crash would: what was committed has to be there afterwards."""
        import signal

        if self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(WAIT)

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self.server / "bin" / program), *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, **self.account)
        if ran.returncode:
            raise RuntimeError(ran.stderr)

    def _reachable(self, server: Path) -> Path:
        """The server where its user may read it: a copy of it, where a folder above is private."""
        with contextlib.suppress(OSError):
            if not subprocess.run([server / "bin" / "postgres", "--version"], capture_output=True, cwd="/",
                                  check=False, **self.account).returncode:  # fmt: skip
                return server
        copy = shutil.copytree(server, self.folder / "server", symlinks=True)
        if self.account:
            for path in (self.folder, *self.folder.rglob("*")):
                if not path.is_symlink():
                    shutil.chown(path, **self.account)
        return Path(copy)


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="qpert-postgres-"))
    folder.chmod(0o755)
    server = None
    try:
        server = Postgres(folder)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
