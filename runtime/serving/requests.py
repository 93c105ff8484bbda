"""Reading requests: JSON or a form to a checked model, pictures to what the tower takes, and clients that go away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from qpert.runtime.errors import LimitError
from qpert.runtime.serving.errors import BusyError, RequestError
from qpert.runtime.serving.fetching import SCHEMES, Fetcher
from qpert.runtime.serving.interruption import Interruption
from qpert.runtime.serving.pictures import Corners, Picture, corners_from_json, decode_base64, prepare
from qpert.runtime.serving.schemas import PictureInput
from qpert.runtime.serving.service import Service
from qpert.runtime.serving.state import State

Model = TypeVar("Model", bound=BaseModel)
CLIENT_GONE = 499
"""The status in the metrics of requests whose client has gone; nobody receives it."""
SHOWN_ERRORS = 3
LONG_BODY = 1 << 20
"""Bytes from which on a body is read in a thread: others are answered meanwhile."""
PART_BYTES = 1 << 20
"""Of a form's text field."""


def state_of(request: Request) -> State:
    """What the application holds."""
    state: State = request.app.state.qpert
    return state


def service_of(request: Request) -> Service:
    """Raises BusyError while the bundle is being loaded, and when the service is about to stop."""
    state = state_of(request)
    if state.service is None or state.is_stopping:
        raise BusyError(f"the service is not ready: {state.trouble}; try again", code="not-ready")
    return state.service


def deadline_of(service: Service) -> float:
    return time.monotonic() + service.limits.seconds


class RawPicture:
    """A picture of a request, not yet decoded: `source` is what JSON held, or the bytes of a form's file."""

    def __init__(self, source: str | bytes, boxes: Corners | None, name: str) -> None:
        self.source, self.boxes, self.name = source, boxes, name


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as a `model`.

    Raises:
        RequestError: 400 where it is not JSON, 422 where it is not what is expected; the message names the place and
            never repeats what was sent.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", ""):
        raise RequestError(
            f"the body is {kind!a}, expected application/json (or multipart/form-data where pictures are sent)",
            code="content-type",
            status=400,
        )
    body = await request.body()
    try:
        if len(body) > LONG_BODY:
            return await asyncio.to_thread(model.model_validate_json, body)
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if any(problem["type"] == "json_invalid" for problem in problems):
            raise RequestError(
                f"the body is not JSON: {problems[0]['msg']}; expected an object as /openapi.json describes it",
                code="json-invalid",
                status=400,
            ) from None
        places = ["; ".join(f"{place(problem['loc'])}: {problem['msg']}" for problem in problems[:SHOWN_ERRORS])]
        more = f" (and {len(problems) - SHOWN_ERRORS} more)" if len(problems) > SHOWN_ERRORS else ""
        raise RequestError(
            f"the request is not as expected: {places[0]}{more}; /openapi.json describes it",
            code="request-invalid",
            status=422,
        ) from None


def place(location: Sequence[int | str]) -> str:
    """Where in a request something is: `input.0.boxes`."""
    return ".".join(map(str, location)) or "the body"


