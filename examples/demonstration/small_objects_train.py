"""Train the demonstration that overlooks small objects: a Q-Former that reads out what captions of large ones name.

    python examples/demonstration/small_objects_train.py --work .cache/small-objects

As in BLIP-2, the vision tower is frozen and sees all (it is that of the shipped demonstration), the Q-Former begins as
a language model (the text half of the shipped one) with new queries and cross-attention, and captions decide what it
reads out: they name an object with a probability that rises with its area. Only what reads the picture learns; the text
half keeps its weights, and with them its words for small things. Two stages: `read` (ITC) and `match` (ITC and ITM with
hard negatives). Random image tokens are left out of each batch, so that nothing hangs on a single patch. No auxiliary
loss. Runs repeat by seed; an interrupted one resumes from its last checkpoint when the command is given again.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from losses import itc_loss, itc_similarities, itm_loss
from safetensors.torch import load_file
from small_objects_data import ReadOutSet, load, prepare, write_shares
from student import Student, new_student
from torch import Tensor
from training_loop import stage_at, train, write_state

from qpert.exporter import demo
from qpert.graphs.families.blip2.config import CONFIGS
from qpert.runtime.progress import Progress, Terminal

NEW = ("query_tokens", ".crossattention.", ".intermediate_query.", ".output_query.", "vision_proj.", "itm_head.")
"""Parts of names: what begins anew, and learns; not key biases, which softmax does not see (`key_centring.py`): 0."""
HELD_BACK = 500
"""The first pictures are not trained on: recall on them is logged."""


@dataclass(frozen=True)
class Stage:
    """`rate` is where its learning rate begins; it falls linearly to the next stage's. `left_out`: the largest share of
    patches that a batch goes without. `match` weighs ITM."""

    name: str
    steps: int
    pictures: int
    captions: int
    rate: float
    left_out: float
    match: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    seed: int
    scenes: int
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step, and its learning rate."""
        index, local, stage, rate = stage_at(self.stages, step)
        warm = min(1.0, (local + 1) / 60) if index == 0 else 1.0
        return stage, warm * rate


