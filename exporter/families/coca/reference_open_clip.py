"""Stock open_clip as a reference, in a separate process and environment (`make open-clip-env`).

open_clip needs torchvision, whose wheels do not load beside a CPU torch: `open_clip_worker.py` runs with the other
environment's interpreter (see `qpert.exporter.references.worker`). It reads the user's own checkpoint and pictures,
with open_clip's constructor, loader, preprocessing and tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpert.exporter.references.worker import Environment, WorkerProcess

WORKER = Path(__file__).resolve().with_name("open_clip_worker.py")
ENVIRONMENT = Environment("open_clip", "open-clip", "open_clip", "QPERT_OPEN_CLIP", "open-clip-env")
CHOICES = ("threshold", "preserve_norm", "centre_keys", "stages")


class OpenClipReference:
    """A stock open_clip `CoCa` in another process. `close` ends it. A context manager."""

    name = "open_clip"

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        model: Mapping[str, Any],
        preprocess: Mapping[str, Any],
        *,
        image_size: int,
        threshold: float = 0.95,
        preserve_norm: bool = False,
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> OpenClipReference:
        """Start open_clip and load a checkpoint, in float32 on the CPU.

        Args:
            model: open_clip's `model_cfg`.
            preprocess: open_clip's `preprocess_cfg`; what it omits has open_clip's defaults.
            image_size: if it differs from the checkpoint's, open_clip resizes the position embedding.

        Raises:
            UnavailableError: the environment is missing or incomplete, or the process died.
            CheckpointError: open_clip rejects the checkpoint.
        """
        reference = cls(WorkerProcess(ENVIRONMENT, WORKER))
        choices = dict(zip(CHOICES, (threshold, preserve_norm, centre_keys, stages), strict=True))
        asked = {"checkpoint": str(checkpoint.resolve()), "model": dict(model), "preprocess": dict(preprocess)}
        try:
            reference._worker.ask({"open": asked | {"image_size": image_size} | choices})
        except BaseException:
            reference.close()
            raise
        return reference

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of `vision`, `image_query` or `text`, named and shaped as the exported graph's, float32.

        Without boxes, or with none, it is the stock model. Texts of any length are padded to the full one, as stock
        expects.
        """
        return self._worker.arrays({"graph": graph}, inputs)

    def pixels(self, file: Path) -> np.ndarray:
        """float32 [3, S, S] of an image file, by open_clip's own preprocessing."""
        found: np.ndarray = self._worker.arrays({"pixels": str(Path(file).resolve())})["pixels"]
        return found

    def token_ids(self, texts: Sequence[str], length: int) -> list[np.ndarray]:
        """int64 [L] each, without padding, by open_clip's own tokenizer."""
        ids = self._worker.arrays({"texts": list(texts), "length": length})["ids"]
        return [row[: int(np.flatnonzero(row)[-1]) + 1] for row in ids]  # the end of text is not 0

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        self._worker.close()

    def __enter__(self) -> OpenClipReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
