"""What the training scripts of the two retrieval models share: the schedule, the loop, and the file of a state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from qpert.runtime.progress import Progress

LOG_EVERY = 10
"""Steps between two lines of the log."""


class Timed(Protocol):
    """A stage of a plan: `rate` is where its learning rate begins; it falls linearly to the next stage's."""

    @property
    def steps(self) -> int: ...

    @property
    def rate(self) -> float: ...


class Trainable(Protocol):
    """Something that learns step by step and can be saved; `step` counts its updates."""

    step: int

    def train_step(self) -> dict[str, float]: ...

    def save(self) -> None: ...


S = TypeVar("S", bound=Timed)


def stage_at(stages: Sequence[S], step: int) -> tuple[int, int, S, float]:
    """The stage of a step: its number, the step counted from its beginning, itself, and the learning rate.

    Raises ValueError for a step after the last.
    """
    for index, stage in enumerate(stages):
        if step < stage.steps:
            end = stages[index + 1].rate if index + 1 < len(stages) else stage.rate * 0.02
            return index, step, stage, stage.rate + (end - stage.rate) * step / stage.steps
        step -= stage.steps
    raise ValueError("the plan has no such step")


def write_state(work: Path, state: Mapping[str, Any]) -> None:
    """`WORK/checkpoint.pt`, whole or not at all."""
    temporary = work / ".checkpoint.pt"
    torch.save(state, temporary)
    temporary.replace(work / "checkpoint.pt")


def train(
    trainer: Trainable,
    steps: int,
    work: Path,
    progress: Progress,
    *,
    evaluate: Callable[[], Mapping[str, float]],
    save_every: float,
    evaluate_every: float,
) -> None:
    """Take the steps that are left; losses and evaluations go to `WORK/metrics.jsonl`, intervals are in seconds."""
    log = (work / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def write(line: Mapping[str, float]) -> None:
        rounded = {name: round(value, 5) for name, value in line.items()}
        log.write(json.dumps({"time": time.strftime("%H:%M:%S"), **rounded}) + "\n")

    saved = evaluated = time.monotonic()
    with log, progress.stage("training", steps) as advance:
        advance(trainer.step)
        while trainer.step < steps:
            began = time.monotonic()
            said = trainer.train_step()
            advance(1)
            last = trainer.step == steps
            if trainer.step % LOG_EVERY == 0:
                write({**said, "seconds": time.monotonic() - began})
            if last or time.monotonic() - saved > save_every:
                trainer.save()
                saved = time.monotonic()
            if last or time.monotonic() - evaluated > evaluate_every:
                found = evaluate()
                write({"step": trainer.step, **found})
                progress.say(f"step {trainer.step}: {dict(found)}")
                evaluated = time.monotonic()
