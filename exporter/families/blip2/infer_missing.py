"""What tensors do not show of an architecture: head counts and LayerNorm eps.

They come from the first of: an option, the Hugging Face folder's `config.json`, the table of published models, the
family's head size (88 in EVA, 64 elsewhere). What was assumed is noted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qpert.exporter.families.blip2.architecture import VISION_NAMES, ArchitectureOptions
from qpert.exporter.families.blip2.hub_config import HubConfig
from qpert.graphs.families.blip2.config import BERT_QFORMER, Blip2Config
from qpert.runtime.errors import CheckpointError

QFORMER_HEAD_SIZE = 64


@dataclass(frozen=True)
class Answer:
    """A number, and how it came about where nobody stated it."""

    value: float
    note: str | None = None


@dataclass(frozen=True)
class Question:
    """A number that tensors do not show: what it is, the option that sets it, what the two say of it."""

    what: str
    flag: str
    option: float | None
    stated: float | None

    def said(self) -> float | None:
        """What the option or config.json says.

        Raises:
            CheckpointError: they say different things.
        """
        if self.option is not None and self.stated is not None and self.option != self.stated:
            raise CheckpointError(
                f"{self.flag} says {self.option:g}, config.json says {self.stated:g}; leave the option out, or correct "
                "the file if it is wrong",
                code="option-contradicts-config",
            )
        return self.option if self.option is not None else self.stated


def complete(
    config: Blip2Config, options: ArchitectureOptions, hub: HubConfig | None, known: Blip2Config | None
) -> tuple[Blip2Config, tuple[str, ...]]:
    """`config` with heads and eps, and what was assumed of them.

    Args:
        hub: what the folder's `config.json` says, for Hugging Face.
        known: the published model that this is, for named checkpoints.

    Raises:
        CheckpointError: a head count cannot be known, or does not divide its width, or two sources contradict.
    """
    vision, qformer = config.vision, config.qformer
    names = VISION_NAMES[vision.family]
    vision_published = {names.known.width: names.known.heads}.get(vision.width)
    qformer_published = {BERT_QFORMER.width: BERT_QFORMER.heads}.get(qformer.width)
    answers = (
        heads(
            Question("vision heads", "--vision-heads", options.vision_heads, hub.vision_heads if hub else None),
            vision.width,
            known.vision.heads if known else vision_published,
            names.head_size,
        ),
        heads(
            Question("Q-Former heads", "--qformer-heads", options.qformer_heads, hub.qformer_heads if hub else None),
            qformer.width,
            known.qformer.heads if known else qformer_published,
            QFORMER_HEAD_SIZE,
        ),
        eps(
            Question("vision LayerNorm eps", "--vision-eps", options.vision_eps, hub.vision_eps if hub else None),
            vision.layer_norm_eps,
        ),
        eps(
            Question("ln_vision eps", "--ln-vision-eps", options.ln_vision_eps, hub.vision_eps if hub else None),
            config.ln_vision_eps,
        ),
        eps(
            Question("Q-Former LayerNorm eps", "--qformer-eps", options.qformer_eps, hub.qformer_eps if hub else None),
            qformer.layer_norm_eps,
        ),
    )
    vision_heads, qformer_heads, vision_eps, ln_eps, qformer_eps = (answer.value for answer in answers)
    done = replace(
        config,
        vision=replace(vision, heads=int(vision_heads), layer_norm_eps=vision_eps),
        qformer=replace(qformer, heads=int(qformer_heads), layer_norm_eps=qformer_eps),
        ln_vision_eps=ln_eps,
    )
    return done, () if known else tuple(answer.note for answer in answers if answer.note)


def heads(question: Question, width: int, published: int | None, head_size: int) -> Answer:
    """The number of attention heads of a part `width` wide."""
    what, flag = question.what, question.flag
    said = question.said()
    if said is not None:
        if said < 1 or width % said:
            raise CheckpointError(
                f"{said:g} {what} do not divide the width {width}; pass the right {flag} N", code="heads-width"
            )
        return Answer(said)
    if published is not None:
        return Answer(published, f"{what}: {published}, as in the published model of width {width} ({flag} overrides)")
    if width % head_size:
        raise CheckpointError(
            f"the number of {what} cannot be told from the tensors: {width} is no published width, and no multiple of "
            f"the usual head size {head_size}; pass {flag} N",
            code="heads-unknown",
        )
    count = width // head_size
    return Answer(count, f"{what}: {count}, assumed from the usual head size of {head_size} ({flag} overrides)")


def eps(question: Question, usual: float) -> Answer:
    """A LayerNorm's eps; `usual` is what LAVIS's code has."""
    said = question.said()
    if said is not None:
        return Answer(said)
    return Answer(usual, f"{question.what}: {usual:g}, as in LAVIS's code ({question.flag} overrides)")
