"""What requests hold and what answers hold. Pydantic checks the former and describes both in `/openapi.json`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

Box = Annotated[list[float], Field(min_length=4, max_length=4)]
BOXES = Field(
    default=None,
    description="x1, y1, x2, y2 in pixels of the picture as it is seen (after EXIF rotation), 0-based, half-open; what "
    "reaches out of the picture is clipped. []: none. null: those that the service's detector finds, if "
    "it has one.",
    examples=[[[132, 347, 209, 423]]],
)
IMAGE = Field(
    description="a data URI, the base64 of a picture file, or a URL of a host that the service was started with",
    examples=["data:image/jpeg;base64,/9j/4AAQSkZJRg…"],
)


class Strict(BaseModel):
    """A request: a field that nobody knows is an error, not ignored."""

    model_config = ConfigDict(extra="forbid")


class PictureInput(Strict):
    """A picture with the boxes of its objects."""

    image: str = IMAGE
    boxes: list[Box] | None = BOXES


Scalar = StrictStr | StrictBool | StrictInt | StrictFloat | None
METADATA: Any = Field(
    default_factory=dict,
    description="what `where` of a search is about: strings, numbers and booleans by key",
    examples=[{"album": "kitchen", "year": 2021}],
)
Input = str | PictureInput
"""A text, or a picture."""


class EmbeddingsRequest(Strict):
    """Texts and pictures to encode, in any order."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"input": ["a cup", {"image": "data:image/jpeg;base64,…", "boxes": [[1, 2, 30, 40]]}]}]
        },
    )
    input: Input | list[Input]
    model: str | None = Field(default=None, description="the name that GET /v1/models gives, or nothing")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64 is little-endian float32 with its shape: half the bytes and work"
    )
    user: str | None = Field(default=None, description="taken from OpenAI's clients, and not used")


class Embedding(BaseModel):
    """`embedding` is E numbers of a text, [Q][E] of a picture (one vector a query), or base64 of them with `shape`."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[list[float]] | str
    shape: list[int] | None = Field(default=None, description="with base64 only: [E] or [Q, E]")


class EmbeddingsAnswer(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]


class RerankRequest(Strict):
    """A text against pictures, or a picture against texts."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"query": "a cup", "documents": [{"image": "data:image/jpeg;base64,…"}], "top_n": 3},
                {"query": {"image": "data:image/jpeg;base64,…"}, "documents": ["a cup", "a dog"]},
            ]
        },
    )
    query: Input
    documents: Annotated[list[Input], Field(min_length=1)]
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = Field(default=None, description="how many results; null: all")


class RerankResult(BaseModel):
    """`relevance_score` is ITM + ITC, the score that a search's shortlist is ranked by; ITC where the bundle has no
    pair scorer."""

    index: int
    relevance_score: float


class RerankAnswer(BaseModel):
    results: list[RerankResult]


class SearchRequest(Strict):
    """A text, to find pictures of the gallery; or a picture, to find captions of the gallery."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"text": "a cup of coffee", "k": 3}, {"image": "data:image/jpeg;base64,…"}]},
    )
    text: str | None = None
    image: str | None = Field(default=None, description="as in /v1/embeddings")
    boxes: list[Box] | None = BOXES
    k: Annotated[int, Field(ge=1)] = 10
    rerank: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="candidates that the pair scorer re-ranks; null: 64, or 0 without a pair scorer"
    )
    where: str | None = Field(
        default=None,
        description="search only pictures of which this is true of the metadata (for an image: their captions)",
        examples=["album = 'kitchen' and year >= 2020"],
    )


class MatchedBox(BaseModel):
    """The box whose own queries matched, of a bundle with a query set for each box."""

    index: int
    xyxy: tuple[float, float, float, float] | None = None
    label: str | None = None
    score: float | None = None


class Hit(BaseModel):
    """As `qpert search --json`: `image` is a picture's name; of a caption, `text` is there too."""

    text: str | None = None
    image: str | None
    score: float
    itc: float
    itm: float | None
    rank_itc: int
    box: MatchedBox | None = None


class SearchAnswer(BaseModel):
    query: str
    hits: list[Hit]


class NewPicture(Strict):
    """A picture for the gallery, under a name of its own."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    image: str = IMAGE
    boxes: list[Box] | None = BOXES
    captions: list[str] = Field(default_factory=list, description="texts that a search by picture can find")
    metadata: dict[str, Scalar] = METADATA


class ImagesRequest(Strict):
    """Pictures to index. All are on the disk before the answer, or none."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"images": [{"name": "cup.jpg", "image": "data:image/jpeg;base64,…"}]}]},
    )
    images: Annotated[list[NewPicture], Field(min_length=1)]
    replace: bool = Field(default=False, description="encode again what is there under the same name and differs")


class ImagesAnswer(BaseModel):
    """Counts of this request, and `images`, how many the gallery holds."""

    added: int
    replaced: int
    unchanged: int
    images: int


class DeletedAnswer(BaseModel):
    deleted: int
    images: int


class GalleryPicture(BaseModel):
    """A picture of the gallery: its size and boxes, and a small JPEG of it as a data URI."""

    image: str
    width: int
    height: int
    boxes: list[Box] | None
    captions: list[str]
    metadata: dict[str, Scalar]
    thumbnail: str


class Listing(BaseModel):
    images: list[str]
    total: int


class Model(BaseModel):
    """One bundle, as OpenAI's clients list models; what follows `owned_by` is qpert's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qpert"
    family: str
    checkpoint: str
    precision: str
    vectors: int = Field(description="vectors of a picture (Q)")
    width: int = Field(description="numbers of a vector (E)")
    boxes: int = Field(description="boxes a picture may have")
    detector: str | None = Field(description="finds the boxes of pictures that come without; null: none does")
    reranks: bool
    gallery: int | None = Field(description="pictures in the gallery; null without one")
    fields: list[str] | None = Field(description="what `where` can be about: keys of metadata; null without a gallery")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    code: str
    message: str


class ErrorAnswer(BaseModel):
    error: ErrorBody


REQUESTS: tuple[type[BaseModel], ...] = (EmbeddingsRequest, RerankRequest, SearchRequest, ImagesRequest)
Json = dict[str, Any]
