"""Train the demonstration's detector on generated scenes, on one CPU core.

    python examples/demonstration_detector/train.py --work .cache/detector

A small RT-DETRv2 with transformers' own loss; what ships is the running mean of its weights. The first steps see
pictures of 128×128 pixels, the later ones of 160×160. Runs repeat by seed; an interrupted one resumes from its last
checkpoint when the command is given again. Metrics go to `WORK/metrics.jsonl`, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from average_precision import quick_precision
from detector_data import TrainingSet, load, prepare
from detector_model import in_bfloat16, new_detector
from torch import nn

from qpert.runtime.progress import Progress, Terminal

SIDE = 160
"""Pixels: the side of the pictures that the detector is given in the end."""
FIRST_SIDE = 128
CLIP = 1.0
"""The greatest norm of a gradient."""


@dataclass(frozen=True)
class Plan:
    """A whole run: `first_steps` of `steps` see smaller pictures. `rate` falls as a cosine to a fiftieth."""

    seed: int
    scenes: int
    steps: int
    first_steps: int
    batch: int = 16
    rate: float = 6e-4
    warm: int = 300
    decay: float = 0.9985

    def rate_at(self, step: int) -> float:
        falling = 0.02 + 0.98 * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.rate * falling * min(1.0, (step + 1) / self.warm)

    def side_at(self, step: int) -> int:
        return FIRST_SIDE if step < self.first_steps else SIDE


class Trainer:
    """A detector, the running mean of its weights, its optimiser and how far they are."""

    def __init__(self, plan: Plan, data: TrainingSet, work: Path) -> None:
        self.plan, self.data, self.work, self.step = plan, data, work, 0
        self.plans = [{"from_step": 0, **asdict(plan)}]
        self.detector = new_detector(plan.seed).train()
        self.mean = deepcopy(self.detector).eval().requires_grad_(False)
        in_bfloat16(self.detector)
        decayed = [p for p in self.detector.parameters() if p.ndim >= 2]
        others = [p for p in self.detector.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=plan.rate)

    def train_step(self) -> dict[str, float]:
        """One update; everything drawn depends on the seed and the step alone."""
        plan = self.plan
        random = np.random.default_rng((plan.seed, self.step))
        torch.manual_seed(plan.seed * 1_000_003 + self.step)  # denoising queries
        rows = random.choice(len(self.data), plan.batch, replace=False)
        pixels, labels = self.data.batch(rows, random.random(plan.batch) < 0.5)
        side, rate = plan.side_at(self.step), plan.rate_at(self.step)
        if side != pixels.shape[-1]:
            pixels = nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self.detector(pixel_values=pixels, labels=labels).loss
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.detector.parameters(), CLIP)
        if torch.isfinite(norm):
            self.optimiser.step()
            self._average()
        self.step += 1
        return {"step": self.step, "loss": loss.item(), "rate": rate, "norm": float(norm), "side": side}

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.plan.decay, (1 + self.step) / (10 + self.step))
        new = self.detector.state_dict()
        for name, old in self.mean.state_dict().items():
            if old.is_floating_point():
                old.lerp_(new[name], 1 - keep)
            else:
                old.copy_(new[name])

    def save(self) -> None:
        state = {
            "detector": self.detector.state_dict(),
            "mean": self.mean.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "plan": asdict(self.plan),
            "plans": self.plans,
        }
        temporary = self.work / ".checkpoint.pt"
        torch.save(state, temporary)
        temporary.replace(self.work / "checkpoint.pt")

    def resume(self, progress: Progress) -> None:
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.detector.load_state_dict(state["detector"])
        self.mean.load_state_dict(state["mean"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.plans = state["plans"]
        if state["plan"] != asdict(self.plan):
            self.plans = [*self.plans, {"from_step": self.step, **asdict(self.plan)}]
            progress.say(f"the plan has changed since step {self.step}; the rest follows the new one")
        progress.say(f"resuming at step {self.step} of {self.plan.steps}")


def run(plan: Plan, work: Path, progress: Progress, *, save_every: float, evaluate_every: float) -> None:
    prepare(work / "scenes", plan.scenes, side=SIDE, seed=plan.seed, progress=progress)
    trainer = Trainer(plan, load(work / "scenes", plan.scenes), work)
    trainer.resume(progress)
    log = (work / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
    saved = evaluated = time.monotonic()

    def write(line: dict[str, float]) -> None:
        rounded = {name: round(value, 6) for name, value in line.items()}
        log.write(json.dumps({"time": time.strftime("%H:%M:%S"), **rounded}) + "\n")

    with log, progress.stage("training", plan.steps) as advance:
        advance(trainer.step)
        while trainer.step < plan.steps:
            began = time.monotonic()
            said = trainer.train_step()
            advance(1)
            last = trainer.step == plan.steps
            if last or trainer.step % 20 == 0:
                write({**said, "seconds": time.monotonic() - began})
            if last or time.monotonic() - saved > save_every:
                trainer.save()
                saved = time.monotonic()
            if last or time.monotonic() - evaluated > evaluate_every:
                found = quick_precision(trainer.mean)
                write({"step": trainer.step, **found})
                progress.say(f"step {trainer.step}: {found}")
                evaluated = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/detector"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--first-steps", type=int, default=FIRST_STEPS, help="of these, how many see smaller pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=100, help="seconds between checkpoints")
    parser.add_argument(
        "--evaluate-every", type=float, default=300, help="seconds between looks at the validation split"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.seed, options.scenes, options.steps, options.first_steps)
    run(plan, options.work, Terminal(), save_every=options.save_every, evaluate_every=options.evaluate_every)


STEPS, FIRST_STEPS = 4300, 2400

if __name__ == "__main__":
    main()
