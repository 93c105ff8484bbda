"""The routes under `/v1/images`: the gallery's pictures, added, deleted, listed and shown."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from qpert.runtime.errors import InputError
from qpert.runtime.filters.metadata import checked_metadata
from qpert.runtime.inputs.images import load_image
from qpert.runtime.serving import schemas
from qpert.runtime.serving.errors import RequestError
from qpert.runtime.serving.gallery import AddRequest, DeleteRequest, Upload, check_name, require_gallery
from qpert.runtime.serving.openapi import described
from qpert.runtime.serving.pictures import boxes_of, open_picture
from qpert.runtime.serving.requests import (
    Form,
    RawPicture,
    check_count,
    deadline_of,
    in_order,
    is_form,
    picture_bytes,
    read_json,
    service_of,
    until_gone,
)
from qpert.runtime.serving.service import Service

router = APIRouter()


@dataclass(frozen=True, eq=False)
class NewPicture:
    """One picture of a request to add some."""

    raw: RawPicture
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]


THUMBNAIL = 480
"""Pixels of the longer side of a thumbnail."""
PAGE = 1_000
"""Names that one call of `GET /v1/images` gives at most."""


@router.post("/v1/images", **described(schemas.ImagesAnswer, schemas.ImagesRequest, form="images"))
async def add_images(request: Request) -> Response:
    """Add pictures to the gallery: all of the request's, on the disk before the answer, or none of them."""
    service = service_of(request)
    require_gallery(service.gallery)
    if is_form(request):
        form = await Form.read(request, service)
        form.check_fields(("image", "boxes", "captions", "metadata", "replace"))
        files = form.files("image")
        boxes = form.boxes(len(files))
        captions, metadata = captions_of(form, len(files)), metadata_of(form, len(files))
        new = [
            NewPicture(RawPicture(data, own, name), tuple(texts), values)
            for (name, data), own, texts, values in zip(files, boxes, captions, metadata, strict=True)
        ]
        replace = form.field("replace", "false").lower() in ("true", "1")
    else:
        wanted = await read_json(request, schemas.ImagesRequest)
        new = [
            NewPicture(RawPicture(one.image, one.boxes, one.name), tuple(one.captions), one.metadata)
            for one in wanted.images
        ]
        replace = wanted.replace
    check_count(len(new), service)
    return await until_gone(request, add(service, new, replace))


def captions_of(form: Form, count: int) -> list[list[str]]:
    """The form field `captions`: JSON, a list of texts for each picture."""
    with suppress(ValueError):
        values = json.loads(form.field("captions", "null"))
        if values is None:
            return [[] for _ in range(count)]
        fits = isinstance(values, list) and len(values) == count and all(isinstance(one, list) for one in values)
        if fits and all(isinstance(text, str) for one in values for text in one):
            return values  # type: ignore[no-any-return]
    raise RequestError(
        f"captions are no JSON list of {count} lists of texts; expected one list for each picture",
        code="request-invalid",
        status=422,
    )


def metadata_of(form: Form, count: int) -> list[dict[str, Any]]:
    """The form field `metadata`: JSON, an object for each picture."""
    with suppress(ValueError):
        values = json.loads(form.field("metadata", "null"))
        if values is None:
            return [{} for _ in range(count)]
        if isinstance(values, list) and len(values) == count and all(isinstance(one, dict) for one in values):
            return values
    raise RequestError(
        f"metadata are no JSON list of {count} objects; expected one for each picture",
        code="request-invalid",
        status=422,
    )


async def add(service: Service, new: Sequence[NewPicture], replace: bool) -> Response:
    deadline = deadline_of(service)
    names = [check_name(one.raw.name) for one in new]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"the request gives {len(twice)} names twice, such as {twice[0]!a}; each picture needs a name of its own",
            code="image-names-repeated",
        )
    new = [dataclasses.replace(one, metadata=checked_metadata(one.metadata, one.raw.name)) for one in new]
    captions = [text for one in new for text in one.captions]
    if captions:
        check_count(len(captions), service)
        await service.tokenize(captions)

    async def upload(one: NewPicture) -> Upload:
        data = await picture_bytes(one.raw, service)
        return await service.help(lambda: checked_upload(service, data, one))

    uploads = await in_order([upload(one) for one in new])
    change = await service.change(AddRequest(tuple(uploads), replace), deadline)
    counts = {name: getattr(change, name) for name in ("added", "replaced", "unchanged", "images")}
    return JSONResponse(counts)


def checked_upload(service: Service, data: bytes, new: NewPicture) -> Upload:
    """In a helper: found to be a picture whose boxes are right, before it comes near the gallery."""
    raw = new.raw
    image = open_picture(data, raw.name, service.limits)
    (boxes,) = service.encoder.check_boxes(1, [boxes_of(raw.boxes, image.size, raw.name)])
    return Upload(raw.name, data, boxes, new.captions, new.metadata)


@router.delete("/v1/images/{name:path}", **described(schemas.DeletedAnswer))
async def delete_image(request: Request, name: str) -> Response:
    """Take a picture out of the gallery; durable before the answer. `qpert index --compact` gives its space back."""
    service = service_of(request)
    require_gallery(service.gallery)
    change = await service.change(DeleteRequest(name), deadline_of(service))
    return JSONResponse({"deleted": change.deleted, "images": change.images})


@router.get("/v1/images", **described(schemas.Listing))
async def list_images(request: Request, offset: int = 0, limit: int = 100) -> Response:
    """Names of the gallery's pictures, in the order in which they were added."""
    service = service_of(request)
    gallery = require_gallery(service.gallery)
    if offset < 0 or not 1 <= limit <= PAGE:
        raise RequestError(
            f"offset is {offset} and limit {limit}; expected 0 or more, and 1 to {PAGE}",
            code="request-invalid",
            status=422,
        )
    listed = await service.help(lambda: {"images": gallery.names(offset, limit), "total": gallery.count()})
    return JSONResponse(listed)


@router.get("/v1/images/{name:path}", **described(schemas.GalleryPicture))
async def show_image(request: Request, name: str) -> Response:
    """One picture of the gallery, small, with its boxes in pixels of the full picture."""
    service = service_of(request)
    gallery = require_gallery(service.gallery)

    def read() -> dict[str, Any]:
        shown = gallery.image(name)
        if shown is None:
            raise RequestError(f"the gallery has no picture named {name!a}", code="gallery-image-unknown", status=404)
        image, boxes = load_image(shown.path, name=name), shown.boxes
        width, height = image.size
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=85)
        return {
            "image": name,
            "width": width,
            "height": height,
            "boxes": None if boxes is None else boxes.xyxy.tolist(),
            "captions": list(shown.captions),
            "metadata": dict(shown.metadata),
            "thumbnail": "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii"),
        }

    return JSONResponse(await service.help(read))
