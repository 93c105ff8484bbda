"""Infers what tensors do not show of an architecture: head counts and LayerNorm eps.

They come from the first source that has them: an option, the Hugging Face folder's `config.json`, the table of
published models, the family's head size (88 in EVA, 64 elsewhere). Notes list the assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qpert.exporter.families.blip2.architecture import VISION_NAMES, ArchitectureOptions
from qpert.exporter.families.blip2.hub_config import HubConfig
from qpert.graphs.families.blip2.config import BERT_QFORMER, Blip2Config
from qpert.runtime.errors import CheckpointError

QFORMER_HEAD_SIZE = 64


@dataclass(frozen=True)
class InferredValue:
    """A number, and how it was inferred if no source states it."""

    value: float
    note: str | None = None


@dataclass(frozen=True)
class MissingValue:
    """A number that tensors do not show: name, flag, and its values in the option and in config.json."""

    what: str
    flag: str
    option: float | None
    config: float | None

    def stated_value(self) -> float | None:
        """The value of the option or of config.json.

        Raises:
            CheckpointError: the two differ.
        """
        if self.option is not None and self.config is not None and self.option != self.config:
            raise CheckpointError(
                f"{self.flag} is {self.option:g}, but config.json states {self.config:g}; remove the option, or "
                "correct the file if it is wrong",
                code="option-contradicts-config",
            )
        return self.option if self.option is not None else self.config


def infer_missing(
    config: Blip2Config, options: ArchitectureOptions, hub: HubConfig | None, known: Blip2Config | None
) -> tuple[Blip2Config, tuple[str, ...]]:
    """`config` with heads and eps, and notes on what was assumed.

    Args:
        hub: the folder's `config.json`, for Hugging Face.
        known: the published model, for named checkpoints.

    Raises:
        CheckpointError: a head count is unknown or does not divide its width, or two sources contradict each other.
    """
    vision, qformer = config.vision, config.qformer
    names = VISION_NAMES[vision.family]
    vision_published = {names.known.width: names.known.heads}.get(vision.width)
    qformer_published = {BERT_QFORMER.width: BERT_QFORMER.heads}.get(qformer.width)
    answers = (
        heads(
            MissingValue("vision heads", "--vision-heads", options.vision_heads, hub.vision_heads if hub else None),
            vision.width,
            known.vision.heads if known else vision_published,
            names.head_size,
        ),
        heads(
            MissingValue(
                "Q-Former heads", "--qformer-heads", options.qformer_heads, hub.qformer_heads if hub else None
            ),
            qformer.width,
            known.qformer.heads if known else qformer_published,
            QFORMER_HEAD_SIZE,
        ),
        eps(
            MissingValue("vision LayerNorm eps", "--vision-eps", options.vision_eps, hub.vision_eps if hub else None),
            vision.layer_norm_eps,
        ),
        eps(
            MissingValue("ln_vision eps", "--ln-vision-eps", options.ln_vision_eps, hub.vision_eps if hub else None),
            config.ln_vision_eps,
        ),
        eps(
            MissingValue(
                "Q-Former LayerNorm eps", "--qformer-eps", options.qformer_eps, hub.qformer_eps if hub else None
            ),
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


def heads(missing: MissingValue, width: int, published: int | None, head_size: int) -> InferredValue:
    """The number of attention heads of a part `width` wide."""
    what, flag = missing.what, missing.flag
    stated = missing.stated_value()
    if stated is not None:
        if stated < 1 or width % stated:
            raise CheckpointError(
                f"{stated:g} {what} do not divide the width {width}; pass the right {flag} N", code="heads-width"
            )
        return InferredValue(stated)
    if published is not None:
        return InferredValue(
            published, f"{what}: {published}, as in the published model of width {width} ({flag} overrides)"
        )
    if width % head_size:
        raise CheckpointError(
            f"the tensors do not show the number of {what}: {width} is not a published width, and not a multiple of "
            f"the usual head size {head_size}; pass {flag} N",
            code="heads-unknown",
        )
    count = width // head_size
    return InferredValue(count, f"{what}: {count}, assumed from the usual head size of {head_size} ({flag} overrides)")


def eps(missing: MissingValue, usual: float) -> InferredValue:
    """A LayerNorm's eps; `usual` is the one in LAVIS's code."""
    stated = missing.stated_value()
    if stated is not None:
        return InferredValue(stated)
    return InferredValue(usual, f"{missing.what}: {usual:g}, as in LAVIS's code ({missing.flag} overrides)")
