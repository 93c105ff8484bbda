"""Does the bundle compute what the reference computes? Tensor by tensor, in every batch shape, with gates that fail.

Each case (inputs, and what the reference makes of them) is run in several shapes: its rows alone, cycled up to the
middle and to the largest batch of the profile, and permuted there. The reference's rows are repeated in the same order,
so a result that depends on a row's neighbours, or on the batch's width, is caught (TensorRT issues 4853 and 4813 were
such).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qpert.runtime.boxes import Boxes
from qpert.runtime.encoder import Encoder
from qpert.runtime.errors import BundleError, QpertWarning
from qpert.runtime.images import preprocess_images
from qpert.runtime.manifest import GraphSpec, TensorSpec
from qpert.runtime.perturbation import box_weights, object_masks
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.samples import Case, Samples
from qpert.runtime.session import Session

Selection = dict[str, npt.NDArray[np.int64]]
"""Axis name → which rows of the case, in which order."""


@dataclass(frozen=True)
class Tolerance:
    """Limits for one precision. None: that quantity is reported and not judged."""

    max_abs: float | None
    cosine_distance: float
    itm_abs: float
    neighbour_abs: float
    zero_weight_abs: float


TOLERANCES: dict[str, Tolerance] = {
    # float32 graphs sum in another order than PyTorch: 1e-6 per operator, 1e-4 after forty layers (blip2.md).
    "fp32": Tolerance(1e-4, 1e-6, 1e-4, 1e-5, 1e-5),
    # 11 bits: 5e-4 a step. The angle is what retrieval reads; scores are logits of order 1.
    "fp16": Tolerance(None, 1e-4, 2e-2, 5e-3, 5e-3),
    # 8 bits: 4e-3 a step.
    "bf16": Tolerance(None, 1e-3, 2e-1, 5e-2, 5e-2),
}
PERTURBED_COSINE_DISTANCE = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}
"""With boxes, in half precision: keys rounded to 11 or 8 bits move contribution ratios across the threshold, and a rank
that flips changes one direction of one head. What that costs in angle is bounded here, since it cannot be avoided."""


def json_number(value: Any) -> Any:
    """`value`, or None where it is NaN or infinite: JSON has no such numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Gate:
    """One judged number: passes where `value` is at most `limit`."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.limit)  # False for NaN

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "value": json_number(self.value), "limit": self.limit, "pass": self.passed}


@dataclass(frozen=True)
class Comparison:
    """One output of one case in one shape against the reference."""

    graph: str
    case: str
    shape: str
    output: str
    max_abs: float
    cosine_distance: float
    not_finite: int
    perturbed: bool


@dataclass(frozen=True)
class Verification:
    """The verdict and everything that it rests on."""

    level: str
    reference: str
    provider: str
    precision: str
    gates: tuple[Gate, ...]
    comparisons: tuple[Comparison, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def verdict(self) -> str:
        return "pass" if self.passed else "fail"

    def with_environment(self, environment: dict[str, str]) -> Verification:
        return replace(self, environment=environment)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "level": self.level,
            "reference": self.reference,
            "provider": self.provider,
            "precision": self.precision,
            "gates": [gate.to_dict() for gate in self.gates],
            "comparisons": [
                {key: json_number(value) for key, value in asdict(comparison).items()}
                for comparison in self.comparisons
            ],
            "environment": self.environment,
        }


def verify_tensors(
    encoder: Encoder,
    cases: Sequence[Case],
    samples: Samples,
    *,
    reference: str,
    provider: str,
    progress: Progress | None = None,
) -> Verification:
    """Level `tensor`: every graph on every case in every shape, plus preprocessing and tokenisation.

    Args:
        encoder: the opened bundle.
        cases: inputs with the reference's outputs.
        samples: the recorded pictures and captions.
        reference: its name, for the report.
        provider: the provider's name, for the report.
    """
    precision = encoder.manifest.precision
    require_cases(encoder, cases)
    comparisons: list[Comparison] = []
    own: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    spread: dict[str, float] = {}
    stage = (progress or Silent()).stage("verifying", total=len(cases))
    with stage as advance, np.errstate(invalid="ignore"):  # what is not finite is counted and fails
        for case in cases:
            session = encoder.sessions[case.graph]
            alone = run_rows_alone(session, case)
            own[case.graph, case.name] = alone
            for label, shaped, selection in shapes(session.spec, case):
                outputs = run_selected(session, shaped, selection)
                comparisons += compare(case, session.spec, label, outputs, selection)
                distance = neighbour_distance(session.spec, outputs, alone, selection)
                spread[case.graph] = float(np.maximum(spread.get(case.graph, 0.0), distance))  # NaN stays
            advance(1)
    gates = [
        *tensor_gates(comparisons, precision),
        *(
            Gate(f"{graph}: rows independent of neighbours", value, TOLERANCES[precision].neighbour_abs)
            for graph, value in spread.items()
        ),
        *zero_weight_gates(own, precision),
        preprocessing_gate(encoder, samples),
        tokenizer_gate(encoder, samples),
        *box_gates(encoder, samples),
    ]
    return Verification("tensor", reference, provider, precision, tuple(gates), tuple(comparisons), {})


def require_cases(encoder: Encoder, cases: Sequence[Case]) -> None:
    """Raises BundleError where a graph, or its perturbation, has no case: a pass would say nothing of it."""
    for name, session in encoder.sessions.items():
        mine = [case for case in cases if case.graph == name]
        if not mine:
            raise BundleError(f"there is no case for graph {name!r} to verify it with; export the bundle again")
        if session.spec.takes_boxes and not any(np.any(case.inputs["box_weights"]) for case in mine):
            raise BundleError(
                f"no case of graph {name!r} has a box of weight, so its perturbation would not be verified; "
                "export the bundle again, or pass another --seed with a live reference"
            )


def shapes(spec: GraphSpec, case: Case) -> Iterator[tuple[str, Case, Selection]]:
    """Every selection of rows, and the middle one with boxes of weight 0 up to the most that the profile allows."""
    named = dict(selections(spec, case))
    for label, selection in named.items():
        yield label, case, selection
    if spec.takes_boxes:
        yield "most boxes, padded", with_padding_boxes(spec, case), named["middle"]


def with_padding_boxes(spec: GraphSpec, case: Case) -> Case:
    """The case with empty boxes of weight 0 appended: its outputs must not change."""
    missing = spec.ranges["O"].max - case.inputs["box_weights"].shape[1]
    padded = {
        name: np.pad(case.inputs[name], [(0, missing if axis == 1 else 0) for axis in range(case.inputs[name].ndim)])
        for name in ("object_masks", "box_weights")
    }
    return replace(case, inputs=case.inputs | padded)


def selections(spec: GraphSpec, case: Case) -> Iterator[tuple[str, Selection]]:
    """The shapes in which a case is run, as rows of the case for each batch axis (B; T; I and T)."""
    axes = batch_axes(spec, case)
    rng = np.random.default_rng(0)

    def cycled(sizes: Mapping[str, int]) -> Selection:
        return {axis: np.arange(size) % axes[axis] for axis, size in sizes.items()}

    smallest = {axis: spec.ranges[axis].min for axis in axes}
    largest = {axis: spec.ranges[axis].max for axis in axes}
    middle = {axis: (smallest[axis] + largest[axis]) // 2 for axis in axes}
    yield "smallest", cycled(smallest)
    yield "middle", cycled(middle)
    yield "largest", cycled(largest)
    yield "largest, permuted", {axis: rng.permutation(rows) for axis, rows in cycled(largest).items()}
    if len(axes) > 1:
        yield "one image, most texts", cycled(smallest | {"T": largest["T"]})
        yield "most images, one text", cycled(largest | {"T": smallest["T"]})


def batch_axes(spec: GraphSpec, case: Case) -> dict[str, int]:
    """The axes along which rows can be chosen, with the case's number of rows."""
    return {
        axis: case.inputs[tensor.name].shape[place]
        for tensor in spec.inputs
        for place, axis in enumerate(tensor.shape)
        if isinstance(axis, str) and axis in ("B", "I", "T")
    }


