"""`Retriever`: the class that applications hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.detection.source import BoxSource, boxes_of
from qpert.runtime.filters.tree import Condition
from qpert.runtime.gallery.hits import Hit, TextHit
from qpert.runtime.gallery.search import Gallery, Searchable, TextGallery, search_images, search_texts
from qpert.runtime.inputs.arguments import as_count, as_texts
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import ImageInput, load_image
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.features import ImageFeatures
from qpert.runtime.retrieval.scores import itc_scores

if TYPE_CHECKING:
    from qpert.runtime.gallery.reader import StoredGallery

__all__ = ["Gallery", "Hit", "Retriever", "TextGallery", "TextHit"]


class Retriever:
    """Two-stage image-text retrieval over one bundle. A context manager.

    Example:
        >>> with Retriever.open("bundle", provider="cpu") as retriever:
        ...     features = retriever.encode_images(["a.jpg", "b.jpg"])
        ...     scores = retriever.itc_scores(features.query_embeds, retriever.encode_texts(["a dog"]))
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        provider: str = "cpu",
        *,
        perturbation: Perturbation | None = None,
        threads: int = 0,
        spin: bool = True,
    ) -> Retriever:
        """Open a bundle.

        Args:
            bundle: the folder that `qpert export` made.
            provider: `cpu`, `cuda`, `openvino`, `tensorrt` or `rtx`; exactly this one is used.
            perturbation: other settings than the bundle's defaults, as far as the graphs can follow.
            threads: CPU threads for one operator; 0 leaves it to the runtime.
            spin: whether idle threads of ONNX Runtime wait by spinning: soonest for a lone caller, wasteful where
                several threads of the application share the retriever.

        Raises:
            BundleError: not a bundle, altered, unsafe, or of a newer schema.
            UnavailableError: this machine lacks the provider.
            InputError: a perturbation setting that the graphs fix otherwise.
        """
        return cls(Encoder(Bundle.open(bundle), provider, perturbation, threads=threads, spin=spin))

    def encode_images(
        self, images: Iterable[ImageInput], boxes: Iterable[Boxes | None] | BoxSource | None = None
    ) -> ImageFeatures:
        """Encode B images.

        Args:
            images: paths, PIL images or uint8 arrays [H, W, 3]; any iterable of them, or one array [B, H, W, 3].
            boxes: for each image its `Boxes` in pixels, or None; images may have different numbers of boxes. Or a
                `BoxSource`, such as a `Detector`, which finds them.

        Returns:
            `.query_embeds` float32 [B, Q, E] and `.image_embeds` [B, N, C]. With reduction `each` Q counts the queries
            of all sets of an image, see `ImageFeatures`.

        Raises:
            ImageError, BoxError: an image or box that cannot be used; the message names it.
            LimitError: more boxes than the bundle takes.
        """
        return self.encoder.encode_images(images, boxes)

    def encode_texts(self, texts: Iterable[str]) -> npt.NDArray[np.float32]:
        """Encode T texts → float32 [T, E] of unit length. Raises TextError for an empty text."""
        return self.encoder.encode_texts(texts)

    def itc_scores(
        self, query_embeds: npt.NDArray[np.float32], text_embeds: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Contrastive scores [B, T] of [B, Q, E] and [T, E]; see `qpert.runtime.retrieval.scores.itc_scores`."""
        return itc_scores(query_embeds, text_embeds)

    def itm_scores(self, features: ImageFeatures, texts: Iterable[str]) -> npt.NDArray[np.float32]:
        """Match logits [B, T] of every image with every text."""
        return self.encoder.itm_scores(features, texts)

    def search(
        self,
        text: str,
        gallery: Searchable,
        *,
        k: int = 10,
        rerank: int | None = None,
        exact: bool = False,
        where: str | Condition | None = None,
    ) -> list[Hit]:
        """The best `k` images for a text: ITC over the whole gallery, ITM over the best `rerank` of it.

        Re-ranked images come first, by ITM + ITC; the others follow by ITC alone. `k` larger than the gallery returns
        the whole gallery. `rerank` None is 64, or 0 where the bundle has no pair scorer; 0 leaves ITM out.

        `where` is a filter on the images' metadata, such as `album = "x" and year >= 2020`: only images of which it is
        true are searched, so the answer is exact for them. See `qpert.runtime.filters`.

        A large gallery on disk is scanned in 8 bits and then exactly, with the same result as the exact scan alone,
        which `exact` asks for. `gallery` is an open one: `Gallery`, or what `open_gallery` returns (a path is not
        opened here, as that would be done anew for each search).

        Raises:
            InputError: `k` below 1, `rerank` below 0, or above 0 without a pair scorer; scores that are NaN; a filter
                that cannot be read (code `filter`).
            TextError: an empty text.
            GalleryError: the gallery was made with another bundle or other settings, or is damaged.
        """
        return self.search_batch([text], gallery, k=k, rerank=rerank, exact=exact, where=where)[0]

    def search_batch(
        self,
        texts: Iterable[str],
        gallery: Searchable,
        *,
        k: int = 10,
        rerank: int | None = None,
        exact: bool = False,
        where: str | Condition | None = None,
    ) -> list[list[Hit]]:
        """`search` for several texts: one scan of the gallery, and images that their shortlists share are matched with
        all of these texts at once."""
        return search_images(self.encoder, texts, gallery, k=k, rerank=rerank, exact=exact, where=where)

    def search_texts(
        self,
        image: ImageInput,
        texts: Iterable[str] | TextGallery,
        *,
        boxes: Boxes | BoxSource | None = None,
        k: int = 10,
        rerank: int | None = None,
    ) -> list[TextHit]:
        """The best `k` texts for an image: ITC over all texts, ITM over the best `rerank`; ranked as in `search`.

        `texts`: strings, or a `TextGallery` (see `text_gallery`) where the same texts are searched more than once.
        `boxes`: those of the image, or a `BoxSource` such as a `Detector`.

        Raises:
            InputError: `k` below 1, `rerank` below 0, or above 0 without a pair scorer; scores that are NaN.
            ImageError, BoxError, TextError: what cannot be encoded.
        """
        as_count(k, "k", least=1)  # refused before an image is encoded
        self.encoder.shortlist(rerank)
        gallery = texts if isinstance(texts, TextGallery) else self.text_gallery(texts)
        if isinstance(boxes, BoxSource):
            image = load_image(image)
            (boxes,) = boxes_of(boxes, [image])
        features = self.encode_images([image], [boxes])
        return search_texts(self.encoder, features, gallery, boxes=boxes, k=k, rerank=rerank)

    def text_gallery(self, texts: Iterable[str]) -> TextGallery:
        """Encode texts once, to search them with many images."""
        listed = as_texts(texts)
        return TextGallery(tuple(listed), self.encode_texts(listed))

    def open_gallery(self, folder: str | Path) -> StoredGallery:
        """Open a gallery that `qpert index` made with this bundle. A context manager; raises GalleryError."""
        from qpert.runtime.gallery.reader import StoredGallery

        return StoredGallery.open(folder, self.encoder)

    def close(self) -> None:
        """Release the sessions; the retriever cannot be used afterwards."""
        self.encoder.close()

    def __enter__(self) -> Retriever:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
