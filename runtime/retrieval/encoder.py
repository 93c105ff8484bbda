"""From images, boxes and texts to features: preprocessing, the graphs, and batching within the bundle's limits.

Calls larger than the bundle's profile are split; since a row's result never depends on its neighbours (`qpert verify`
checks it), that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import REPORTS, Bundle
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import (
    BOX_WEIGHTS,
    IMAGE_TOKENS,
    IMAGE_TOWER,
    IMAGE_VECTORS,
    OBJECT_MASKS,
    PAIR_SCORER,
    PAIR_SCORES,
    PIXELS,
    QUERY_HEAD,
    TEXT_TOWER,
    TEXT_VECTORS,
    TOKEN_IDS,
    TOKEN_MASK,
)
from qpert.runtime.detection.source import BoxSource, boxes_of
from qpert.runtime.errors import BoxError, BundleError, InputError, LimitError
from qpert.runtime.inputs.arguments import as_boxes, as_count, as_images, as_texts, kind_of
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import ImageInput, load_image, preprocess_images
from qpert.runtime.inputs.perturbation import FIXED_IN_GRAPHS, Perturbation, box_inputs
from qpert.runtime.inputs.text import TokenizedTexts, Tokenizer
from qpert.runtime.retrieval.bound_graph import BoundGraph
from qpert.runtime.retrieval.features import Floats, ImageFeatures, concatenated
from qpert.runtime.retrieval.query_sets import NO_BOX, QuerySets, inputs_of_sets, sets_of_images
from qpert.runtime.sessions.device import DeviceArray, on_host
from qpert.runtime.sessions.open import open_sessions
from qpert.runtime.sessions.protocol import Array

SHARING = ("cpu", "cuda", "openvino")
"""Providers on which sharing image tokens between rows was tried; an engine fixes how axes relate when it is built."""
SHORTLIST = 64
"""Candidates that are re-ranked where nobody says how many: as the paper and LAVIS's evaluation on Flickr30K do."""


@dataclass(frozen=True)
class EncoderSettings:
    """How an encoder computes; never what."""

    threads: int = 0
    spin: bool = True
    length_step: int = 1


