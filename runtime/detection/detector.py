"""`Detector`: a detector bundle behind `BoxSource`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from qpert.runtime.bundle.roles import BOX_CORNERS, IMAGE_SIZES, LABEL_IDS, PIXELS, SCORES
from qpert.runtime.detection.bundle import DetectorBundle, largest_batch
from qpert.runtime.detection.geometry import image_sizes
from qpert.runtime.detection.options import DetectionOptions, suppressed
from qpert.runtime.errors import BundleError, ImageError, InputError
from qpert.runtime.inputs.arguments import as_count
from qpert.runtime.inputs.boxes import Boxes
from qpert.runtime.inputs.images import load_image
from qpert.runtime.retrieval.bound_graph import BoundGraph
from qpert.runtime.sessions.open import open_sessions

if TYPE_CHECKING:
    from PIL.Image import Image


class Detector:
    """A detector without PyTorch. A context manager; a `BoxSource`.

    Example:
        >>> with Detector.open("detector", threshold=0.5) as detector, Retriever.open("bundle") as retriever:
        ...     features = retriever.encode_images(["street.jpg"], boxes=detector)
    """

    def __init__(
        self,
        bundle: DetectorBundle,
        provider: str = "cpu",
        options: DetectionOptions | None = None,
        *,
        threads: int = 0,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.options = options or self.manifest.defaults
        self.provider, self.threads = provider, as_count(threads, "threads", least=0)
        self._classes = self.options.class_ids(self.manifest.labels)
        self._folder = bundle.folder.absolute()
        self._session = open_sessions(bundle, provider, threads=threads)[self.manifest.graph.name]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        provider: str = "cpu",
        *,
        threshold: float | None = None,
        max_boxes: int | None = None,
        classes: Sequence[str] | None = None,
        suppression: float | None = None,
        threads: int = 0,
    ) -> Detector:
        """Open a detector bundle; options that are not given have the bundle's own defaults.

        Args:
            folder: what `qpert export detector` made.
            provider: `cpu`, `cuda`, `openvino`, `tensorrt` or `rtx`; exactly this one is used.
            threshold, max_boxes, classes, suppression: see `DetectionOptions`.
            threads: CPU threads for one operator; 0 leaves it to the runtime.

        Raises:
            BundleError: no detector bundle, altered, unsafe, or of a newer schema.
            UnavailableError: this machine lacks the provider.
            InputError: an option out of range, or a class that the detector does not know.
        """
        bundle = DetectorBundle.open(folder)
        options = bundle.manifest.defaults.changed(
            threshold=threshold, max_boxes=max_boxes, classes=classes, suppression=suppression
        )
        return cls(bundle, provider, options, threads=threads)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides this detector's boxes: its graph, its preprocessing and the options."""
        return {
            "detector": self.manifest.checkpoint.name,
            "graph": self.manifest.files[self.manifest.graph.file],
            "preprocessing": self.manifest.preprocessing.to_dict(),
            "options": self.options.to_dict(),
        }

    def boxes(self, images: Sequence[Image]) -> list[Boxes | None]:
        """One `Boxes` for each picture, in its own pixels, the best first, with scores and label names.

        Args:
            images: PIL pictures in RGB, EXIF orientation already applied. (Others are converted as everywhere in
                qpert, which orients them: the boxes are then in the pixels of the oriented picture.)

        Returns:
            None where nothing was found.

        Raises:
            ImageError: a picture that cannot be used; the message gives its place.
            BundleError: the graph returned what is no detection.
        """
        if not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise ImageError(
                f"images is a {type(images).__name__}; expected a sequence of pictures: put it in a list",
                code="images-kind",
            )
        step = largest_batch(self._session.spec)
        found: list[Boxes | None] = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            loaded = [load_image(image, name=f"image {start + place}") for place, image in enumerate(part)]
            rows = self.detections(loaded)
            found += [self._chosen(*row, image.size) for row, image in zip(rows, loaded, strict=True)]
        return found

    def detections(self, images: Sequence[Image]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All that the graph gives for pictures of one call: boxes [K,4] in pixels, scores [K] and label ids [K].

        Nothing is clipped, sorted or left out; `boxes` chooses from this.
        """
        slots = {PIXELS: self.manifest.preprocessing.pixel_values(images), IMAGE_SIZES: image_sizes(images)}
        outputs: Mapping[str, np.ndarray] = BoundGraph(self._session).run(slots)
        return list(zip(outputs[BOX_CORNERS], outputs[SCORES], outputs[LABEL_IDS], strict=True))

    def _chosen(self, xyxy: np.ndarray, scores: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> Boxes | None:
        """The detections of one picture that the options keep, the best first, clipped to the picture."""
        if not np.isfinite(scores).all() or labels.min() < 0 or labels.max() >= len(self.manifest.labels):
            raise BundleError(
                f"the detector {self._folder} gave scores that are not finite, or label ids outside "
                f"0…{len(self.manifest.labels) - 1}; export it again, in fp32 if it is not",
                code="detector-output",
            )
        wanted = scores > self.options.threshold
        if self._classes is not None:
            wanted &= np.isin(labels, self._classes)
        wanted &= np.isfinite(xyxy).all(axis=1)
        clipped = np.clip(xyxy.astype(np.float64), 0, [*size, *size])
        wanted &= (clipped[:, 0] < clipped[:, 2]) & (clipped[:, 1] < clipped[:, 3])  # else nothing is in the picture
        best_first = np.argsort(-scores, kind="stable")
        order = best_first[wanted[best_first]]
        kept = suppressed(clipped, order, self.options.suppression, self.options.max_boxes)
        if not len(kept):
            return None
        names = tuple(self.manifest.labels[label] for label in labels[kept].tolist())
        return Boxes(clipped[kept], size, scores=scores[kept].astype(np.float64), labels=names)

    def close(self) -> None:
        """Release the session; the detector cannot be used afterwards."""
        self._session.close()

    def __reduce__(self) -> tuple[Callable[..., Detector], tuple[object, ...]]:
        return reopened, (self._folder, self.manifest.files, self.provider, self.options, self.threads)

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def reopened(
    folder: Path, files: Mapping[str, str], provider: str, options: DetectionOptions, threads: int
) -> Detector:
    """What a pickled or copied detector becomes. Raises BundleError where its folder holds another one by now."""
    bundle = DetectorBundle.open(folder)
    if dict(bundle.manifest.files) != dict(files):
        raise BundleError(f"{folder} was replaced since the detector was opened; open it again", code="bundle-replaced")
    return Detector(bundle, provider, options, threads=threads)


def parse_classes(text: str | None) -> tuple[str, ...] | None:
    """Split `--classes person,traffic light`; None stays None. Raises InputError for a list without names."""
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise InputError(
            f"got the classes {text!r}, expected label names with commas between: person,cup", code="detection-class"
        )
    return names
