"""The vocabulary and the licence in a Hugging Face folder."""

from __future__ import annotations

import re
from pathlib import Path

UNKNOWN_LICENSE = "unknown (not stated with the checkpoint)"


def vocabulary_in(folder: Path | None) -> Path | None:
    """The tokenizer's file in a Hugging Face folder."""
    candidates = [folder / "tokenizer.json", folder / "vocab.txt"] if folder else []
    return next((path for path in candidates if path.is_file()), None)


def license_of(folder: Path) -> str:
    """The licence that the model card (README.md) states in its front matter."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front_matter = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    found = re.search(r"^license:[ \t]*(\S.*)$", front_matter, re.MULTILINE)
    return found[1].strip() if found else UNKNOWN_LICENSE
