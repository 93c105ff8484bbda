"""What the service can do, without HTTP: methods take checked input and a deadline, and use the queue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.bundle.roles import (
    IMAGE_TOKENS,
    IMAGE_TOWER,
    PIXELS,
    QUERY_HEAD,
    TEXT_TOWER,
    TEXT_VECTORS,
    TOKEN_IDS,
    TOKEN_MASK,
)
from qpert.runtime.detection.detector import Detector
from qpert.runtime.detection.source import BoxSource
from qpert.runtime.errors import GalleryError, InputError, LimitError
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.catalogue import has_catalogue, open_catalogue
from qpert.runtime.gallery.detected import DetectedBoxes
from qpert.runtime.gallery.hits import Hit, TextHit
from qpert.runtime.gallery.search import search_texts
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.inputs.text import TokenizedTexts
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures, concatenated
from qpert.runtime.retrieval.scores import final_scores, itc_scores
from qpert.runtime.retriever import Retriever
from qpert.runtime.serving.batching import Results, Scheduler, Work
from qpert.runtime.serving.gallery import AddRequest, Change, DeleteRequest, LiveGallery, ServedGallery, require_gallery
from qpert.runtime.serving.metrics import Metrics
from qpert.runtime.serving.pictures import Picture
from qpert.runtime.serving.settings import LENGTH_STEP, Settings
from qpert.runtime.serving.store import ServedStore
from qpert.runtime.stores.opening import open_store
from qpert.runtime.stores.protocol import VectorStore

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
FETCHES_AT_ONCE = 8
"""Pictures that are fetched by URL at the same time."""


class Service:
    """A bundle, perhaps a gallery, and the queue in front of them. Made by `load`, in a thread: that takes long."""

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        gallery: ServedGallery | None,
        metrics: Metrics,
        detector: Detector | None = None,
    ) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, metrics
        self.encoder, self.retriever, self.gallery, self.detector = encoder, Retriever(encoder), gallery, detector
        self.name = encoder.bundle.folder.resolve().name
        self.opened = ExitStack()
        self.scheduler = Scheduler(settings.worker_count, settings.limits.queue, metrics)
        self.helpers = ThreadPoolExecutor(max(2, settings.worker_count), thread_name_prefix="qpert-helper")
        self.fetchers = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="qpert-fetcher")
        self._text = Work("text", self._run_texts, encoder.limit(TEXT_TOWER, "T"))
        self._image = Work("image", self._run_pictures, encoder.limit(IMAGE_TOWER, "B"))
        self._pair = Work("pair", each(lambda call: call()), 1)
        self._search = Work("search", each(self._run_search), 1)
        self._change = Work("index", self._run_changes, settings.limits.inputs, exclusive=True)

    @classmethod
    def load(cls, settings: Settings, metrics: Metrics) -> Service:
        """Open the bundle, the detector and the gallery. The gallery's perturbation settings are the service's.

        Raises:
            BundleError, GalleryError, UnavailableError: what is wrong with them.
            InputError: a detector beside a bundle that takes no boxes, or fewer than it may find.
        """
        with ExitStack() as opened:
            store = None if settings.store is None else opened.enter_context(open_store(settings.store))
            encoder = Encoder(
                Bundle.open(settings.bundle),
                settings.provider,
                perturbation_of(settings, store),
                threads=settings.thread_count,
                spin=False,
                length_step=LENGTH_STEP,
            )
            opened.callback(encoder.close)
            detector = opened.enter_context(
                settings.detector.open(settings.provider, settings.max_boxes, threads=settings.thread_count)
            )
            if detector is not None:
                check_detector(detector, encoder)
            gallery = opened_gallery(settings, store, encoder, detector)
            if gallery is not None:
                gallery.sweep()
            service = cls(settings, encoder, gallery, metrics, detector)
            service.opened = opened.pop_all()
        return service

    async def close(self) -> None:
        """Wait for the workers, then release the graphs."""
        await self.scheduler.close()
        self.helpers.shutdown()
        self.fetchers.shutdown()
        self.opened.close()
        if self.gallery is not None:
            self.gallery.close()

    async def help(self, call: Callable[[], T]) -> T:
        """The host's work on one request (decoding, tokenising much text), in a thread of its own kind."""
        return await asyncio.get_running_loop().run_in_executor(self.helpers, call)

    async def fetch(self, call: Callable[[], T]) -> T:
        """The same for what waits for other hosts: slow ones keep no decoder from its work."""
        return await asyncio.get_running_loop().run_in_executor(self.fetchers, call)

    async def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Checked and tokenised. Raises TextError, and LimitError for a text of too many characters."""
        for index, text in enumerate(texts):
            if len(text) > self.limits.characters:
                raise LimitError(
                    f"text {index} has {len(text):,} characters, expected at most {self.limits.characters:,}; only the "
                    f"first {self.encoder.tokenizer.max_length} tokens are used anyway: send the beginning",
                    code="text-characters",
                )
        if sum(map(len, texts)) < 2_000:
            return self.encoder.tokenize(texts)
        return await self.help(lambda: self.encoder.tokenize(texts))

    async def encode_texts(self, texts: Sequence[str] | TokenizedTexts, deadline: float) -> Floats:
        """T texts → float32 [T, E]."""
        tokens = texts if isinstance(texts, TokenizedTexts) else await self.tokenize(texts)
        rows = [tokens] if len(tokens) == 1 else [tokens.trimmed(np.array([row])) for row in range(len(tokens))]
        jobs = [(row.input_ids.shape[1], row, 1) for row in rows]
        return np.stack(await self.scheduler.run(self._text, jobs, deadline))

    async def encode_pictures(self, pictures: Sequence[Picture], deadline: float) -> list[ImageFeatures]:
        """Of each picture its features, B = 1. Pictures with like numbers of boxes go together."""
        jobs = [(box_bucket(picture), picture, 1) for picture in pictures]
        return await self.scheduler.run(self._image, jobs, deadline)

    async def rerank(self, query: str | Picture, documents: Sequence[Any], deadline: float) -> Floats:
        """The final score of a text with B pictures, or of a picture with T texts: float32 [B] or [T]."""
        if isinstance(query, str):
            pictures, texts = await self.encode_pictures(documents, deadline), [query]
        else:
            pictures, texts = await self.encode_pictures([query], deadline), list(documents)
        tokens = await self.tokenize(texts)
        text_embeds = await self.encode_texts(tokens, deadline)
        features = concatenated(pictures)

        def score() -> Floats:
            itc = itc_scores(features.query_embeds, text_embeds)
            final = final_scores(self.encoder.itm_scores(features, tokens), itc) if self.encoder.reranks else itc
            return final.reshape(-1)

        (scores,) = await self.scheduler.run(self._pair, [(None, score, 1)], deadline)
        return np.asarray(scores, np.float32)

    async def search(
        self, text: str, k: int, rerank: int | None, deadline: float, where: Condition | None = None
    ) -> list[Hit]:
        """As `Retriever.search` in the gallery."""
        require_gallery(self.gallery)
        self.encoder.shortlist(rerank)
        await self.tokenize([text])
        (hits,) = await self.scheduler.run(self._search, [(None, (text, k, rerank, where), 1)], deadline)
        return list(hits)

    async def search_captions(
        self, picture: Picture, k: int, rerank: int | None, deadline: float, where: Condition | None = None
    ) -> list[TextHit]:
        """As `Retriever.search_texts` among the captions of the gallery, of those images of which `where` is true."""
        gallery = require_gallery(self.gallery)
        self.encoder.shortlist(rerank)
        (features,) = await self.encode_pictures([picture], deadline)

        def find() -> list[TextHit]:
            captions = gallery.captions(where)
            if not len(captions) and not len(gallery.captions()):
                raise GalleryError(
                    f"the gallery {gallery.name} has no captions to find for a picture; add pictures with captions, "
                    "or send the texts to /v1/rerank",
                    code="gallery-without-texts",
                )
            return search_texts(self.encoder, features, captions, boxes=picture.boxes, k=k, rerank=rerank)

        (hits,) = await self.scheduler.run(self._pair, [(None, find, 1)], deadline)
        return list(hits)

    async def change(self, request: AddRequest | DeleteRequest, deadline: float) -> Change:
        """Add or delete pictures; durable on return."""
        require_gallery(self.gallery)
        rows = len(request.uploads) if isinstance(request, AddRequest) else 1
        (change,) = await self.scheduler.run(self._change, [(None, request, rows)], deadline)
        return change  # type: ignore[no-any-return]

    async def infer(self, graph: str, inputs: dict[str, np.ndarray], deadline: float) -> dict[str, np.ndarray]:
        """Run one graph as it is."""
        session = self.encoder.sessions[graph]
        (outputs,) = await self.scheduler.run(self._pair, [(None, lambda: session.run(inputs), 1)], deadline)
        return outputs  # type: ignore[no-any-return]

    async def warm_up(self) -> None:
        """Run everything once at each length, so that the first request finds what the tenth finds."""
        deadline = time.monotonic() + 3600.0
        encoder = self.encoder
        longest = encoder.tokenizer.max_length
        texts = [" ".join(["a"] * count) for count in range(1, longest + 1, LENGTH_STEP)]
        for text in texts:
            text_embeds = await self.encode_texts([text], deadline)
        size = encoder.manifest.preprocessing.size
        picture = Picture(np.zeros((1, 3, size, size), np.float32), None)
        (features,) = await self.encode_pictures([picture], deadline)
        itc_scores(features.query_embeds, text_embeds)
        if self.detector is not None:
            from PIL import Image

            self.detector.boxes([Image.new("RGB", (size, size))])
        if encoder.reranks:
            for text in texts:
                await self.rerank(text, [picture], deadline)
        if self.gallery is not None:
            with contextlib.suppress(InputError):  # a gallery without features: each search gets the error
                await self.search("a", 10, None, deadline)
        await asyncio.gather(*(self.encode_texts(["a"], deadline) for _ in range(self.settings.worker_count)))

    def _run_texts(self, rows: list[TokenizedTexts]) -> Results:
        """Rows of one padded length, no more than a call takes: `Encoder.encode_texts` without its sorting."""
        ids = np.concatenate([row.input_ids for row in rows])
        mask = np.concatenate([row.attention_mask for row in rows])
        return list(self.encoder.graph(TEXT_TOWER).run({TOKEN_IDS: ids, TOKEN_MASK: mask})[TEXT_VECTORS])

    def _run_pictures(self, pictures: list[Picture]) -> Results:
        pixels = np.concatenate([picture.pixels for picture in pictures])
        tokens = self.encoder.graph(IMAGE_TOWER).run_on_device({PIXELS: pixels})[IMAGE_TOKENS]
        features = self.encoder.encode_features(tokens, [picture.boxes for picture in pictures])
        return [features.rows(slice(row, row + 1)) for row in range(len(pictures))]

    def _run_search(self, query: tuple[str, int, int | None, Condition | None]) -> list[Hit]:
        """One text. Searches share no scan: a product with more texts adds up in another order, and the last bit of a
        score would depend on who else searches."""
        gallery = require_gallery(self.gallery)
        text, k, rerank, where = query
        try:
            return self.retriever.search(text, gallery.searchable(), k=k, rerank=rerank, where=where)
        except GalleryError as error:
            if error.code != "gallery-compacted":
                raise
            gallery.forget()
            return self.retriever.search(text, gallery.searchable(), k=k, rerank=rerank, where=where)

    def _run_changes(self, requests: list[AddRequest | DeleteRequest]) -> Results:
        return list(require_gallery(self.gallery).change(requests))


def perturbation_of(settings: Settings, store: VectorStore | None) -> Perturbation | None:
    """The settings that the gallery or store was made with; None where there is none yet."""
    if store is not None:
        spec = store.spec()
        return None if spec is None else Perturbation.from_dict(spec.gallery.perturbation)
    if settings.gallery is None or not has_catalogue(settings.gallery):
        return None
    with contextlib.closing(open_catalogue(settings.gallery)) as catalogue:
        return Perturbation.from_dict(catalogue.spec.perturbation)


def opened_gallery(
    settings: Settings, store: VectorStore | None, encoder: Encoder, detector: BoxSource | None
) -> ServedGallery | None:
    """What is searched, made where it is not there; None where only encoding is served."""
    if store is not None:
        return ServedStore(store, encoder, settings.pictures, settings.features, detector)
    if settings.gallery is None:
        return None
    return LiveGallery.open(settings.gallery, encoder, settings.pictures, detector)


def each(function: Callable[[Any], Any]) -> Callable[[list[Any]], Results]:
    """Work that is done payload by payload."""
    return lambda payloads: [function(payload) for payload in payloads]


def check_detector(detector: Detector, encoder: Encoder) -> None:
    """Raises InputError where the bundle takes no boxes, or fewer than the detector may find in a picture."""
    DetectedBoxes.of(detector, encoder)
    most, found = encoder.limit(QUERY_HEAD, "O"), detector.options.max_boxes
    if found > most:
        raise InputError(
            f"the detector keeps up to {found} boxes of a picture, this bundle takes up to {most}; keep the best ones "
            f"(--max-boxes {most}), or export the bundle again with a larger --max-boxes",
            code="detector-boxes",
        )


def box_bucket(picture: Picture) -> int:
    """The number of boxes rounded up to 0, 1, 2, 4, 8, …: pictures of one bucket share a call with little padding."""
    count = 0 if picture.boxes is None else len(picture.boxes)
    return count if count < 2 else 1 << (count - 1).bit_length()
