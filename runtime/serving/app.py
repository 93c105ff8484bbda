"""The application: routes, errors, the gate in front of them, and the loading of the bundle behind them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from qpert.runtime.errors import QpertError
from qpert.runtime.serving import gallery_routes, inference_protocol, page, routes
from qpert.runtime.serving.errors import RequestError
from qpert.runtime.serving.gate import Gate, refusal
from qpert.runtime.serving.openapi import describe
from qpert.runtime.serving.rehearsal import rehearse
from qpert.runtime.serving.service import Service
from qpert.runtime.serving.settings import Settings
from qpert.runtime.serving.state import State

DESCRIPTION = """Image-text retrieval with object-aware query perturbation: embeddings, pair scores, and search in a
gallery. Answers are those of the Python runtime (`qpert.runtime.Retriever`). An error is
`{"error": {"code", "message"}}`; codes stay the same where messages change."""
CODES_OF_STATUS = {404: "not-found", 405: "method-not-allowed", 400: "malformed"}


def create_app(settings: Settings, stop: Callable[[], None] = lambda: None) -> FastAPI:
    """The application of one service. It answers at once, and is ready once the bundle is loaded and warm; where that
    fails, `state.failure` says why, and `stop` is called."""
    state = State(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load(state, stop))
        yield
        state.is_stopping = True
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        if state.service is not None:
            await state.service.close()

    app = FastAPI(
        title="qpert",
        version=version("qpert"),
        summary="a bundle behind HTTP",
        description=DESCRIPTION,
        docs_url=None,  # FastAPI's pages load scripts of other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.qpert = state
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.include_router(routes.router)
    app.include_router(gallery_routes.router)
    app.include_router(inference_protocol.router)
    app.include_router(page.router)
    app.add_exception_handler(QpertError, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Exception, answer_bug)
    app.add_middleware(Gate, settings=settings, metrics=state.metrics)  # type: ignore[arg-type]
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", inference_protocol.LENGTH],
            expose_headers=["Retry-After", inference_protocol.LENGTH],
        )
    return app


async def load(state: State, stop: Callable[[], None]) -> None:
    """Make the service, in a thread, and warm it up."""
    try:
        service = await asyncio.to_thread(Service.load, state.settings, state.metrics)
        try:
            await service.warm_up()
            await rehearse(service)
        except BaseException:
            await service.close()
            raise
        freeze_garbage_collector()
        state.service = service
    except Exception as error:  # noqa: BLE001, raised again by whoever runs the server
        state.failure = error
        stop()


def freeze_garbage_collector() -> None:
    """Leave alone what is loaded by now, a quarter of a million objects: going through them holds up every request that
    is being answered for tens of milliseconds, and nothing of it is garbage."""
    gc.collect()
    gc.freeze()


async def answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QpertError)
    return refusal(error)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: an unknown path, a method that a path does not have, a broken form."""
    assert isinstance(error, HTTPException)
    code = CODES_OF_STATUS.get(error.status_code, "http")
    refused = RequestError(
        f"{request.method} {request.url.path[:200]}: {error.detail}; /openapi.json lists what there is",
        code=code,
        status=error.status_code,
    )
    return refusal(refused)


async def answer_bug(request: Request, error: Exception) -> Response:
    """A bug: its traceback is in the log, and none of it in the answer."""
    body = {"error": {"code": "internal", "message": "the service failed; its log says why"}}
    return JSONResponse(body, 500)
