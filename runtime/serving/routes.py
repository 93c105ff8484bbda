"""The routes under `/v1` (pictures of the gallery: `gallery_routes`), `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse

from qpert.runtime.bundle.roles import IMAGE_VECTORS, QUERY_HEAD
from qpert.runtime.errors import QpertError
from qpert.runtime.filters.parsing import as_condition
from qpert.runtime.retrieval.scores import ranking
from qpert.runtime.serving import schemas
from qpert.runtime.serving.answers import json_answer
from qpert.runtime.serving.errors import RequestError
from qpert.runtime.serving.gallery import require_gallery
from qpert.runtime.serving.metrics import CONTENT_TYPE
from qpert.runtime.serving.openapi import described
from qpert.runtime.serving.requests import (
    Form,
    RawPicture,
    check_count,
    deadline_of,
    in_order,
    is_form,
    pictures_of,
    raw_inputs,
    read_json,
    service_of,
    state_of,
    until_gone,
)
from qpert.runtime.serving.service import Service


class PlainRoute(APIRoute):
    """A route whose function takes the request and nothing else, so that it is called without FastAPI's search for what
    to pass: that takes longer than reading a text's request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


router = APIRouter(route_class=PlainRoute)
PROBE_SECONDS = 5.0
FIELDS = 20
"""Keys of metadata that are named."""


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
    work: list[Awaitable[Any]] = []
    if texts:
        work.append(service.encode_texts(tokens, deadline))
    if pictures:
        work.append(service.encode_pictures(pictures, deadline))
    results = await in_order(work)
    vectors_of_texts = iter(results[0] if texts else ())
    vectors_of_pictures = (one.query_embeds[0] for one in (results[-1] if pictures else ()))
    vectors = [next(vectors_of_texts if isinstance(value, str) else vectors_of_pictures) for value in inputs]

    def answer() -> Response:
        data = [{"object": "embedding", "index": index, **encoded(one, encoding)} for index, one in enumerate(vectors)]
        return json_answer({"object": "list", "model": service.name, "data": data})

    return await service.help(answer) if pictures else answer()  # a picture's vectors are thousands of numbers


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
    return json_answer({"results": results})


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
    deadline, hits, where = deadline_of(service), list[Any](), as_condition(wanted.where)
    if wanted.text is not None:
        query = wanted.text
        hits += await service.search(wanted.text, wanted.k, wanted.rerank, deadline, where)
    else:
        query = "image"
        (picture,) = await pictures_of([RawPicture(wanted.image or "", wanted.boxes, "image")], service)
        hits += await service.search_captions(picture, wanted.k, wanted.rerank, deadline, where)
    return json_answer({"query": query, "hits": [dataclasses.asdict(hit) for hit in hits]})


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
        "detector": None if service.detector is None else service.detector.manifest.checkpoint.name,
        "reranks": service.encoder.reranks,
        "gallery": None if gallery is None else await service.help(gallery.count),
        "fields": None if gallery is None else list(await service.help(gallery.fields))[:FIELDS],
    }
    return JSONResponse({"object": "list", "data": [model]})


@router.get("/health/live")
async def live(request: Request) -> Response:
    """200 as long as the process answers at all."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 where requests will be answered now; else 503 and why not."""
    state = state_of(request)
    trouble = state.trouble
    if trouble is None and state.service is not None:
        trouble = await gallery_trouble(state.service)
    if trouble is not None:
        return JSONResponse({"status": "not ready", "reason": trouble}, 503)
    return JSONResponse({"status": "ready"})


async def gallery_trouble(service: Service) -> str | None:
    """Why the gallery or store cannot be searched, or None: asked at every probe, so that the answer is of now."""
    if service.gallery is None:
        return None
    try:
        return await asyncio.wait_for(service.help(service.gallery.trouble), PROBE_SECONDS)
    except asyncio.TimeoutError:
        return f"{service.gallery.name} does not answer"


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    state = state_of(request)
    state.metrics.ready.set(state.trouble is None)
    if state.service is not None:
        state.metrics.waiting.set(state.service.scheduler.waiting_rows)
        gallery = state.service.gallery
        with suppress(QpertError, OSError):  # a gallery that cannot be read is no reason to hide the other figures
            state.metrics.images.set(0 if gallery is None else await state.service.help(gallery.count))
    return Response(state.metrics.text(), media_type=CONTENT_TYPE)
