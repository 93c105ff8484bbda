"""The work folder of an evaluation: what it is bound to, and whether it fits on the disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qpert.runtime.bundle.roles import IMAGE_TOKENS, IMAGE_VECTORS
from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.evaluation.inputs import EvaluationData
from qpert.runtime.files import cache_folder, write_atomically
from qpert.runtime.gallery.spec import bundle_identity
from qpert.runtime.progress import Progress
from qpert.runtime.retrieval.encoder import Encoder

BINDING_NAME = "evaluation.json"
DIFFERENCES = {
    "bundle": "another bundle",
    "dataset": "another data set, split or --limit",
    "boxes": "other boxes",
    "perturbation": "other perturbation settings",
    "provider": "another provider",
    "qpert": "another version of qpert",
}
"""How to describe a difference in each field of `Binding` to the user."""


@dataclass(frozen=True)
class Binding:
    """Everything that the numbers in a work folder depend on. The length of the shortlists is not included: another
    `--rerank` reuses images, texts, and the pairs of images whose texts stay the same."""

    bundle: str
    dataset: str
    boxes: str
    perturbation: dict[str, Any]
    provider: str
    qpert: str

    @classmethod
    def of(cls, encoder: Encoder, data: EvaluationData, provider: str) -> Binding:
        return cls(
            bundle=bundle_identity(encoder.manifest),
            dataset=data.dataset_digest(),
            boxes=data.boxes_digest(),
            perturbation=encoder.perturbation.to_dict(),
            provider=provider,
            qpert=version("qpert"),
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def default_folder(self) -> Path:
        """In the cache, one folder per binding, so the same command finds it again."""
        return cache_folder() / "evaluations" / self.digest[:16]


def open_work(folder: Path, binding: Binding) -> Path:
    """Create the work folder, or reuse one with the same binding.

    Raises:
        InputError: it belongs to another evaluation, contains other files, or cannot be created.
    """
    path = folder / BINDING_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(folder.iterdir()):
                raise InputError(
                    f"the work folder {folder} holds other files; give --work a new or an empty folder",
                    code="work-other-files",
                )
            write_atomically(path, json.dumps(asdict(binding), indent=1) + "\n")
            return folder
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the work folder {folder} cannot be used ({error}); give --work another one", code="work-unusable"
        ) from error
    ours = asdict(binding)
    differing = [DIFFERENCES[one.name] for one in fields(Binding) if dict_of(found).get(one.name) != ours[one.name]]
    if differing:
        raise InputError(
            f"the work folder {folder} belongs to an evaluation with {', '.join(differing)}; "
            "give --work another folder, or delete this one",
            code="work-other-evaluation",
        )
    return folder


@contextmanager
def resumable(folder: Path, progress: Progress) -> Iterator[None]:
    """If the user interrupts the work inside, report where the finished part is."""
    try:
        yield
    except KeyboardInterrupt:
        progress.say(f"finished work is kept in {folder}; the same command resumes it")
        raise


def dict_of(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def check_room(folder: Path, encoder: Encoder, images: int) -> None:
    """Raise UnavailableError if the features of that many images do not fit on the disk of `folder`.

    Files already in the folder count as free space: they are part of the final size.
    """
    needed = images * feature_bytes(encoder)
    kept = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed > free + kept:
        raise UnavailableError(
            f"the features of {images:,} images take {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; "
            "give --work a folder on a larger disk",
            code="work-disk-full",
        )


def feature_bytes(encoder: Encoder) -> int:
    """Size in bytes of one image's features for ITM and ITC."""
    import numpy as np

    total = 0
    manifest = encoder.manifest
    for output in (manifest.image_tower.output(IMAGE_TOKENS), manifest.query_head.output(IMAGE_VECTORS)):
        numbers = int(np.prod([length for length in output.shape if isinstance(length, int)]))
        total += numbers * np.dtype(output.dtype).itemsize
    return total
