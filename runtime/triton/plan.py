"""Which models a repository has: one for each graph, those of the host's work around them, and ensembles of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qpert.runtime.bundle.graph_spec import GraphSpec
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import (
    BOX_WEIGHTS,
    IMAGE_TOKENS,
    IMAGE_VECTORS,
    OBJECT_MASKS,
    PAIR_SCORES,
    PIXELS,
    TEXT_VECTORS,
    TOKEN_IDS,
    TOKEN_SLOTS,
)
from qpert.runtime.errors import InputError
from qpert.runtime.triton.config import ModelConfig, Step, Tensor

LENGTH_STEP = 8
"""Texts are padded to a multiple of this many tokens: Triton batches requests of one shape alone."""
PICTURES = "preprocess_images"
TEXTS = "tokenize_texts"
CANDIDATES = "tokenize_candidates"
QUERY_SETS = "image_query_sets"
ENCODE_TEXTS = "encode_texts"
ENCODE_IMAGES = "encode_images"
MATCH_TEXTS = "match_texts"
HOST_MODELS = (PICTURES, TEXTS, CANDIDATES, QUERY_SETS)
OWN_NAMES = (*HOST_MODELS, ENCODE_TEXTS, ENCODE_IMAGES, MATCH_TEXTS)

IMAGE = "image"
BOXES = "boxes"
BOX_COUNTS = "box_counts"
TEXT = "text"


@dataclass(frozen=True)
class HostPlan:
    """The models around the graphs of one manifest."""

    manifest: Manifest

    def __post_init__(self) -> None:
        if taken := [name for name in self.manifest.graphs if name in OWN_NAMES]:
            raise InputError(
                f"the graph {taken[0]} has the name of a model that the repository needs; rename it at the export",
                code="triton-name",
            )

    @property
    def takes_boxes(self) -> bool:
        return self.manifest.query_head.takes_boxes

    @property
    def splits_boxes(self) -> bool:
        """Whether each box has a query set of its own, so that the query head is not called once an image."""
        return self.takes_boxes and self.manifest.perturbation.splits_boxes

    def models(self) -> list[ModelConfig]:
        """Host models and ensembles."""
        found = [self.pictures(), self.texts(), self.encode_texts(), self.encode_images()]
        found += [self.query_sets()] if self.splits_boxes else []
        if self.manifest.pair_scorer is not None:
            found += [self.candidates(self.manifest.pair_scorer), self.match_texts(self.manifest.pair_scorer)]
        return found

    def pictures(self) -> ModelConfig:
        tower, head = self.manifest.image_tower, self.manifest.query_head
        inputs, outputs = [Tensor(IMAGE, "string", (1,))], [Tensor.of(tower.input(PIXELS))]
        if self.takes_boxes:
            inputs += [Tensor(BOXES, "float32", (-1, 4), optional=True)]
            outputs += [Tensor.of(head.input(OBJECT_MASKS)), Tensor.of(head.input(BOX_WEIGHTS))]
            outputs += [Tensor(BOX_COUNTS, "int64", (1,))]
        return host(PICTURES, batch_limit(tower), inputs, outputs, {"box_buckets": "1, 2, 4, 8, …"})

    def texts(self) -> ModelConfig:
        tower = self.manifest.text_tower
        outputs = [Tensor(spec.name, spec.dtype, (-1,)) for spec in tower.inputs if spec.slot in TOKEN_SLOTS]
        return host(TEXTS, batch_limit(tower), [Tensor(TEXT, "string", (1,))], outputs, lengths(tower))

    def candidates(self, scorer: GraphSpec) -> ModelConfig:
        outputs = [Tensor.of(spec) for spec in scorer.inputs if spec.slot in TOKEN_SLOTS]
        parameters = lengths(scorer) | {"text_buckets": "1, 2, 4, 8, …"}
        return host(CANDIDATES, batch_limit(scorer), [Tensor(TEXT, "string", (-1,))], outputs, parameters)

    def query_sets(self) -> ModelConfig:
        head = self.manifest.query_head
        slots = (IMAGE_TOKENS, OBJECT_MASKS, BOX_WEIGHTS)
        inputs = [*(Tensor.of(head.input(slot)) for slot in slots), Tensor(BOX_COUNTS, "int64", (1,))]
        vectors = head.output(IMAGE_VECTORS)
        outputs = [Tensor(vectors.name, vectors.dtype, (-1, int(vectors.shape[-1])))]
        return host(QUERY_SETS, batch_limit(head), inputs, outputs, {})

    def encode_texts(self) -> ModelConfig:
        tower = self.manifest.text_tower
        tokens = {spec.name: spec.name for spec in tower.inputs if spec.slot in TOKEN_SLOTS}
        vectors = tower.output(TEXT_VECTORS)
        steps = (
            Step(TEXTS, {TEXT: TEXT}, tokens),
            Step(tower.name, tokens, {vectors.name: vectors.name}),
        )
        return ensemble(ENCODE_TEXTS, batch_limit(tower), [Tensor(TEXT, "string", (1,))], [Tensor.of(vectors)], steps)

    def encode_images(self) -> ModelConfig:
        """Vectors alone: an ensemble of server 2.51 that also gives its image tokens waits for ever where a client asks
        for the vectors alone."""
        head = self.manifest.query_head
        vectors = head.output(IMAGE_VECTORS)
        shape = (-1, int(vectors.shape[-1])) if self.splits_boxes else Tensor.of(vectors).dims
        boxes = (OBJECT_MASKS, BOX_WEIGHTS) if self.takes_boxes else ()
        counts = (BOX_COUNTS,) if self.splits_boxes else ()
        inputs = {head.input(slot).name: slot for slot in (IMAGE_TOKENS, *boxes)} | {name: name for name in counts}
        outside, steps = self._picture_steps(*boxes, *counts)
        last = Step(QUERY_SETS if self.splits_boxes else head.name, inputs, {vectors.name: vectors.name})
        most = min(batch_limit(self.manifest.image_tower), batch_limit(head))
        outputs = [Tensor(vectors.name, vectors.dtype, shape)]
        return ensemble(ENCODE_IMAGES, most, list(outside), outputs, (*steps, last))

    def match_texts(self, scorer: GraphSpec) -> ModelConfig:
        tokens = {spec.name: spec.slot for spec in scorer.inputs if spec.slot in TOKEN_SLOTS}
        scores = scorer.output(PAIR_SCORES)
        boxes = (OBJECT_MASKS, BOX_WEIGHTS) if scorer.takes_boxes else ()
        inputs = {scorer.input(slot).name: slot for slot in (IMAGE_TOKENS, *boxes)}
        outside, first = self._picture_steps(*boxes)
        steps = (
            *first,
            Step(CANDIDATES, {TEXT: TEXT}, tokens),
            Step(scorer.name, inputs | tokens, {scores.name: scores.name}),
        )
        most = min(batch_limit(self.manifest.image_tower), batch_limit(scorer))
        given = [*outside, Tensor(TEXT, "string", (-1,))]
        return ensemble(MATCH_TEXTS, most, given, [Tensor.of(scores)], steps)

    def _picture_steps(self, *wanted: str) -> tuple[tuple[Tensor, ...], tuple[Step, Step]]:
        """From a picture to image tokens, with those of masks, weights and counts that are wanted beside them, each by
        its slot: an ensemble may neither make nor take what nobody uses. Also what comes in from outside."""
        tower, head = self.manifest.image_tower, self.manifest.query_head
        outside = tuple(replace(one, optional=False) for one in self.pictures().inputs if wanted or one.name == IMAGE)
        pixels, tokens = tower.input(PIXELS).name, tower.output(IMAGE_TOKENS).name
        made = {pixels: PIXELS}
        made |= {head.input(slot).name: slot for slot in (OBJECT_MASKS, BOX_WEIGHTS) if slot in wanted}
        made |= {BOX_COUNTS: BOX_COUNTS} if BOX_COUNTS in wanted else {}
        pictures = Step(PICTURES, {tensor.name: tensor.name for tensor in outside}, made)
        return outside, (pictures, Step(tower.name, {pixels: PIXELS}, {tokens: IMAGE_TOKENS}))


def batch_limit(graph: GraphSpec) -> int:
    """The longest that a graph's first axis may be in one call."""
    tensor = next(spec for spec in graph.inputs if not spec.shared)
    axis = tensor.shape[0]
    return graph.ranges[axis].max if isinstance(axis, str) else int(axis)


def lengths(graph: GraphSpec) -> dict[str, str]:
    """What the tokenisers pad to, for the reader of the configuration."""
    axis = graph.input(TOKEN_IDS).shape[-1]
    longest = graph.ranges[axis].max if isinstance(axis, str) else axis
    return {"length_step": str(LENGTH_STEP), "longest": str(longest)}


def host(name: str, most: int, inputs: list[Tensor], outputs: list[Tensor], parameters: dict[str, str]) -> ModelConfig:
    return ModelConfig(name, "python", most, tuple(inputs), tuple(outputs), parameters)


def ensemble(name: str, most: int, inputs: list[Tensor], outputs: list[Tensor], steps: tuple[Step, ...]) -> ModelConfig:
    return ModelConfig(name, "", most, tuple(inputs), tuple(outputs), steps=steps)
