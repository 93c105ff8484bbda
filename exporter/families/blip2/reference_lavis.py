"""Stock LAVIS as a reference, in a separate process and environment (`make lavis-env`).

LAVIS 1.0.2 does not work with a current transformers, so it cannot be imported here: `lavis_worker.py` runs with the
other environment's interpreter (see `qpert.exporter.references.worker`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qpert.exporter.references.worker import Environment, WorkerProcess
from qpert.graphs.families.blip2.config import Blip2Config
from qpert.runtime.errors import CheckpointError

WORKER = Path(__file__).resolve().with_name("lavis_worker.py")
ENVIRONMENT = Environment("LAVIS", "lavis", "lavis", "QPERT_LAVIS", "lavis-env")


class LavisReference:
    """A stock LAVIS `Blip2ITM` in another process. `close` ends it. A context manager.

    `ignored`: tensors of the vision file that LAVIS does not use (it leaves out the last block).
    """

    name = "lavis"

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self.ignored: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        config: Blip2Config,
        vision_checkpoint: str | Path | None = None,
        python: Path | None = None,
        threshold: float = 0.95,
        preserve_norm: bool = False,
        centre_keys: bool = False,
        stages: str = "itc",
    ) -> LavisReference:
        """Start LAVIS and load a `.pth`, strictly, in float32 on the CPU.

        Args:
            config: the dimensions. If the image size differs from the checkpoint's, LAVIS's own
                `interpolate_pos_embed` interpolates the position embedding.
            vision_checkpoint: the file of the vision transformer (`eva_vit_g.pth`, `clip_vit_L.pth`), which LAVIS's
                stage-1 checkpoints lack because it was frozen in training.

        Raises:
            UnavailableError: the LAVIS environment is missing or incomplete, or the process died.
            CheckpointError: a tensor is missing, unknown or of another shape, or the file is not a checkpoint.
        """
        reference = cls(WorkerProcess(ENVIRONMENT, WORKER, python))
        try:
            answer = reference._worker.ask(
                {
                    "open": {
                        "checkpoint": _absolute(checkpoint),
                        "vision_checkpoint": None if vision_checkpoint is None else _absolute(vision_checkpoint),
                        "config": config.to_dict(),
                        "threshold": threshold,
                        "preserve_norm": preserve_norm,
                        "centre_keys": centre_keys,
                        "stages": stages,
                    }
                }
            )
        except BaseException:
            reference.close()
            raise
        reference.ignored = tuple(answer["ignored"])
        return reference

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of `graph`, see `upstream.UpstreamReference.run`."""
        return self._worker.arrays({"graph": graph}, inputs)

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        self._worker.close()

    def __enter__(self) -> LavisReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _absolute(path: str | Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, expected a LAVIS checkpoint (.pth)", code="checkpoint-not-found")
    return str(path.resolve())