class Encoder:
    """The graphs of a bundle behind three methods. `close` releases them.

    A pickled or copied encoder opens its bundle again, with the same provider, settings and threads; so does one that a
    forked process inherits, when it is first used there (on a GPU that is an error, which says what to do).
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str,
        perturbation: Perturbation | None = None,
        *,
        threads: int = 0,
        spin: bool = True,
        length_step: int = 1,
    ) -> None:
        """`threads` and `spin` as in `open_sessions`; `length_step` as in `Tokenizer`."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        threads = as_count(threads, "threads", least=0)
        self.provider, self.is_closed = provider, False
        self.settings = EncoderSettings(threads, spin, as_count(length_step, "length_step", least=1))
        self._folder = bundle.folder.absolute()
        self.perturbation = compatible(perturbation, bundle)
        self.tokenizer = Tokenizer.open(
            bundle.path(self.manifest.tokenizer.file), self.manifest.tokenizer, length_step=self.settings.length_step
        )
        self.sessions = open_sessions(bundle, provider, threads=threads, spin=spin)

    def close(self) -> None:
        """Release the sessions; the encoder cannot be used afterwards."""
        self.is_closed = True
        for session in self.sessions.values():
            session.close()

    def __reduce__(self) -> tuple[Callable[..., Encoder], tuple[object, ...]]:
        if self.is_closed:
            raise InputError("the encoder is closed and cannot be copied; open the bundle again", code="encoder-closed")
        return reopened, (self._folder, self.manifest, self.provider, self.perturbation, self.settings)

    @property
    def threads(self) -> int:
        """CPU threads for one operator; 0 where the library that runs the graphs chooses."""
        return self.settings.threads

    def graph(self, role: str) -> BoundGraph:
        """The graph of a role, run by slots. Raises BundleError where the bundle has none."""
        return BoundGraph(self.sessions[self.manifest.graph(role).name])

    @property
    def reranks(self) -> bool:
        """Whether the bundle has a pair scorer."""
        return self.manifest.pair_scorer is not None

    def limit(self, role: str, axis: str) -> int:
        """The longest that `axis` of a graph may be in one call: the limit of the bundle, or of a narrower engine."""
        return self.graph(role).spec.ranges[axis].max

    def encode_images(
        self, images: Iterable[ImageInput], boxes: Iterable[Boxes | None] | BoxSource | None = None
    ) -> ImageFeatures:
        """B images, with or without boxes, to features; see `Retriever.encode_images`."""
        images = as_images(images)
        if isinstance(boxes, BoxSource):
            loaded = [load_image(image, name=image_name(image, number)) for number, image in enumerate(images)]
            images, boxes = loaded, boxes_of(boxes, loaded)
        given = self.check_boxes(len(images), boxes)
        step = self.limit(IMAGE_TOWER, "B")
        parts = [
            self._encode_chunk(images[start : start + step], given[start : start + step], first=start)
            for start in range(0, len(images), step)
        ]
        return concatenated(parts)

    def tokenize(self, texts: Iterable[str] | TokenizedTexts) -> TokenizedTexts:
        """T texts, cleaned, as token ids; for callers that need the same texts many times."""
        return texts if isinstance(texts, TokenizedTexts) else self.tokenizer.encode(as_texts(texts))

    def encode_texts(self, texts: Iterable[str] | TokenizedTexts) -> npt.NDArray[np.float32]:
        """T texts → float32 [T, E]; batches hold texts of similar length, so that little is spent on padding."""
        tokens, tower = self.tokenize(texts), self.graph(TEXT_TOWER)
        result: npt.NDArray[np.float32] | None = None
        for rows in by_length(tokens, self.limit(TEXT_TOWER, "T")):
            output = tower.run(token_slots(tokens.trimmed(rows)))[TEXT_VECTORS]
            if result is None:
                result = np.empty((len(tokens), output.shape[1]), dtype=np.float32)
            result[rows] = output
        if result is None:
            raise InputError("got no texts to encode, expected at least one", code="no-texts")
        return result

    def itm_scores(self, features: ImageFeatures, texts: Iterable[str] | TokenizedTexts) -> npt.NDArray[np.float32]:
        """Every image with every text: float32 [B, T].

        An image's keys and values are computed once for all the texts of a call (one image a call where there are many
        texts, several where there are few).

        Raises:
            InputError: the bundle has no pair scorer, or the features lack the masks that it needs.
        """
        self.require_pair_scorer("matching pairs")
        if not isinstance(features, ImageFeatures):
            raise InputError(
                f"features are a {kind_of(features)}; expected what encode_images returns", code="features-kind"
            )
        tokens = self.tokenize(texts)
        if not len(tokens):
            raise InputError("got no texts to match, expected at least one", code="no-texts")
        scores = np.empty((len(features), len(tokens)), dtype=np.float32)
        texts_a_call = self.limit(PAIR_SCORER, "T")
        images_a_call = max(1, min(self.limit(PAIR_SCORER, "I"), texts_a_call // len(tokens)))
        for start in range(0, len(features), images_a_call):
            part = features.rows(slice(start, start + images_a_call))
            for rows in by_length(tokens, texts_a_call):
                scores[start : start + len(part), rows] = self._match(part, tokens.trimmed(rows))
        return scores

    def shortlist(self, rerank: int | None) -> int:
        """How many candidates the pair scorer sees: `rerank`, or where it is None 64, and 0 without a pair scorer.

        Raises:
            InputError: `rerank` is negative or no whole number, or above 0 where the bundle has no pair scorer.
        """
        if rerank is None:
            return SHORTLIST if self.reranks else 0
        rerank = as_count(rerank, "rerank", least=0)
        if rerank > 0:
            self.require_pair_scorer(f"re-ranking the best {rerank}")
        return rerank

    def require_pair_scorer(self, purpose: str) -> None:
        """Raises InputError where the bundle has no pair scorer."""
        if not self.reranks:
            raise InputError(
                f"{purpose} needs a pair scorer, and this {self.manifest.family} bundle has none; images are ranked by "
                "the first score alone: use rerank 0",
                code="no-pair-scorer",
            )

    def _match(self, features: ImageFeatures, tokens: TokenizedTexts) -> npt.NDArray[np.float32]:
        scorer = self.graph(PAIR_SCORER)
        slots: dict[str, Array] = {IMAGE_TOKENS: features.for_matching}
        for slot, array in token_slots(tokens).items():
            slots[slot] = np.ascontiguousarray(np.broadcast_to(array, (len(features), *array.shape)))
        if scorer.spec.takes_boxes:
            if features.object_masks is None or features.box_weights is None:
                raise InputError(
                    "this bundle perturbs ITM too, and the features hold no masks; encode the images again",
                    code="features-without-masks",
                )
            slots |= {OBJECT_MASKS: features.object_masks, BOX_WEIGHTS: features.box_weights}
        return scorer.run(slots)[PAIR_SCORES]

    def _encode_chunk(
        self, images: Sequence[ImageInput], boxes: Sequence[Boxes | None], *, first: int
    ) -> ImageFeatures:
        """Images of one call of the graphs; `first` is the place of the first of them in the caller's sequence."""
        names = [image_name(image, number) for number, image in enumerate(images, start=first)]
        loaded = [load_image(image, name=name) for image, name in zip(images, names, strict=True)]
        for name, image, image_boxes in zip(names, loaded, boxes, strict=True):
            if image_boxes is not None and image_boxes.size != image.size:
                raise BoxError(
                    f"the boxes of {name} are for a picture of "
                    f"{image_boxes.size[0]}×{image_boxes.size[1]} pixels, it has {image.size[0]}×{image.size[1]}; "
                    "give boxes in the picture's own pixels (after EXIF rotation)",
                    code="box-picture-size",
                )
        pixels = preprocess_images(loaded, self.manifest.preprocessing)
        # On a GPU the features go from graph to graph without a way over the host.
        image_tokens = self.graph(IMAGE_TOWER).run_on_device({PIXELS: pixels})[IMAGE_TOKENS]
        return self.encode_features(image_tokens, boxes)

    def box_slots(self, boxes: Sequence[Boxes | None]) -> dict[str, np.ndarray]:
        """`object_masks` [B, O, N] and `box_weights` [B, O] by slot, under this encoder's perturbation settings."""
        masks, weights = box_inputs(boxes, self.perturbation, self.manifest.token_grid)
        return {OBJECT_MASKS: masks, BOX_WEIGHTS: weights}

    def encode_features(self, image_tokens: Floats | DeviceArray, boxes: Sequence[Boxes | None]) -> ImageFeatures:
        """The second half of `encode_images`: image tokens [B, N, C] (B within the profile) and boxes → features."""
        head, scorer = self.graph(QUERY_HEAD), self.manifest.pair_scorer
        objects = self.box_slots(boxes) if head.spec.takes_boxes else {}
        counts, set_boxes = sets_of_images(boxes, self.perturbation)
        if (set_boxes != NO_BOX).any():
            return ImageFeatures(self._encode_sets(image_tokens, objects, counts, set_boxes), image_tokens)
        vectors = head.run({IMAGE_TOKENS: image_tokens, **objects})[IMAGE_VECTORS]
        kept = objects if scorer is not None and scorer.takes_boxes else {}
        return ImageFeatures(vectors, image_tokens, kept.get(OBJECT_MASKS), kept.get(BOX_WEIGHTS))

    def _encode_sets(
        self,
        image_tokens: Floats | DeviceArray,
        objects: Mapping[str, np.ndarray],
        counts: npt.NDArray[np.int64],
        set_boxes: npt.NDArray[np.int64],
    ) -> QuerySets:
        """A query set for each box: the query head sees an image once a set, with that set's box alone.

        All sets of an image go into one call of the graph, where its limit allows it. A graph that shares its image
        tokens gets them once a call; others, and engines, get them once a set.
        """
        head, most = self.graph(QUERY_HEAD), self.limit(QUERY_HEAD, "B")
        image = np.repeat(np.arange(len(counts)), counts)
        masks, weights = inputs_of_sets(objects[OBJECT_MASKS], objects[BOX_WEIGHTS], counts, set_boxes)
        shares = head.spec.input(IMAGE_TOKENS).shared and self.provider in SHARING
        parts = []
        for rows in calls(counts, most, alone=shares):
            one = int(image[rows.start])
            tokens = one_row(image_tokens, one) if shares else on_host(image_tokens)[image[rows]]
            slots = {IMAGE_TOKENS: tokens, OBJECT_MASKS: masks[rows], BOX_WEIGHTS: weights[rows]}
            parts.append(head.run(slots)[IMAGE_VECTORS])
        return QuerySets(np.concatenate(parts), counts, set_boxes)

    def check_boxes(self, count: int, boxes: Iterable[Boxes | None] | None) -> Sequence[Boxes | None]:
        """The boxes of each of `count` images.

        Raises:
            BoxError, InputError: something else, or any boxes where the bundle takes none.
            LimitError: more boxes an image than the bundle takes.
        """
        given = as_boxes(boxes, count)
        graph = self.graph(QUERY_HEAD).spec
        most = max((len(b) for b in given if b is not None), default=0)
        if most and not graph.takes_boxes:
            raise InputError(
                f"this bundle ({self.manifest.family}) takes no boxes: it was exported with --perturb none; export it "
                "with --perturb itc where the model allows it, or leave the boxes out",
                code="bundle-without-boxes",
            )
        if most and most > graph.ranges["O"].max:
            raise LimitError(
                f"an image has {most} boxes, this bundle takes up to {graph.ranges['O'].max}; keep the best ones "
                f"(Boxes.best, --max-boxes {graph.ranges['O'].max}), or export again with a larger --max-boxes",
                code="boxes-limit",
            )
        return given


def reopened(
    folder: Path, manifest: Manifest, provider: str, perturbation: Perturbation, settings: EncoderSettings
) -> Encoder:
    """What a pickled or copied encoder becomes.

    Raises:
        BundleError: at `folder` is no longer the bundle of that manifest.
    """
    bundle = Bundle.open(folder)
    if exported_files(bundle.manifest) != exported_files(manifest):
        raise BundleError(
            f"{folder} was replaced by another bundle since the encoder was opened; open it again",
            code="bundle-replaced",
        )
    return Encoder(bundle, provider, perturbation, **asdict(settings))


def exported_files(manifest: Manifest) -> dict[str, str]:
    """The hashes of what a bundle was exported with; reports come and go."""
    return {name: digest for name, digest in manifest.files.items() if not name.startswith(REPORTS)}


def compatible(perturbation: Perturbation | None, bundle: Bundle) -> Perturbation:
    """The settings to use: the bundle's, or the caller's where the graphs can follow them.

    Raises:
        InputError: a setting that is fixed inside the graphs differs.
    """
    exported = bundle.manifest.perturbation
    if perturbation is None:
        return exported
    if not isinstance(perturbation, Perturbation):
        raise InputError(
            f"perturbation is a {kind_of(perturbation)}; expected a Perturbation, such as Perturbation(alpha=4.0)",
            code="perturbation-kind",
        )
    for name in FIXED_IN_GRAPHS:
        got, fixed = getattr(perturbation, name), getattr(exported, name)
        if got != fixed:
            raise InputError(
                f"perturbation {name} is {got!r}, this bundle's graphs were exported with {fixed!r}; "
                "use that, or export again",
                code="perturbation-fixed",
            )
    return perturbation


def one_row(image_tokens: Floats | DeviceArray, row: int) -> Floats | DeviceArray:
    """[B, N, C] → [1, N, C], where it lies."""
    if isinstance(image_tokens, DeviceArray):
        return image_tokens.rows(row, row + 1)
    return image_tokens[row : row + 1]


def calls(counts: Sequence[int] | npt.NDArray[np.int64], most: int, *, alone: bool = False) -> Iterator[slice]:
    """Rows in parts of at most `most`: those of one group stay together where they fit, and where `alone`, a part holds
    rows of one group only. `counts`: sizes of the groups."""
    begin = end = 0
    for count in counts:
        if end > begin and (alone or end + count - begin > most):
            yield slice(begin, end)
            begin = end
        end += int(count)
        while end - begin > most:
            yield slice(begin, begin + most)
            begin += most
    if end > begin:
        yield slice(begin, end)


def by_length(tokens: TokenizedTexts, most: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of `tokens` in batches of at most `most`, the shortest texts first."""
    order = np.argsort(tokens.lengths, kind="stable")
    for start in range(0, len(order), most):
        yield order[start : start + most]


def token_slots(tokens: TokenizedTexts) -> dict[str, npt.NDArray[np.int64]]:
    """Token ids and mask [T, L] by slot."""
    return {TOKEN_IDS: tokens.input_ids, TOKEN_MASK: tokens.attention_mask}


def image_name(image: ImageInput, number: int) -> str:
    """What an error calls an image: its path, or its place in the call."""
    return str(image) if isinstance(image, str | Path) else f"image {number}"
