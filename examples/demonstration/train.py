"""Train the demonstration's small BLIP-2 on generated scenes, on a CPU.

    python examples/demonstration/train.py --work .cache/demonstration

Three stages, one after the other: `grow` (the vision tower alone, by what its patches show), `contrast` (ITC, two
captions a picture), `match` (ITC and ITM with hard negatives). Runs repeat by seed; an interrupted one resumes from its
last checkpoint when the command is given again. Metrics go to `WORK/metrics.jsonl`, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from data import TrainingSet, load, prepare
from evaluation import quick_recall
from losses import concept_loss, itc_loss, itc_similarities, itm_loss, many_hot, patch_loss, slot_loss
from student import new_student
from torch import Tensor
from training_loop import stage_at, train, write_state

from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.progress import Progress, Terminal

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Stage:
    """`auxiliary`, `contrast` (ITC) and `match` (ITM) weigh the losses; without ITC only the vision tower learns."""

    name: str
    steps: int
    pictures: int
    captions: int
    rate: float
    auxiliary: float = 1.0
    contrast: float = 1.0
    match: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A whole run. `rate` of a stage is where its learning rate begins; it falls linearly to the next stage's."""

    seed: int
    scenes: int
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step, and its learning rate."""
        index, local, stage, rate = stage_at(self.stages, step)
        warm = min(1.0, (local + 1) / (150 if index == 0 else 40))
        return stage, warm * rate


class Trainer:
    """A student, its optimiser and how far they are."""

    def __init__(self, plan: Plan, data: TrainingSet, work: Path) -> None:
        self.plan, self.data, self.work = plan, data, work
        self.student = new_student(CONFIGS["demo"], plan.seed)
        decayed = [p for p in self.student.parameters() if p.ndim >= 2]
        others = [p for p in self.student.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
        self.step = self.warm_from = 0
        self.mean = torch.tensor(MEAN)[:, None, None] * 255
        self.std = torch.tensor(STD)[:, None, None] * 255

    def train_step(self) -> dict[str, float]:
        """One update; everything drawn depends on the seed and the step alone."""
        stage, rate = self.plan.at(self.step)
        random = np.random.default_rng((self.plan.seed, self.step))
        torch.manual_seed(self.plan.seed * 1_000_003 + self.step)
        rows = random.choice(len(self.data), stage.pictures, replace=False)
        chosen = random.permuted(np.tile(np.arange(self.data.tokens.shape[1]), (len(rows), 1)), axis=1)
        chosen = chosen[:, : stage.captions]  # [B, captions]
        for group in self.optimiser.param_groups:
            group["lr"] = rate * min(1.0, (self.step - self.warm_from + 1) / 60)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, said = self._losses(stage, rows, chosen)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 2.0)
        if torch.isfinite(norm):
            self.optimiser.step()
        self.step += 1
        return {"step": self.step, "loss": loss.item(), "rate": rate, "norm": float(norm), **said}

    def _losses(self, stage: Stage, rows: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        student, data = self.student, self.data
        ids = torch.from_numpy(data.tokens[rows[:, None], chosen].astype(np.int64))  # [B, captions, L]
        tokens = student.model.encode_image(self._pixels(rows))
        patches, places = torch.from_numpy(data.patches[rows]), torch.from_numpy(data.places[rows]).long()
        on_patches, accuracies = patch_loss(student, tokens, patches, places)
        if not stage.contrast:
            return on_patches, accuracies
        queries, _, hidden = student.query_embeds(tokens)
        texts, raw_texts = student.text_embeds(ids.flatten(0, 1))
        similarities = itc_similarities(queries, texts)  # [B, B * captions]
        itc = itc_loss(similarities, student.log_scale)
        shown = many_hot(torch.from_numpy(data.shown[rows].astype(np.int64)))
        stated = many_hot(torch.from_numpy(data.said[rows[:, None], chosen].astype(np.int64)).flatten(0, 1))
        read, slots = concept_loss(student, raw_texts, stated), slot_loss(student, hidden, shown)
        loss = stage.contrast * itc + stage.auxiliary * (0.1 * read + 0.1 * slots + on_patches)
        said = {"itc": itc.item(), "scale": student.log_scale.exp().item(), "read": read.item(), "slots": slots.item()}
        said |= accuracies
        if stage.match:
            first = ids[:, 0]
            first = first[:, : int((first > 0).sum(1).max())]
            itm, accuracy = itm_loss(student, tokens, first, similarities[:, :: stage.captions], student.log_scale)
            loss = loss + stage.match * itm
            said |= {"itm": itm.item(), "matched": accuracy}
        return loss, said

    def _pixels(self, rows: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(self.data.pixels[rows]).permute(0, 3, 1, 2).float()
        return (pixels - self.mean) / self.std

    def save(self) -> None:
        state = {
            "student": self.student.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "plan": asdict(self.plan),
        }
        write_state(self.work, state)

    def resume(self, progress: Progress) -> None:
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        if "optimiser" in state:
            self.optimiser.load_state_dict(state["optimiser"])
        else:
            self.warm_from = self.step
            progress.say("the checkpoint has no optimiser: it begins anew")
        if json.loads(json.dumps(state["plan"])) != json.loads(json.dumps(asdict(self.plan))):
            progress.say(f"the plan has changed since step {self.step}; the rest follows the new one")
        progress.say(f"resuming at step {self.step} of {self.plan.steps}")


def run(plan: Plan, work: Path, progress: Progress, *, save_every: float, evaluate_every: float) -> None:
    prepare(work / "scenes", plan.scenes, seed=plan.seed, workers=os.cpu_count() or 1, progress=progress)
    trainer = Trainer(plan, load(work / "scenes", plan.scenes), work)
    trainer.resume(progress)
    train(
        trainer,
        plan.steps,
        work,
        progress,
        evaluate=lambda: quick_recall(trainer.student),
        save_every=save_every,
        evaluate_every=evaluate_every,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/demonstration"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=50_000)
    parser.add_argument("--grow", type=int, default=GROW, help="steps of the first stage")
    parser.add_argument("--contrast", type=int, default=CONTRAST, help="steps of the second")
    parser.add_argument("--match", type=int, default=MATCH, help="steps of the third")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=100, help="seconds between checkpoints")
    parser.add_argument(
        "--evaluate-every", type=float, default=300, help="seconds between looks at the validation split"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    stages = (
        Stage("grow", options.grow, 64, 0, 1.0e-3, contrast=0.0),
        Stage("contrast", options.contrast, 64, 2, 1.0e-3, auxiliary=0.7),
        Stage("match", options.match, 64, 2, 6e-4, auxiliary=0.3, match=1.0),
    )
    plan = Plan(options.seed, options.scenes, stages)
    run(plan, options.work, Terminal(), save_every=options.save_every, evaluate_every=options.evaluate_every)


GROW, CONTRAST, MATCH = 1500, 660, 960

if __name__ == "__main__":
    main()
