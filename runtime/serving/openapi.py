"""What `/openapi.json` says: bodies are read by `requests`, so FastAPI has to be told of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qpert.runtime.serving import schemas

REFERENCE = "#/components/schemas/{model}"
ERRORS = {
    400: "malformed: not JSON, not a form",
    401: "the token is missing or wrong (where the service has one)",
    403: "a page of another site, or a host name that this service does not answer to",
    404: "unknown: the model, a picture of the gallery",
    408: "the body did not arrive in time",
    413: "over a limit: bytes, pixels, boxes, texts",
    422: "cannot be used: a picture, a box, a text, a field",
    503: "not now: not ready, queue full, deadline passed; see Retry-After",
}
BOXES_FIELD = {"type": "string", "description": "JSON: of each picture a list of [x1, y1, x2, y2], or null"}
FORMS: dict[str, dict[str, Any]] = {
    "embeddings": {
        "type": "object",
        "required": ["input"],
        "properties": {
            "input": {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "description": "repeated: a file is a picture, a text field a text",
            },
            "boxes": BOXES_FIELD,
            "encoding_format": {"type": "string", "enum": ["float", "base64"], "default": "float"},
            "model": {"type": "string"},
        },
    },
    "images": {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "description": "repeated: files, under the names that they have in the form",
            },
            "boxes": BOXES_FIELD,
            "captions": {"type": "string", "description": "JSON: of each picture a list of texts"},
            "replace": {"type": "string", "enum": ["true", "false"], "default": "false"},
        },
    },
}


def described(
    answer: type[BaseModel], request: type[BaseModel] | None = None, *, form: str | None = None
) -> dict[str, Any]:
    """Arguments of a route's decorator: what it answers, and the body that it reads."""
    described_errors = {status: {"model": schemas.ErrorAnswer, "description": text} for status, text in ERRORS.items()}
    route: dict[str, Any] = {"response_model": answer, "responses": described_errors}
    if request is not None:
        reference = {"$ref": REFERENCE.format(model=request.__name__)}
        content: dict[str, Any] = {"application/json": {"schema": reference}}
        if form is not None:
            content["multipart/form-data"] = {"schema": FORMS[form]}
        route["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return route


def describe(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
        )
        _, bodies = models_json_schema([(model, "validation") for model in schemas.REQUESTS], ref_template=REFERENCE)
        document["components"]["schemas"] |= bodies["$defs"]
        if app.state.qpert.settings.token:
            document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
        app.openapi_schema = document
    return app.openapi_schema