class Form:
    """A `multipart/form-data` body: files and fields by name, in order."""

    def __init__(self, parts: Sequence[tuple[str, str | bytes, str]]) -> None:
        """`parts`: (field, text or a file's bytes, the file's name)."""
        self.parts = parts

    @classmethod
    async def read(cls, request: Request, service: Service) -> Form:
        """Raises RequestError (400) for what is no such form, LimitError for a file that is too long."""
        most = service.limits.inputs
        async with request.form(max_files=most, max_fields=3 * most + 8, max_part_size=PART_BYTES) as form:
            parts: list[tuple[str, str | bytes, str]] = []
            for field, value in form.multi_items():
                if isinstance(value, UploadFile):
                    parts.append((field, await value.read(), value.filename or ""))
                else:
                    parts.append((field, value, ""))
        return cls(parts)

    def field(self, name: str, default: str) -> str:
        """The last text of that name."""
        return next(
            (value for field, value, _ in reversed(self.parts) if field == name and isinstance(value, str)), default
        )

    def files(self, name: str) -> list[tuple[str, bytes]]:
        """(file name, bytes) of that field."""
        return [(file, value) for field, value, file in self.parts if field == name and isinstance(value, bytes)]

    def boxes(self, count: int) -> list[Corners | None]:
        """Of each of `count` pictures its boxes, from the field `boxes`. Raises BoxError, RequestError."""
        text = self.field("boxes", "")
        if not text:
            return [None] * count
        given = corners_from_json(text, "boxes")
        if len(given) != count:
            raise RequestError(
                f"boxes are given for {len(given)} pictures, and {count} pictures; give one list (or null) each",
                code="boxes-count",
                status=422,
            )
        return given

    def check_fields(self, known: Sequence[str]) -> None:
        """Raises RequestError for a field that nobody reads."""
        if unknown := sorted({field for field, *_ in self.parts} - set(known)):
            raise RequestError(
                f"the form has the fields {', '.join(map(ascii, unknown))}; expected {', '.join(known)}",
                code="request-invalid",
                status=422,
            )


def raw_inputs(inputs: Sequence[str | PictureInput], name: str) -> list[str | RawPicture]:
    """Texts as they are; pictures with a name for messages."""
    return [
        value if isinstance(value, str) else RawPicture(value.image, value.boxes, f"{name} {index}")
        for index, value in enumerate(inputs)
    ]


def check_count(count: int, service: Service) -> None:
    """Raises LimitError, or RequestError for none at all."""
    most = service.limits.inputs
    if count > most:
        raise LimitError(
            f"the request has {count} texts and pictures, expected at most {most}; send several requests",
            code="request-inputs",
        )
    if not count:
        raise RequestError(
            "the request has no text and no picture, expected at least one", code="no-inputs", status=422
        )


def is_url(source: str) -> bool:
    return source[:12].partition("://")[0].lower() in SCHEMES


async def picture_bytes(raw: RawPicture, service: Service) -> bytes:
    """The file's bytes, fetched where a URL is given. Raises ImageError."""
    source = raw.source
    if isinstance(source, bytes):
        return source
    if is_url(source):
        fetcher = Fetcher(service.settings.url_hosts, service.limits)
        return await service.fetch(lambda: fetcher.fetch(source, raw.name))
    return await service.help(lambda: decode_base64(source, raw.name, service.limits))


async def pictures_of(raws: Sequence[RawPicture], service: Service) -> list[Picture]:
    """Decoded, checked and preprocessed. Raises the first error in order; names say which picture it is."""

    encoder, limits, detector = service.encoder, service.limits, service.detector

    async def one(raw: RawPicture) -> Picture:
        if isinstance(raw.source, str) and not is_url(raw.source):
            source = raw.source  # base64: read and decoded in one go
            return await service.help(lambda: prepared(decode_base64(source, raw.name, limits), raw))
        data = await picture_bytes(raw, service)
        return await service.help(lambda: prepared(data, raw))

    def prepared(data: bytes, raw: RawPicture) -> Picture:
        return prepare(data, raw.boxes, raw.name, encoder, limits, detector)

    return await in_order([one(raw) for raw in raws])


async def in_order(tasks: Sequence[Awaitable[Any]]) -> list[Any]:
    """All results; where some fail, the first failure by place, after the others have ended."""
    if len(tasks) == 1:
        return [await tasks[0]]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def until_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer; where the client goes before, the work is cancelled: what waits in the queue leaves it."""
    interruption = Interruption()
    gone = asyncio.ensure_future(client_gone(request.receive))
    gone.add_done_callback(interruption.interrupt)
    try:
        with interruption:
            return await work
    finally:
        gone.cancel()
    return Response(status_code=CLIENT_GONE)


async def client_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
