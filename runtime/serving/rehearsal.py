"""Requests that the service asks itself before it calls itself ready.

A client's first then finds everything loaded, from picture decoders to threads, as its tenth does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io

from qpert.runtime.errors import InputError
from qpert.runtime.serving import schemas
from qpert.runtime.serving.errors import BusyError
from qpert.runtime.serving.requests import RawPicture
from qpert.runtime.serving.routes import embed, find, ranked
from qpert.runtime.serving.service import Service


async def rehearse(service: Service) -> None:
    """Every kind of request, as many at a time as there are workers, so that each thread has seen one."""
    text, size = "a", (640, 480)
    box = [[8.0, 8.0, 40.0, 40.0]] if service.encoder.manifest.query_head.takes_boxes else None
    body = schemas.EmbeddingsRequest(input=schemas.PictureInput(image=drawn(size), boxes=box)).model_dump_json()
    read = schemas.EmbeddingsRequest.model_validate_json(body).input
    assert isinstance(read, schemas.PictureInput)
    picture = RawPicture(read.image, read.boxes, "rehearsal")
    count = service.settings.worker_count
    with contextlib.suppress(BusyError, InputError):  # over limits that the operator has set lower than this picture
        for encoding in ("float", "base64"):
            for one in (picture, RawPicture(read.image, None, "rehearsal")):
                await asyncio.gather(*(embed(service, [text, one], encoding) for _ in range(count)))
        await asyncio.gather(*(ranked(service, text, [picture], None) for _ in range(count)))
        if service.gallery is not None:
            await asyncio.gather(*(find(service, schemas.SearchRequest(text=text)) for _ in range(count)))


def drawn(size: tuple[int, int]) -> str:
    """A grey JPEG as a data URI."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(stream, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