def select(array: np.ndarray, spec: TensorSpec, selection: Selection) -> np.ndarray:
    """Rows of `array` along every axis that `selection` names, in the declared dtype."""
    for place, axis in enumerate(spec.shape):
        if isinstance(axis, str) and axis in selection:
            array = np.take(array, selection[axis], axis=place)
    return np.ascontiguousarray(array, dtype=spec.dtype)


def run_selected(session: Session, case: Case, selection: Selection) -> dict[str, np.ndarray]:
    inputs = {tensor.name: select(case.inputs[tensor.name], tensor, selection) for tensor in session.spec.inputs}
    return session.run(inputs)


def run_rows_alone(session: Session, case: Case) -> dict[str, np.ndarray]:
    """Every row of the case (of a graph with two batch axes: every pair) in a call of its own, put together again."""
    first, *others = axes = batch_axes(session.spec, case)
    if not others:
        runs = [run_selected(session, case, {first: np.array([row])}) for row in range(axes[first])]
        return {name: np.concatenate([run[name] for run in runs]) for name in session.spec.output_names}
    (second,) = others
    pairs = [
        [
            run_selected(session, case, {first: np.array([row]), second: np.array([column])})
            for column in range(axes[second])
        ]
        for row in range(axes[first])
    ]
    return {
        name: np.concatenate([np.concatenate([run[name] for run in row], axis=1) for row in pairs])
        for name in session.spec.output_names
    }