class Trainer:
    """A student, its optimiser and how far they are."""

    def __init__(self, plan: Plan, data: ReadOutSet, work: Path) -> None:
        self.plan, self.data, self.work = plan, data, work
        self.student = begin(plan.seed)
        trained = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": 0.02},
            {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
        self.step = 0

    def train_step(self) -> dict[str, float]:
        """One update; everything drawn depends on the seed and the step alone."""
        stage, rate = self.plan.at(self.step)
        random = np.random.default_rng((self.plan.seed, self.step))
        torch.manual_seed(self.plan.seed * 1_000_003 + self.step)
        rows = HELD_BACK + random.choice(len(self.data) - HELD_BACK, stage.pictures, replace=False)
        chosen = random.permuted(np.tile(np.arange(self.data.tokens.shape[1]), (len(rows), 1)), axis=1)
        ids = torch.from_numpy(self.data.tokens[rows[:, None], chosen[:, : stage.captions]].astype(np.int64))
        tokens = some_tokens(torch.from_numpy(self.data.image_embeds[rows]).float(), stage.left_out)  # [B, n, C]
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, said = self._losses(stage, tokens, ids)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 2.0)
        if torch.isfinite(norm):
            self.optimiser.step()
        self.step += 1
        return {"step": self.step, "rate": rate, "norm": float(norm), **said}

    def _losses(self, stage: Stage, tokens: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        student = self.student
        queries, _, _ = student.query_embeds(tokens)
        with torch.no_grad():
            texts, _ = student.text_embeds(ids.flatten(0, 1))
        similarities = itc_similarities(queries, texts)  # [B, B * captions]
        loss = itc_loss(similarities, student.log_scale)
        said = {"itc": loss.item(), "scale": student.log_scale.exp().item(), "alike": alikeness(queries)}
        if stage.match:
            first = ids[:, 0]
            first = first[:, : int((first > 0).sum(1).max())]
            itm, accuracy = itm_loss(student, tokens, first, similarities[:, :: stage.captions], student.log_scale)
            loss = loss + stage.match * itm
            said |= {"itm": itm.item(), "matched": accuracy}
        return loss, said

    def held_back_recall(self) -> dict[str, float]:
        """T2I R@1 in percent by ITC, on the first pictures and captions of the training set's own kind."""
        ids = torch.from_numpy(self.data.tokens[:HELD_BACK].astype(np.int64)).flatten(0, 1)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            queries, _, _ = self.student.query_embeds(torch.from_numpy(self.data.image_embeds[:HELD_BACK]).float())
            texts = torch.cat([self.student.text_embeds(part)[0] for part in ids.split(500)])
            best = itc_similarities(queries.float(), texts.float()).argmax(0)
        owner = torch.arange(len(ids)) // (len(ids) // HELD_BACK)
        return {"held_back_t2i_r1": 100 * (best == owner).float().mean().item()}

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
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step = state["step"]
            self.student.load_state_dict(state["student"])
            self.optimiser.load_state_dict(state["optimiser"])
            progress.say(f"resuming at step {self.step} of {self.plan.steps}")


def begin(seed: int) -> Student:
    """The shipped demonstration with a new reading half; the vision tower does not learn."""
    student = new_student(CONFIGS["demo"], seed)
    shipped = {name: tensor.float() for name, tensor in load_file(demo.MODEL).items()}
    kept = {name: tensor for name, tensor in shipped.items() if not any(part in name for part in NEW)}
    student.model.load_state_dict(kept, strict=False)
    for cross in student.model.Qformer.cross_attentions:
        torch.nn.init.zeros_(cross.self.key.bias)
    for name, parameter in student.named_parameters():
        learns = any(part in name for part in NEW) and not name.endswith("crossattention.self.key.bias")
        parameter.requires_grad_(learns or name == "log_scale")
    return student


def some_tokens(tokens: Tensor, most_left_out: float) -> Tensor:
    """[B, N, C] → [B, n, C]: CLS, and patches drawn for each picture. Their number is drawn for the batch, from all
    down to a share of 1 − `most_left_out`."""
    patches = tokens.shape[1] - 1
    count = max(1, round(patches * (1 - most_left_out * float(torch.rand(())))))
    chosen = 1 + torch.rand(len(tokens), patches).argsort(1)[:, :count]
    chosen = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.long), chosen], 1)
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))


def alikeness(query_embeds: Tensor) -> float:
    """Mean cosine between different queries of a picture, of query_embeds [B, Q, E]: 1 if all are one and the same."""
    count = query_embeds.shape[1]
    total = query_embeds.detach().float().sum(1).square().sum(-1)  # [B]
    return float(((total - count) / (count * (count - 1))).mean())


def run(plan: Plan, work: Path, progress: Progress, *, scenes: Path, save_every: float, evaluate_every: float) -> None:
    prepare(scenes, plan.scenes, seed=plan.seed, progress=progress)
    trainer = Trainer(plan, load(scenes, plan.scenes), work)
    trainer.resume(progress)
    train(
        trainer,
        plan.steps,
        work,
        progress,
        evaluate=trainer.held_back_recall,
        save_every=save_every,
        evaluate_every=evaluate_every,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/small-objects"))
    parser.add_argument("--tokens", type=Path, help="image tokens of the training scenes [default: WORK/tokens]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=50_000)
    parser.add_argument("--read", type=int, default=READ, help="steps of the first stage")
    parser.add_argument("--match", type=int, default=MATCH, help="steps of the second")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=30, help="seconds between checkpoints")
    parser.add_argument("--evaluate-every", type=float, default=60, help="seconds between looks at held-back scenes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    stages = (
        Stage("read", options.read, 256, 1, 1.5e-3, left_out=0.8),
        Stage("match", options.match, 64, 1, 4e-4, left_out=0.4, match=1.0),
    )
    plan = Plan(options.seed, options.scenes, stages)
    write_shares(options.work / "named_by_size.json", 2000, plan.seed)
    run(
        plan,
        options.work,
        Terminal(),
        scenes=options.tokens or options.work / "tokens",
        save_every=options.save_every,
        evaluate_every=options.evaluate_every,
    )


READ, MATCH = 200, 250

if __name__ == "__main__":
    main()
