"""The routes under `/v1`, `/health` and `/metrics`."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from qpert.runtime.bundle.roles import IMAGE_VECTORS, QUERY_HEAD
from qpert.runtime.errors import InputError, QpertError
from qpert.runtime.inputs.images import load_image
from qpert.runtime.retrieval.scores import ranking
from qpert.runtime.serving import schemas
from qpert.runtime.serving.errors import BusyError, RequestError
from qpert.runtime.serving.gallery import AddRequest, DeleteRequest, Upload, check_name, require_gallery
from qpert.runtime.serving.metrics import CONTENT_TYPE
from qpert.runtime.serving.openapi import described
from qpert.runtime.serving.pictures import boxes_of, open_picture
from qpert.runtime.serving.requests import (
    Form,
    RawPicture,
    check_count,
    in_order,
    is_form,
    picture_bytes,
    pictures_of,
    raw_inputs,
    read_json,
    until_gone,
)
from qpert.runtime.serving.service import Service
from qpert.runtime.serving.state import State

router = APIRouter()
THUMBNAIL = 480
"""Pixels of the longer side of a thumbnail."""
PAGE = 1_000
"""Names that one call of `GET /v1/images` gives at most."""


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


def check_model(service: Service, model: str | None) -> None:
    """Raises RequestError for the name of another model: nothing is silently put in its place."""
    if model not in (None, service.name):
        raise RequestError(
            f"the model {model!a} is not served here, expected {service.name} or none", code="model-unknown", status=404
        )


@router.post("/v1/embeddings", **described(schemas.EmbeddingsAnswer, schemas.EmbeddingsRequest, form="embeddings"))
async def embeddings(request: Request) -> Response:
    """Encode texts to [E] numbers each, and pictures (with the boxes of their objects) to [Q][E] numbers each."""
    service = service_of(request)
    encoding = "float"
    inputs: list[str | RawPicture]
    if is_form(request):
        form = await Form.read(request, service)
        form.check_fields(("input", "boxes", "encoding_format", "model"))
        boxes = iter(form.boxes(len(form.files("input"))))
        given = [(value, file) for field, value, file in form.parts if field == "input"]
        inputs = [
            value if isinstance(value, str) else RawPicture(value, next(boxes), file or f"input {index}")
            for index, (value, file) in enumerate(given)
        ]
        encoding, model = form.field("encoding_format", "float"), form.field("model", "") or None
        if encoding not in ("float", "base64"):
            raise RequestError(
                f"encoding_format is {encoding!a}; expected float or base64", code="request-invalid", status=422
            )
    else:
        wanted = await read_json(request, schemas.EmbeddingsRequest)
        several = wanted.input if isinstance(wanted.input, list) else [wanted.input]
        inputs, encoding, model = raw_inputs(several, "input"), wanted.encoding_format, wanted.model
    check_model(service, model)
    check_count(len(inputs), service)
    return await until_gone(request, embed(service, inputs, encoding))


async def embed(service: Service, inputs: Sequence[str | RawPicture], encoding: str) -> Response:
    deadline = deadline_of(service)
    texts = [value for value in inputs if isinstance(value, str)]
    raws = [value for value in inputs if isinstance(value, RawPicture)]
    tokens = await service.tokenize(texts)  # a bad text is refused before a picture is decoded
    pictures = await pictures_of(raws, service)
    text_vectors, features = await in_order(
        [
            service.encode_texts(tokens, deadline) if texts else nothing(),
            service.encode_pictures(pictures, deadline) if pictures else nothing(),
        ]
    )
    vectors_of_texts, vectors_of_pictures = iter(text_vectors), (one.query_embeds[0] for one in features)
    vectors = [next(vectors_of_texts if isinstance(value, str) else vectors_of_pictures) for value in inputs]

    def answer() -> Response:
        data = [{"object": "embedding", "index": index, **encoded(one, encoding)} for index, one in enumerate(vectors)]
        return JSONResponse({"object": "list", "model": service.name, "data": data})

    return await service.help(answer) if pictures else answer()  # a picture's vectors are thousands of numbers


async def nothing() -> list[Any]:
    return []


def encoded(vector: np.ndarray, encoding: str) -> dict[str, Any]:
    """Numbers for JSON. As floats, JSON keeps every bit: float32 is exact in the decimal digits that are written."""
    if encoding == "float":
        return {"embedding": vector.tolist()}
    data = base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")
    return {"embedding": data, "shape": list(vector.shape)}


@router.post("/v1/rerank", **described(schemas.RerankAnswer, schemas.RerankRequest))
async def rerank(request: Request) -> Response:
    """Score a text with pictures, or a picture with texts, pair by pair; the best first."""
    service = service_of(request)
    wanted = await read_json(request, schemas.RerankRequest)
    check_model(service, wanted.model)
    documents = raw_inputs(wanted.documents, "document")
    (query,) = raw_inputs([wanted.query], "query")
    check_count(len(documents) + 1, service)
    if any(isinstance(document, str) == isinstance(query, str) for document in documents):
        raise RequestError(
            "the documents are of the query's kind; expected pictures for a text, or texts for a picture",
            code="rerank-kinds",
            status=422,
        )
    return await until_gone(request, ranked(service, query, documents, wanted.top_n))


async def ranked(
    service: Service, query: str | RawPicture, documents: Sequence[str | RawPicture], top_n: int | None
) -> Response:
    deadline = deadline_of(service)
    await service.tokenize([one for one in (query, *documents) if isinstance(one, str)])
    pictures = iter(await pictures_of([one for one in (query, *documents) if isinstance(one, RawPicture)], service))
    scored_query = query if isinstance(query, str) else next(pictures)
    scored = [one if isinstance(one, str) else next(pictures) for one in documents]
    scores = await service.rerank(scored_query, scored, deadline)
    results = [{"index": int(index), "relevance_score": float(scores[index])} for index in ranking(scores)[:top_n]]
    return JSONResponse({"results": results})


@router.post("/v1/search", **described(schemas.SearchAnswer, schemas.SearchRequest))
async def search(request: Request) -> Response:
    """The gallery's best pictures for a text, or its best captions for a picture: as `qpert search --json`."""
    service = service_of(request)
    require_gallery(service.gallery)
    wanted = await read_json(request, schemas.SearchRequest)
    most = service.limits.results
    if (wanted.text is None) == (wanted.image is None) or (wanted.boxes is not None and wanted.image is None):
        raise RequestError(
            "expected either a text, or an image (and perhaps its boxes)", code="search-query", status=422
        )
    if max(wanted.k, wanted.rerank or 0) > most:
        raise RequestError(
            f"k is {wanted.k} and rerank {wanted.rerank}, expected at most {most} each",
            code="search-results",
            status=413,
        )
    return await until_gone(request, find(service, wanted))


