"""A thousand captions that are hard on tokenizers."""

from __future__ import annotations

import random

WORDS = ["a", "dog", "and", "the", "cat's", "hat", "isn't", "on", "table", "they're", "we've", "I'm", "he'll", "she'd"]
PIECES = [
    *WORDS,
    *("12", "cats", "2024", "naïve", "café", "ΣΊΣΥΦΟΣ", "Σ", "ΑΣ'Α", "ὈΔΥΣΣΕΎΣ,"),
    *("e\u0301a\u0300", "ﬁne", "Ｆｕｌｌ", "ＷＩＤＥ！", "İstanbul", "ẞtraße", "Ǆ", "K", "½", "x²", "①", "\u212b"),
    *(
        "日本語",
        "中文字符",
        "한국어",
        "العربية",
        "हिन्दी",
        "ไทย",
        "עִבְרִית",
        "🐶",
        "👩‍👩‍👧",
        "🇩🇪",
        "☺️",
        "𝔘𝔫𝔦",
        "\U0001f9ff",
    ),
    *(
        "wow!§",
        "...",
        "!!!",
        "?!",
        "'",
        "''s",
        "'S",
        "'LL",
        "_",
        "__init__",
        "-",
        "—",
        "a-b",
        "a_b",
        "#tag",
        "@you",
        "$5",
    ),
    *(
        "\t",
        "\n",
        "\r\n",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u200c",
        "\u200e",
        "\x00",
        "\x1c",
        "\x85",
        "\u2028",
    ),
    *("▁", "▁▁a", "&amp;", "<b>", "</w>", "Ġ", "\ufffd", "\ue000", "i̇", "\u0345", "\u0301", "%", "{}", "\\", '"', "`"),
]
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", " </s> "]
FIXED = ["", " ", "!", "a", "  a  ", "\n", "▁", "<|endoftext|>", "</s>", "<unk>", "word " * 200, "x" * 500, "🐶" * 90]


def hostile_captions(count: int = 1000, *, special: bool, seed: int = 0) -> list[str]:
    """`special`: with the literal text of special tokens in some of them."""
    generator = random.Random(seed)
    pool = PIECES + (SPECIAL * 2 if special else [])
    made = [_caption(generator, pool) for _ in range(count - len(FIXED))]
    plain = [text for text in FIXED if special or text.strip() not in SPECIAL]
    return (plain + made + [_caption(generator, pool) for _ in FIXED])[:count]


def _caption(generator: random.Random, pool: list[str]) -> str:
    parts = generator.choices(pool, k=generator.choice([1, 2, 3, 5, 9, 20, 60]))
    return "".join(part + generator.choice(["", " ", " ", "  "]) for part in parts)
