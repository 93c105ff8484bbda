"""`Retriever`: the class that applications hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from qpert.runtime.boxes import Boxes
from qpert.runtime.bundle import Bundle
from qpert.runtime.encoder import Encoder, ImageFeatures
from qpert.runtime.errors import InputError
from qpert.runtime.images import ImageInput
from qpert.runtime.perturbation import Perturbation
from qpert.runtime.scores import final_scores, itc_scores, ranking


@dataclass(frozen=True)
class Hit:
    """One result. `rank_itc` counts from 1; `itm` is None below the re-ranked shortlist, where `score` is `itc`."""

    image: str
    score: float
    itc: float
    itm: float | None
    rank_itc: int


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images in memory that can be searched: a name for each row of `features`."""

    images: tuple[str, ...]
    features: ImageFeatures

    def __post_init__(self) -> None:
        if len(self.images) != len(self.features):
            raise InputError(
                f"got {len(self.images)} names for {len(self.features)} images' features; give each image one name"
            )


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
    ) -> Retriever:
        """Open a bundle.

        Args:
            bundle: the folder that `qpert export` made.
            provider: `cpu`, `cuda`, `tensorrt` or `rtx`; exactly this one is used.
            perturbation: other settings than the bundle's defaults, as far as the graphs can follow.
            threads: CPU threads for one operator; 0 leaves it to the runtime.

        Raises:
            BundleError: not a bundle, altered, unsafe, or of a newer schema.
            UnavailableError: this machine lacks the provider.
            InputError: a perturbation setting that the graphs fix otherwise.
        """
        return cls(Encoder(Bundle.open(bundle), provider, perturbation, threads=threads))

    def encode_images(self, images: Sequence[ImageInput], boxes: Sequence[Boxes | None] | None = None) -> ImageFeatures:
        """Encode B images.

        Args:
            images: paths, PIL images or uint8 arrays [H, W, 3].
            boxes: for each image its `Boxes` in pixels, or None; images may have different numbers of boxes.

        Returns:
            `.query_embeds` float32 [B, Q, E] and `.image_embeds` [B, N, C].

        Raises:
            ImageError, BoxError: an image or box that cannot be used; the message names it.
            LimitError: more boxes than the bundle takes.
        """
        return self.encoder.encode_images(images, boxes)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Encode T texts → float32 [T, E] of unit length. Raises TextError for an empty text."""
        return self.encoder.encode_texts(texts)

    def itc_scores(
        self, query_embeds: npt.NDArray[np.float32], text_embeds: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Contrastive scores [B, T] of [B, Q, E] and [T, E]; see `qpert.runtime.scores.itc_scores`."""
        return itc_scores(query_embeds, text_embeds)

    def itm_scores(self, features: ImageFeatures, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Match logits [B, T] of every image with every text."""
        return self.encoder.itm_scores(features, texts)

    def search(self, text: str, gallery: Gallery, *, k: int = 10, rerank: int = 64) -> list[Hit]:
        """The best `k` images for a text: ITC over the whole gallery, ITM over the best `rerank` of it.

        Re-ranked images come first, by ITM + ITC; the others follow by ITC alone. `k` larger than the gallery returns
        the whole gallery. `rerank=0` leaves ITM out.

        Raises:
            InputError: `k` below 1 or `rerank` below 0.
            TextError: an empty text.
        """
        if k < 1 or rerank < 0:
            raise InputError(f"got k={k} and rerank={rerank}, expected k of at least 1 and rerank of at least 0")
        itc = itc_scores(gallery.features.query_embeds, self.encode_texts([text]))[:, 0]
        order = ranking(itc)
        shortlist = order[:rerank]
        matched: dict[int, float] = {}
        if len(shortlist):
            itm = self.itm_scores(gallery.features.rows(shortlist), [text])[:, 0]
            matched = dict(zip(shortlist.tolist(), itm.tolist(), strict=True))
            final = final_scores(itm, itc[shortlist])
            order = np.concatenate([shortlist[ranking(final)], order[len(shortlist) :]])
        place = {int(image): rank for rank, image in enumerate(ranking(itc), start=1)}
        return [_hit(gallery.images[i], float(itc[i]), matched.get(int(i)), place[int(i)]) for i in order[:k]]

    def close(self) -> None:
        """Release the sessions; the retriever cannot be used afterwards."""
        self.encoder.close()

    def __enter__(self) -> Retriever:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hit(image: str, itc: float, itm: float | None, rank_itc: int) -> Hit:
    score = itc if itm is None else float(final_scores(np.array(itm, np.float32), np.array(itc, np.float32)))
    return Hit(image, score, itc, itm, rank_itc)
