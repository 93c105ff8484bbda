"""Where the command line meets the machine: its streams, and errors of the operating system.

An error caused by the machine (a full disk, a folder without write permission) becomes one line on stderr and exit
code 3. `MACHINE` lists them all: any other `OSError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sqlite3
import sys
from typing import Any, TextIO

from qpert.runtime.errors import QpertError, UnavailableError

BROKEN_PIPE = 128 + 13
"""The exit code when the reader of our results has gone (`qpert … | head -1`): that of a process ended by SIGPIPE."""

MACHINE: dict[int, str] = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "your quota there is used up: delete something, or choose another disk",
    errno.EFBIG: "the file system or `ulimit -f` allows no file of that size; choose another disk",
    errno.EROFS: "it is mounted read-only; choose another folder",
    errno.EACCES: "permission denied; ask its owner, or choose another path",
    errno.EPERM: "not permitted there; ask its owner, or choose another path",
    errno.EIO: "the disk reports an error; check the system log, and do not rely on that disk",
    errno.ESTALE: "the network file system lost it; mount it again",
    errno.ETIMEDOUT: "the network file system does not answer; mount it again",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; end other programs",
    errno.ENOMEM: "there is not enough memory; end other programs",
    errno.EAGAIN: "there are too many processes or threads; end other programs, or raise `ulimit -u`",
}
"""What to do about each error of the operating system that the machine causes."""

SQLITE: dict[str, int] = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EACCES,
    "unable to open database file": errno.EACCES,
    "disk I/O error": errno.EIO,
}
"""The same errors as SQLite words them (Python 3.10 has no codes for them)."""


def machine_error(error: BaseException) -> UnavailableError | None:
    """The error to show for one that the machine causes; None for any other, which is a bug."""
    number = errno_of(error)
    if number not in MACHINE:
        return None
    files = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    where = " and ".join(files) or (str(error) if isinstance(error, sqlite3.Error) else "a file of this command")
    return UnavailableError(
        f"{where}: {os.strerror(number)}; {MACHINE[number]}",
        code=f"os-{errno.errorcode[number].lower()}",
    )


def errno_of(error: BaseException | None) -> int:
    """The number of an error of the operating system, however it is wrapped; 0 for anything else."""
    if isinstance(error, OSError):
        if error.errno is None and " requested and " in str(error):  # NumPy's error for a full disk
            return errno.ENOSPC
        return error.errno or 0
    if isinstance(error, sqlite3.OperationalError):
        return next((number for text, number in SQLITE.items() if text in str(error)), 0)
    if error is not None and type(error).__name__ == "SafetensorError":  # from Rust: `IoError(Os { code: 28, …`
        return next((number for number in MACHINE if f"code: {number}," in str(error)), 0)
    return 0


def exit_code_of(error: QpertError) -> int:
    """The error's own code, but 3 if the machine does not let us read or write a file: that is not bad input."""
    return UnavailableError.exit_code if errno_of(error.__cause__) in MACHINE else error.exit_code


class ReaderGoneError(Exception):
    """The reader of our results has gone. Not an `OSError`, which libraries handle in their own ways."""


class Output(io.FileIO):
    """A standard stream. After a failed write it drops all output, so that Python can exit cleanly.

    Results that cannot be written are an error; progress that cannot be written is not.
    """

    def __init__(self, descriptor: int, *, results: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.results = results
        self.is_broken = False

    def write(self, data: Any, /) -> int:
        if not self.is_broken:
            try:
                return super().write(data) or 0
            except OSError as error:
                self.is_broken = True
                if self.results:
                    raise write_error(error) from error
        return len(memoryview(data).cast("B"))


def write_error(error: OSError) -> Exception:
    if error.errno == errno.EPIPE:
        return ReaderGoneError()
    return UnavailableError(
        f"the results cannot be written to standard output ({error.strerror}); the work itself is finished",
        code="stdout",
    )


def escape_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Escape what the terminal cannot encode (`\\u2026`); undecodable bytes of file names are written unchanged."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = ord(error.object[error.start])
    if 0xDC80 <= character <= 0xDCFF:
        return bytes([character - 0xDC00]), error.start + 1
    return codecs.backslashreplace_errors(error)[0], error.end


ESCAPED = "qpert-escaped"
codecs.register_error(ESCAPED, escape_unencodable)


def open_streams() -> None:
    """Make the standard streams safe, before anything else is opened.

    Raises:
        UnavailableError: standard output is closed, so a result could not be shown.
    """
    closed = [descriptor for descriptor in (0, 1, 2) if not is_open(descriptor)]
    for _ in closed:  # else the next file opened gets this number, and what libraries write to it
        os.open(os.devnull, os.O_RDWR)
    sys.stderr = guarded(sys.stderr, 2, results=False)
    if 1 in closed or sys.stdout is None:
        sys.stdout = guarded(None, 1, results=False)
        raise UnavailableError(
            "standard output is closed, so results cannot be shown; redirect it (`> FILE` or `> /dev/null`)",
            code="stdout-closed",
        )
    sys.stdout = guarded(sys.stdout, 1, results=True)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def guarded(stream: TextIO | None, descriptor: int, *, results: bool) -> TextIO:
    """A standard stream that escapes what it cannot encode and explains why it cannot be written."""
    if stream is not None and stream not in (sys.__stdout__, sys.__stderr__):
        return stream  # set by a program that calls `main`
    if os.name != "posix" and stream is not None:  # a console of Windows takes text, not bytes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)
        return stream
    encoding = "utf-8" if stream is None else stream.encoding
    raw = Output(descriptor, results=results)
    lines = raw.isatty() or not results
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, ESCAPED, line_buffering=lines)
