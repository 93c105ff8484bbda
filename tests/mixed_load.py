"""Requests of every kind for a running service, good and bad, none like another; and what the service's memory does."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from running_service import RunningService, data_uri

CLIENTS = 8
WORDS = ("red", "blue", "cup", "star", "left", "of", "a", "large", "small", "wall", "at", "night")
Request = tuple[str, bytes]
"""A path, and the JSON that is posted there."""


def drawn_pictures(rng: random.Random, count: int) -> list[bytes]:
    """JPEG and PNG files of noise, from 8×8 to 1600×1200 pixels."""
    found = []
    for number in range(count):
        size = (rng.randint(8, 1200), rng.randint(8, 1600), 3)
        pixels = np.random.default_rng(number).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8)
        image = Image.fromarray(pixels).resize((size[1], size[0]))
        with io.BytesIO() as stream:
            image.save(stream, "PNG" if number % 5 == 0 else "JPEG")
            found.append(stream.getvalue())
    return found


def mixed_request(rng: random.Random, pictures: Sequence[bytes]) -> Request:
    """One of: texts, a picture with boxes, a search, a search with a filter, pairs; or something that is wrong."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    picture = rng.choice(pictures)
    boxes = [
        [rng.randint(0, 3), rng.randint(0, 3), rng.randint(4, 9), rng.randint(4, 9)] for _ in range(rng.randint(0, 8))
    ]
    shown = {"image": data_uri(picture)}
    encoding = rng.choice(["float", "base64"])
    kinds: list[Callable[[], tuple[str, object]]] = [
        lambda: ("/v1/embeddings", {"input": [text] * rng.randint(1, 30), "encoding_format": encoding}),
        lambda: ("/v1/embeddings", {"input": {**shown, "boxes": boxes}, "encoding_format": encoding}),
        lambda: ("/v1/search", {"text": text, "k": rng.randint(1, 20), "rerank": rng.choice([0, 2, 8])}),
        lambda: ("/v1/search", {"text": text, "rerank": 0, "where": f"n > {rng.randint(0, 9)}"}),
        lambda: ("/v1/rerank", {"query": text, "documents": [shown] * rng.randint(1, 3)}),
        lambda: ("/v1/rerank", {"query": shown, "documents": [text] * rng.randint(1, 9)}),
        lambda: ("/v1/embeddings", {"input": {"image": data_uri(picture[: rng.randint(1, len(picture) // 2)])}}),
        lambda: ("/v1/embeddings", {"input": rng.choice(["", " ", 3, None, {}, "x" * 20_000, [text, ""]])}),
        lambda: ("/v1/embeddings", {"input": {**shown, "boxes": [[rng.uniform(-9, 9)] * 4]}}),
        lambda: ("/v1/search", {"text": text, "where": rng.choice(["n >", "'", "n = 1 or", "a b"])}),
        lambda: ("/v1/search", rng.randbytes(rng.randint(1, 200))),
        lambda: (f"/v1/{rng.randbytes(4).hex()}", {}),
    ]  # fmt: skip
    path, body = rng.choice(kinds)()
    return path, body if isinstance(body, bytes) else json.dumps(body).encode()


def drive(service: RunningService, requests: Sequence[Request], clients: int = CLIENTS) -> Counter[int]:
    """Ask all of it, several at a time; how often each status was the answer."""

    def ask(own: Sequence[Request]) -> Counter[int]:
        with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client:
            headers = {"Content-Type": "application/json"}
            return Counter(client.post(path, content=body, headers=headers).status_code for path, body in own)

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(ask, [requests[number::clients] for number in range(clients)]), Counter())


def resident(pid: int) -> float:
    """Megabytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def growth(megabytes: Sequence[float]) -> float:
    """How much a straight line through equally spaced values rises from the first to the last of them."""
    slope = float(np.polyfit(np.arange(len(megabytes)), megabytes, 1)[0])
    return slope * (len(megabytes) - 1)
