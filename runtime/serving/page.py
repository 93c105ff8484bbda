"""The page at `/`: one file, nothing from elsewhere, and nothing that a policy would have to trust."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import APIRouter, Response

router = APIRouter()


@cache
def page() -> tuple[bytes, str]:
    """The page, and a policy that allows its own script and style by hash, pictures of its own, and this service."""
    text = resources.files("qpert.runtime.serving").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style"))
    assert script is not None
    assert style is not None
    hashes = [base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() for found in (script, style)]
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


@router.get("/", include_in_schema=False)
async def show() -> Response:
    """Type a sentence, drop a picture, draw boxes, see what is found."""
    body, policy = page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(body, media_type="text/html; charset=utf-8", headers=headers)