async def find(service: Service, wanted: schemas.SearchRequest) -> Response:
    deadline, hits = deadline_of(service), list[Any]()
    if wanted.text is not None:
        query = wanted.text
        hits += await service.search(wanted.text, wanted.k, wanted.rerank, deadline)
    else:
        query = "image"
        (picture,) = await pictures_of([RawPicture(wanted.image or "", wanted.boxes, "image")], service)
        hits += await service.search_captions(picture, wanted.k, wanted.rerank, deadline)
    return JSONResponse({"query": query, "hits": [dataclasses.asdict(hit) for hit in hits]})


@router.post("/v1/images", **described(schemas.ImagesAnswer, schemas.ImagesRequest, form="images"))
async def add_images(request: Request) -> Response:
    """Add pictures to the gallery: all of the request's, on the disk before the answer, or none of them."""
    service = service_of(request)
    require_gallery(service.gallery)
    if is_form(request):
        form = await Form.read(request, service)
        form.check_fields(("image", "boxes", "captions", "replace"))
        files = form.files("image")
        boxes = form.boxes(len(files))
        captions = captions_of(form, len(files))
        new = [
            (RawPicture(data, own, name), tuple(texts))
            for (name, data), own, texts in zip(files, boxes, captions, strict=True)
        ]
        replace = form.field("replace", "false").lower() in ("true", "1")
    else:
        wanted = await read_json(request, schemas.ImagesRequest)
        new = [(RawPicture(one.image, one.boxes, one.name), tuple(one.captions)) for one in wanted.images]
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


