"""ITC scores of many images under many settings, on disk until the settings of one threshold are ranked.

They are computed image by image (an image's projectors serve all settings) and read setting by setting (recall needs
all images). One file holds some images under all settings and is written atomically, so an interrupted search resumes
after the last complete file.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qpert.calibration.perturbation.grid import Setting
from qpert.runtime.errors import UnavailableError
from qpert.runtime.files import write_atomically

Floats = npt.NDArray[np.float32]

BLOCK_BYTES = 1 << 26
PLAN_NAME = "settings.json"


class ScoreBlocks:
    """Files `<first image>.npy`, float32 [S, n, T], in a folder that records its settings.

    `settings` may include more than were requested: those of an earlier run whose files are still valid.
    """

    def __init__(self, folder: Path, settings: Sequence[Setting], *, images: int, texts: int) -> None:
        self.folder = folder
        self.images = images
        self.settings = self._plan(settings)
        self.step = max(1, BLOCK_BYTES // (4 * texts * len(self.settings)))

    def _plan(self, wanted: Sequence[Setting]) -> tuple[Setting, ...]:
        """The settings of the existing files if they include all `wanted`; else the files are deleted."""
        plan = self.folder / PLAN_NAME
        try:
            found = tuple(Setting(**values) for values in json.loads(plan.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            found = ()
        if set(wanted) <= set(found):
            return found
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_atomically(plan, json.dumps([setting.__dict__ for setting in wanted]))
        return tuple(wanted)

    def fill(self, compute: Callable[[int], Floats], advance: Callable[[int], None]) -> None:
        """Compute what is missing: `compute` gives one image's [S, T]; `advance` gets the count of finished images.

        Raises UnavailableError for a full disk.
        """
        for start in range(0, self.images, self.step):
            rows = range(start, min(start + self.step, self.images))
            if self._read(start) is None:
                stream = io.BytesIO()
                np.save(stream, np.stack([compute(row) for row in rows], axis=1))
                try:
                    write_atomically(self._file(start), stream.getvalue())
                except OSError as error:
                    raise UnavailableError(
                        f"{self._file(start)} cannot be written ({error.strerror}); free some space and run the same "
                        "command again: it resumes from there",
                        code="score-cache-write",
                    ) from error
            advance(len(rows))

    def of(self, setting: Setting) -> Floats:
        """float32 [B, T] of one setting, after `fill`."""
        place = self.settings.index(setting)
        parts = [self._read(start) for start in range(0, self.images, self.step)]
        return np.concatenate([part[place] for part in parts if part is not None])

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, start: int) -> Path:
        return self.folder / f"{start:07}.npy"

    def _read(self, start: int) -> Floats | None:
        """One file, memory-mapped; None if it is missing or has another shape than planned."""
        try:
            block: Floats = np.load(self._file(start), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        expected = (len(self.settings), min(self.step, self.images - start))
        return block if block.dtype == np.float32 and block.shape[:2] == expected else None
