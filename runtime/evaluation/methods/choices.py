"""The methods of `qpert eval --method`, and the choices that the paper leaves open.

Source: Sogi, Shibata, Terao, ECCV 2024, supplement B.1 and Table A. It gives the two baselines one or two sentences
each, and their code is not released. Every choice that those sentences leave open is a named field of `Choices` with
a default of ours, and a report records it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.errors import InputError

Method = Literal["q-pert", "or-q-pert", "oes", "none"]
SeveralBoxes = Literal["mean", "sum", "span", "each"]
Pooling = Literal["mean", "tokens", "tokens-and-cls", "crop"]
Similarity = Literal["max", "mean"]
Joins = Literal["all", "final"]

DEFAULT: Method = "q-pert"
LABELS: dict[Method, str] = {"q-pert": "Q-Pert", "or-q-pert": "OrQ-Pert", "oes": "OEs", "none": "no boxes"}
"""Names in reports; the first three are the paper's."""
MEANINGS: dict[Method, str] = {
    "q-pert": "queries are strengthened inside the boxes' key subspaces (paper, section 4)",
    "or-q-pert": "queries are projected on the orthogonal complement of the boxes' key subspaces (paper, B.1)",
    "oes": "the original score plus the highest similarity of the text with an object embedding (paper, B.1)",
    "none": "the model without boxes",
}
PERTURBING: tuple[Method, ...] = ("q-pert", "or-q-pert")
"""Methods that need a graph with object masks and box weights."""
TOKEN_SELECTIONS: tuple[Pooling, ...] = ("tokens", "tokens-and-cls")


@dataclass(frozen=True)
class Choices:
    """What the paper leaves open about the baselines.

    several_boxes: OrQ-Pert of an image with O boxes. `mean`: q(I − Σ P_b / O); `sum`: q(I − Σ P_b), which subtracts
    twice where subspaces overlap; `span`: the complement of the joint subspace, that of the masked keys of all boxes
    together; `each`: a query set for each box, and ITC takes the best. With one box all four are q(I − P).

    pooling: what the Q-Former sees of an object. `mean`: region-of-interest pooling to 1×1, the mean of the box's
    tokens weighted by how much of each it covers, in every place (attention over equal keys returns their value);
    `tokens`: the tokens that the box touches and no others; `tokens-and-cls`: these and the prefix token; `crop`: the
    picture cropped to the box, through the whole image branch. The queries are the stock ones.

    similarity: of a text with an object's Q query embeddings, their `max` (as ITC) or `mean`.

    joins: `all`: the similarity is added to ITC, so to the shortlist and to the final score; `final`: only to the final
    score of re-ranked pairs.
    """

    several_boxes: SeveralBoxes = "mean"
    pooling: Pooling = "mean"
    similarity: Similarity = "max"
    joins: Joins = "all"

    def __post_init__(self) -> None:
        allowed = {
            "several_boxes": SeveralBoxes,
            "pooling": Pooling,
            "similarity": Similarity,
            "joins": Joins,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in get_args(values):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(values))}",
                    code="method-choice",
                )

    def of(self, method: Method) -> dict[str, str]:
        """The choices that a method depends on, by the name of their option."""
        names = {"or-q-pert": ("several_boxes",), "oes": ("pooling", "similarity", "joins")}.get(method, ())
        return {OPTIONS[name]: getattr(self, name) for name in names}


OPTIONS = {
    "several_boxes": "or-q-pert-boxes",
    "pooling": "oes-pooling",
    "similarity": "oes-similarity",
    "joins": "oes-joins",
}
"""Field of `Choices` → option of `qpert eval`, without its dashes."""
assert [field.name for field in fields(Choices)] == list(OPTIONS)

FIXED: dict[Method, str] = {
    "or-q-pert": "α, β and γ do not enter; τ, centring and norm are those of the bundle's graphs",
    "oes": (
        "stock queries and weight 1 for the similarity; an image without boxes, or whose boxes cover no token, is its "
        "own only object, so that its scores compare with the others'"
    ),
}
"""What is not an option and the paper does not state either."""


def described(method: Method, choices: Choices) -> dict[str, Any]:
    """The `method` of `eval --json`: its name, what it does, its choices by option, and what else we decided."""
    return {
        "name": method,
        "meaning": MEANINGS[method],
        "choices": choices.of(method),
        "fixed": FIXED.get(method),
    }


def parse_methods(text: str) -> tuple[Method, ...]:
    """Methods from `none,q-pert`, in that order.

    Raises:
        InputError: an unknown name, one that is given twice, or none at all.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    known: dict[str, Method] = {name: name for name in get_args(Method)}
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        got = ", ".join(wrong) or "nothing"
        raise InputError(
            f"--method has {got}; expected one or more of {', '.join(known)}, with commas between", code="method-name"
        )
    if len(set(names)) < len(names):
        raise InputError(f"--method is {text!r}; name each method once", code="method-twice")
    return tuple(known[name] for name in names)


def check_methods(manifest: Manifest, methods: Sequence[Method], choices: Choices) -> None:
    """Raise InputError where the bundle's graphs lack what a method needs; says which methods they allow."""
    head = manifest.query_head
    if head.takes_boxes:
        return
    without = f"this {manifest.family} bundle's query head takes no boxes (exported with --perturb none, or its family"
    lacking = [method for method in methods if method in PERTURBING]
    if lacking:
        raise InputError(
            f"--method {', '.join(lacking)} cannot run: {without} has no cross-attention to perturb); none and oes can",
            code="method-without-boxes",
        )
    if "oes" in methods and choices.pooling in TOKEN_SELECTIONS:
        raise InputError(
            f"--oes-pooling {choices.pooling} cannot run: {without} has none), and its graph cannot be cut at the "
            "keys; use --oes-pooling mean or crop",
            code="method-without-boxes",
        )