def compare(
    case: Case, spec: GraphSpec, label: str, outputs: Mapping[str, np.ndarray], selection: Selection
) -> Iterable[Comparison]:
    """Each output against the reference's rows in the same order."""
    perturbed = bool(np.any(case.inputs.get("box_weights", 0)))
    for tensor in spec.outputs:
        got = outputs[tensor.name].astype(np.float64)
        expected = select(case.expected[tensor.name], tensor, selection).astype(np.float64)
        max_abs = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("inf")
        distance = cosine_distance(got, expected) if got.shape == expected.shape else float("inf")
        not_finite = int((~np.isfinite(got)).sum())
        yield Comparison(case.graph, case.name, label, tensor.name, max_abs, distance, not_finite, perturbed)


def cosine_distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest 1 − cosine over rows of the last axis."""
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosine = (got * expected).sum(-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return float((1 - cosine).max())


def neighbour_distance(
    spec: GraphSpec, outputs: Mapping[str, np.ndarray], alone: Mapping[str, np.ndarray], selection: Selection
) -> float:
    """How far rows lie from the same rows computed alone, by this same session."""
    return max(
        float(np.abs(outputs[tensor.name].astype(np.float64) - select(alone[tensor.name], tensor, selection)).max())
        for tensor in spec.outputs
    )


def tensor_gates(comparisons: Sequence[Comparison], precision: str) -> Iterator[Gate]:
    """For each graph: largest difference, largest angle, and whether everything is finite."""
    limits = TOLERANCES[precision]
    for graph in dict.fromkeys(comparison.graph for comparison in comparisons):
        mine = [comparison for comparison in comparisons if comparison.graph == graph]
        max_abs = limits.itm_abs if graph == "itm" else limits.max_abs
        if max_abs is not None:
            yield Gate(f"{graph}: max abs difference", worst(mine, "max_abs"), max_abs)
        if graph != "itm":  # scores are numbers, not directions
            stock = [comparison for comparison in mine if not comparison.perturbed]
            yield Gate(f"{graph}: 1 - cosine", worst(stock, "cosine_distance"), limits.cosine_distance)
            if perturbed := [comparison for comparison in mine if comparison.perturbed]:
                limit = PERTURBED_COSINE_DISTANCE[precision]
                yield Gate(f"{graph}: 1 - cosine, with boxes", worst(perturbed, "cosine_distance"), limit)
        yield Gate(f"{graph}: values not finite", float(sum(comparison.not_finite for comparison in mine)), 0.0)


def worst(comparisons: Sequence[Comparison], quantity: str) -> float:
    """The largest of a quantity; NaN if any is."""
    return float(np.max([getattr(comparison, quantity) for comparison in comparisons]))


def zero_weight_gates(own: Mapping[tuple[str, str], Mapping[str, np.ndarray]], precision: str) -> Iterator[Gate]:
    """Boxes of weight zero must give what no boxes give."""
    for graph in ("image_query", "itm"):
        zero, none = own.get((graph, "zero_weights")), own.get((graph, "no_boxes"))
        if zero is not None and none is not None:
            distance = max(float(np.abs(zero[name] - none[name]).max()) for name in zero)
            yield Gate(f"{graph}: zero weights against no boxes", distance, TOLERANCES[precision].zero_weight_abs)


def preprocessing_gate(encoder: Encoder, samples: Samples) -> Gate:
    """Pictures preprocessed here against the recorded pixels; 1e-5 is float32 rounding of (x/255 − mean)/std."""
    pictures = [picture for picture, _ in samples.pictures]
    pixel_values = preprocess_images(pictures, encoder.manifest.preprocessing)
    distance = float(np.abs(pixel_values - np.stack([pixels for _, pixels in samples.pictures])).max())
    return Gate("preprocessing: max abs difference", distance, 1e-5)


def tokenizer_gate(encoder: Encoder, samples: Samples) -> Gate:
    """Recorded captions whose token ids differ here."""
    different = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QpertWarning)  # these captions are not the user's: no matter if they are cut
        for caption, expected in samples.captions:
            ids = encoder.tokenizer.encode([caption]).input_ids[0]
            different += int(not np.array_equal(ids, expected))
    return Gate("tokenizer: captions with other ids", float(different), 0.0)


def box_gates(encoder: Encoder, samples: Samples) -> Iterator[Gate]:
    """Masks and weights made here of the recorded boxes; 1e-5 is float32 rounding of shares and of weights up to 10."""
    manifest = encoder.manifest
    if not manifest.graphs["image_query"].takes_boxes:
        return
    masks, weights = 0.0, 0.0
    for sample in samples.boxes:
        boxes = [Boxes(sample.xyxy, (int(sample.size[0]), int(sample.size[1])))]
        made = object_masks(
            boxes,
            grid=manifest.grid,
            image_size=manifest.preprocessing.size,
            coverage=manifest.perturbation.coverage,
        )
        masks = max(masks, float(np.abs(made[0] - sample.masks).max()))
        weights = max(weights, float(np.abs(box_weights(boxes, manifest.perturbation)[0] - sample.weights).max()))
    yield Gate("boxes: masks, max abs difference", masks, 1e-5)
    yield Gate("boxes: weights, max abs difference", weights, 1e-5)