async def add(service: Service, new: Sequence[tuple[RawPicture, tuple[str, ...]]], replace: bool) -> Response:
    deadline = deadline_of(service)
    names = [check_name(raw.name) for raw, _ in new]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"the request gives {len(twice)} names twice, such as {twice[0]!a}; each picture needs a name of its own",
            code="image-names-repeated",
        )
    captions = [text for _, texts in new for text in texts]
    if captions:
        check_count(len(captions), service)
        await service.tokenize(captions)

    async def upload(raw: RawPicture, texts: tuple[str, ...]) -> Upload:
        data = await picture_bytes(raw, service)
        return await service.help(lambda: checked_upload(service, data, raw, texts))

    uploads = await in_order([upload(raw, texts) for raw, texts in new])
    change = await service.change(AddRequest(tuple(uploads), replace), deadline)
    counts = {name: getattr(change, name) for name in ("added", "replaced", "unchanged", "images")}
    return JSONResponse(counts)


def checked_upload(service: Service, data: bytes, raw: RawPicture, captions: tuple[str, ...]) -> Upload:
    """In a helper: found to be a picture whose boxes are right, before it comes near the gallery."""
    image = open_picture(data, raw.name, service.limits)
    (boxes,) = service.encoder.check_boxes(1, [boxes_of(raw.boxes, image.size, raw.name)])
    return Upload(raw.name, data, boxes, captions)


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
    names = (await service.help(gallery.current)).images.images
    return JSONResponse({"images": names[offset : offset + limit], "total": len(names)})


@router.get("/v1/images/{name:path}", **described(schemas.GalleryPicture))
async def show_image(request: Request, name: str) -> Response:
    """One picture of the gallery, small, with its boxes in pixels of the full picture."""
    service = service_of(request)
    gallery = require_gallery(service.gallery)

    def read() -> dict[str, Any]:
        images = gallery.current().images
        if name not in images.images:
            raise RequestError(f"the gallery has no picture named {name!a}", code="gallery-image-unknown", status=404)
        row = images.images.index(name)
        image, boxes = load_image(images.paths[row], name=name), images.boxes_of(row)
        texts = [text for text, owner in zip(images.texts, images.image_of_text, strict=True) if owner == row]
        width, height = image.size
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=85)
        return {
            "image": name,
            "width": width,
            "height": height,
            "boxes": None if boxes is None else boxes.xyxy.tolist(),
            "captions": texts,
            "thumbnail": "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii"),
        }

    return JSONResponse(await service.help(read))


@router.get("/v1/models", **described(schemas.ModelList))
async def models(request: Request) -> Response:
    """The one model that is served, in the form that OpenAI's clients list."""
    service = service_of(request)
    manifest, gallery = service.encoder.manifest, service.gallery
    _, queries, width = manifest.query_head.output(IMAGE_VECTORS).shape
    takes_boxes = manifest.query_head.takes_boxes
    model = {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "qpert",
        "family": manifest.family,
        "checkpoint": manifest.checkpoint.name,
        "precision": manifest.precision,
        "vectors": queries,
        "width": width,
        "boxes": service.encoder.limit(QUERY_HEAD, "O") if takes_boxes else 0,
        "reranks": service.encoder.reranks,
        "gallery": None if gallery is None else len((await service.help(gallery.current)).images),
    }
    return JSONResponse({"object": "list", "data": [model]})


@router.get("/health/live")
async def live() -> Response:
    """200 as long as the process answers at all."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 where requests will be answered now; else 503 and why not."""
    trouble = state_of(request).trouble
    if trouble is not None:
        return JSONResponse({"status": "not ready", "reason": trouble}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    state = state_of(request)
    state.metrics.ready.set(state.trouble is None)
    if state.service is not None:
        state.metrics.waiting.set(state.service.scheduler.waiting_rows)
        gallery = state.service.gallery
        with suppress(QpertError, OSError):  # a gallery that cannot be read is no reason to hide the other figures
            state.metrics.images.set(0 if gallery is None else len((await state.service.help(gallery.current)).images))
    return Response(state.metrics.text(), media_type=CONTENT_TYPE)
