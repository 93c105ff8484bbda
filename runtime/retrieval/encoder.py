"""From images, boxes and texts to features: preprocessing, the four graphs, and batching within the bundle's limits.

Calls larger than the bundle's profile are split; since a row's result never depends on its neighbours (`qpert verify`
checks it), that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import REPORTS, Bundle
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.errors import BoxError, BundleError, InputError, LimitError
from qpert.runtime.inputs.arguments import as_boxes, as_count, as_images, as_texts, kind_of
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import ImageInput, load_image, preprocess_images
from qpert.runtime.inputs.perturbation import Perturbation, box_weights, object_masks
from qpert.runtime.inputs.text import TokenizedTexts, Tokenizer
from qpert.runtime.sessions.device import DeviceArray, on_host
from qpert.runtime.sessions.open import Array, open_sessions, run_on_device

Floats = npt.NDArray[np.floating]


class ImageFeatures:
    """What is kept of B images.

    query_embeds: float32 [B, Q, E], unit length, for ITC. image_embeds: [B, N, C] in the bundle's feature dtype, for
    ITM. object_masks float32 [B, O, N] and box_weights float32 [B, O] only where ITM is perturbed too.

    On a GPU, features of one call of the graphs stay in its memory: ITM takes them from there (`for_matching`), and
    they are copied to the host when `image_embeds` is first read.
    """

    def __init__(
        self,
        query_embeds: Floats,
        image_embeds: Floats | DeviceArray,
        object_masks: Floats | None = None,
        box_weights: Floats | None = None,
    ) -> None:
        self.query_embeds = query_embeds
        self.for_matching: Array = image_embeds
        self.object_masks = object_masks
        self.box_weights = box_weights

    @cached_property
    def image_embeds(self) -> Floats:
        return on_host(self.for_matching)

    def __len__(self) -> int:
        return len(self.query_embeds)

    def rows(self, index: slice | Sequence[int] | npt.NDArray[np.int64]) -> ImageFeatures:
        """The features of some of the images, in that order. A slice of neighbours stays where it is."""

        def pick(array: Floats | None) -> Floats | None:
            return None if array is None else array[index]

        return ImageFeatures(
            self.query_embeds[index], self._embeds_of(index), pick(self.object_masks), pick(self.box_weights)
        )

    def _embeds_of(self, index: slice | Sequence[int] | npt.NDArray[np.int64]) -> Floats | DeviceArray:
        if isinstance(self.for_matching, DeviceArray) and isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self.for_matching.rows(start, max(start, stop))
        return self.image_embeds[index]


class Encoder:
    """The four graphs of a bundle behind three methods. `close` releases them.

    A pickled or copied encoder opens its bundle again, with the same provider, settings and threads; so does one that a
    forked process inherits, when it is first used there (on a GPU that is an error, which says what to do).
    """

    def __init__(
        self, bundle: Bundle, provider: str, perturbation: Perturbation | None = None, *, threads: int = 0
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        threads = as_count(threads, "threads", least=0)
        self.provider, self.threads, self.is_closed = provider, threads, False
        self._folder = bundle.folder.absolute()
        self.perturbation = compatible(perturbation, bundle)
        self.tokenizer = Tokenizer.open(
            bundle.path(self.manifest.tokenizer.file), max_length=self.manifest.tokenizer.max_length
        )
        self.sessions = open_sessions(bundle, provider, threads=threads)

    def close(self) -> None:
        """Release the sessions; the encoder cannot be used afterwards."""
        self.is_closed = True
        for session in self.sessions.values():
            session.close()

    def __reduce__(self) -> tuple[Callable[..., Encoder], tuple[object, ...]]:
        if self.is_closed:
            raise InputError("the encoder is closed and cannot be copied; open the bundle again", code="encoder-closed")
        return reopened, (self._folder, self.manifest, self.provider, self.perturbation, self.threads)

    def limit(self, graph: str, axis: str) -> int:
        """The longest that `axis` of `graph` may be in one call: the limit of the bundle, or of a narrower engine."""
        return self.sessions[graph].spec.ranges[axis].max

    def encode_images(self, images: Iterable[ImageInput], boxes: Iterable[Boxes | None] | None = None) -> ImageFeatures:
        """B images, with or without boxes, to features; see `Retriever.encode_images`."""
        images = as_images(images)
        given = self._check_boxes(len(images), boxes)
        step = self.limit("vision", "B")
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
        tokens = self.tokenize(texts)
        result: npt.NDArray[np.float32] | None = None
        for rows in by_length(tokens, self.limit("text", "T")):
            output = self.sessions["text"].run(trimmed(tokens, rows))["text_embeds"]
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
        """
        if not isinstance(features, ImageFeatures):
            raise InputError(
                f"features are a {kind_of(features)}; expected what encode_images returns", code="features-kind"
            )
        tokens = self.tokenize(texts)
        if not len(tokens):
            raise InputError("got no texts to match, expected at least one", code="no-texts")
        scores = np.empty((len(features), len(tokens)), dtype=np.float32)
        images_a_call = max(1, min(self.limit("itm", "I"), self.limit("itm", "T") // len(tokens)))
        for start in range(0, len(features), images_a_call):
            part = features.rows(slice(start, start + images_a_call))
            for rows in by_length(tokens, self.limit("itm", "T")):
                scores[start : start + len(part), rows] = self._match(part, trimmed(tokens, rows))
        return scores

    def _match(self, features: ImageFeatures, tokens: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        inputs: dict[str, Array] = {"image_embeds": features.for_matching}
        for name, array in tokens.items():
            inputs[name] = np.ascontiguousarray(np.broadcast_to(array, (len(features), *array.shape)))
        if self.manifest.graphs["itm"].takes_boxes:
            if features.object_masks is None or features.box_weights is None:
                raise InputError(
                    "this bundle perturbs ITM too, and the features hold no masks; encode the images again"
                )
            inputs |= {"object_masks": features.object_masks, "box_weights": features.box_weights}
        return self.sessions["itm"].run(inputs)["itm_scores"]

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
                    "give boxes in the picture's own pixels (after EXIF rotation)"
                )
        pixel_values = preprocess_images(loaded, self.manifest.preprocessing)
        # On a GPU the features go from graph to graph without a way over the host.
        image_embeds = run_on_device(self.sessions["vision"], {"pixel_values": pixel_values})["image_embeds"]
        return self.encode_features(image_embeds, boxes)

    def encode_features(self, image_embeds: Floats | DeviceArray, boxes: Sequence[Boxes | None]) -> ImageFeatures:
        """The second half of `encode_images`: image_embeds [B, N, C] (B within the profile) and boxes → features."""
        graphs = self.manifest.graphs
        inputs: dict[str, Array] = {"image_embeds": image_embeds}
        objects: dict[str, np.ndarray] = {}
        if graphs["image_query"].takes_boxes:
            masks = object_masks(
                boxes,
                grid=self.manifest.grid,
                image_size=self.manifest.preprocessing.size,
                coverage=self.perturbation.coverage,
            )
            objects = {"object_masks": masks, "box_weights": box_weights(boxes, self.perturbation)}
        query_embeds = self.sessions["image_query"].run(inputs | objects)["query_embeds"]
        kept = objects if graphs["itm"].takes_boxes else {}
        return ImageFeatures(query_embeds, image_embeds, kept.get("object_masks"), kept.get("box_weights"))

    def _check_boxes(self, count: int, boxes: Iterable[Boxes | None] | None) -> Sequence[Boxes | None]:
        given = as_boxes(boxes, count)
        graph = self.sessions["image_query"].spec
        most = max((len(b) for b in given if b is not None), default=0)
        if most and not graph.takes_boxes:
            raise InputError(
                "this bundle was exported with --perturb none and takes no boxes; export it with --perturb itc"
            )
        if most and most > graph.ranges["O"].max:
            raise LimitError(
                f"an image has {most} boxes, this bundle takes up to {graph.ranges['O'].max}; keep the best ones, or "
                "export again with a larger --max-boxes"
            )
        return given


def reopened(folder: Path, manifest: Manifest, provider: str, perturbation: Perturbation, threads: int) -> Encoder:
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
    return Encoder(bundle, provider, perturbation, threads=threads)


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
    for name in ("threshold", "stages", "preserve_norm"):
        got, fixed = getattr(perturbation, name), getattr(exported, name)
        if got != fixed:
            raise InputError(
                f"perturbation {name} is {got!r}, this bundle's graphs were exported with {fixed!r}; "
                "use that, or export again"
            )
    return perturbation


def by_length(tokens: TokenizedTexts, most: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of `tokens` in batches of at most `most`, the shortest texts first."""
    order = np.argsort(tokens.attention_mask.sum(axis=1), kind="stable")
    for start in range(0, len(order), most):
        yield order[start : start + most]


def trimmed(tokens: TokenizedTexts, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
    """Some rows as graph inputs [T, L], cut to the longest of them."""
    length = int(tokens.attention_mask[rows].sum(axis=1).max())
    return {
        "input_ids": np.ascontiguousarray(tokens.input_ids[rows, :length]),
        "attention_mask": np.ascontiguousarray(tokens.attention_mask[rows, :length]),
    }


def concatenated(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """Features of several chunks as one; masks are padded to the largest number of boxes."""
    if len(parts) == 1:
        return parts[0]
    most = max((part.box_weights.shape[1] for part in parts if part.box_weights is not None), default=0)

    def padded(array: Floats | None) -> Floats | None:
        if array is None:
            return None
        missing = [(0, most - length if axis == 1 else 0) for axis, length in enumerate(array.shape)]
        return np.pad(array, missing)

    def joined(arrays: list[Floats | None]) -> Floats | None:
        present = [array for array in arrays if array is not None]
        return np.concatenate(present) if present else None

    return ImageFeatures(
        np.concatenate([part.query_embeds for part in parts]),
        np.concatenate([part.image_embeds for part in parts]),
        joined([padded(part.object_masks) for part in parts]),
        joined([padded(part.box_weights) for part in parts]),
    )


def image_name(image: ImageInput, number: int) -> str:
    """What an error calls an image: its path, or its place in the call."""
    return str(image) if isinstance(image, str | Path) else f"image {number}"
