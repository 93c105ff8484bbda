"""What a forked child may do with what its parent had open.

`os.fork` copies the memory of a process and none of its threads. A session of ONNX Runtime in the child still waits for
its threads when it is destroyed, which hangs or crashes; CUDA does not work at all; SQLite would undo the transaction
that the parent is in the middle of. So nothing that was inherited is used or destroyed in a child: objects notice that
they are in another process, and open anew or say what to do. What was inherited costs no memory until it is written to.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol, TypeVar

from qpert.runtime.errors import UnavailableError

Kept = TypeVar("Kept")


class Inherited(Protocol):
    """Something that must be notified when it is used in a forked child."""

    def after_fork(self) -> None: ...


_kept: weakref.WeakSet[object] = weakref.WeakSet()
_told: weakref.WeakSet[Inherited] = weakref.WeakSet()


def keep_in_children(resource: Kept) -> Kept:
    """Returns `resource`, which will never be destroyed in a process that is forked from this one."""
    _kept.add(resource)
    return resource


def tell_after_fork(holder: Inherited) -> None:
    """Call `holder.after_fork()` in every process that is forked from this one, before anything else runs there."""
    _told.add(holder)


def abandon(resource: object) -> None:
    """Never destroy `resource`, not even at the end of the process: one reference more than anybody holds."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(resource))


def gpu_forked_error() -> UnavailableError:
    """The error of everything on a GPU that a forked child tries to use."""
    return UnavailableError(
        "this process was forked from the one that opened the bundle, and CUDA does not work in a forked process; open "
        "the bundle in this process, or start processes with the method 'spawn' (multiprocessing, torch DataLoader) or "
        "without preloading (gunicorn)",
        code="forked-gpu",
    )


def _in_child() -> None:
    for resource in list(_kept):
        abandon(resource)
    for holder in list(_told):
        holder.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_in_child)
