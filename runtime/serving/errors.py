"""Errors that only a service has, and the HTTP status of every error."""

from __future__ import annotations

from qpert.runtime.errors import BundleError, GalleryError, LimitError, QpertError, UnavailableError

RETRY_SECONDS = 1
"""What `Retry-After` advises: the queue is a few seconds deep at most."""


class RequestError(QpertError):
    """A request that is not what the service expects. `status` is its HTTP status."""

    code = "request"

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message, code=code)
        self.status = status


class BusyError(QpertError):
    """The service cannot answer now, and may be able to in a moment: 503 with `Retry-After`."""

    code = "busy"


STATUS_OF_CODE = {
    "gallery-image-unknown": 404,
    "gallery-locked": 503,
    "store-image-gone": 503,
    "serve-without-gallery": 404,
    "picture-bytes": 413,
    "boxes-limit": 413,
    "text-characters": 413,
}
"""Codes whose status is not that of their class."""


def status_of(error: QpertError) -> int:
    """400 malformed, 404 unknown, 413 over a limit, 422 cannot be used, 503 not now; 500 for what a client cannot help.

    Every other error of input is the request's: 422.
    """
    if isinstance(error, RequestError):
        return error.status
    if error.code in STATUS_OF_CODE:
        return STATUS_OF_CODE[error.code]
    if isinstance(error, LimitError):
        return 413
    if isinstance(error, BusyError | UnavailableError):
        return 503
    if isinstance(error, GalleryError):
        return 422 if error.code in REQUESTED_OF_GALLERY else 500
    if isinstance(error, BundleError):
        return 500
    return 422


REQUESTED_OF_GALLERY = frozenset(
    {
        "gallery-without-features",
        "gallery-without-texts",
        "image-changed",
        "image-names-repeated",
        "serve-without-pictures",
        "store-features",
    }
)
"""Errors of galleries that a request causes; the others say that the gallery itself is not right."""


def document_of(error: QpertError) -> dict[str, object]:
    """The body of an answer that is an error."""
    return {"error": {"code": error.code, "message": str(error)}}
