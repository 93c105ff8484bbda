"""The errors that qpert raises on purpose, and the exit code that each gives the command line.

Every message says what was got, what was expected, and what to do. Anything that is not a `QpertError` is a bug and
keeps its traceback.
"""

from __future__ import annotations


class QpertError(Exception):
    """Root of all errors that a caller can act on.

    `exit_code` is what the command line returns for it. `code` names the fault (`box-file-header`): it stays the same
    where the wording of the message changes, so programs and tests compare with it.
    """

    exit_code = 2
    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class InputError(QpertError):
    """An argument, a file or a value that cannot be used as given."""

    code = "input"


class ImageError(InputError):
    """An image that cannot be read or has a form that is not an image."""

    code = "image"


class BoxError(InputError):
    """Boxes that are not boxes: NaN, inverted, empty, outside, of an unknown image or in an unreadable file."""

    code = "box"


class TextError(InputError):
    """A text that cannot be tokenised, an empty one for instance."""

    code = "text"


class CheckpointError(InputError):
    """A checkpoint that is missing, unreadable, or does not hold the tensors that its architecture needs."""

    code = "checkpoint"


class BundleError(InputError):
    """A bundle that is incomplete, altered, unsafe, or of a schema that this version does not know."""

    code = "bundle"


class GalleryError(InputError):
    """A gallery that is damaged, locked, made by another bundle, or does not hold what was asked of it."""

    code = "gallery"


class LimitError(InputError):
    """More boxes, images or texts in one call than the bundle was exported for."""

    code = "limit"


class UnavailableError(QpertError):
    """This machine lacks what was asked for: a provider, a GPU, a library."""

    exit_code = 3
    code = "unavailable"


class QpertWarning(UserWarning):
    """Something that was changed or left out on the caller's behalf, such as a box clipped to its image."""
