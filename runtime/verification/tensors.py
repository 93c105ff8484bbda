"""Does the bundle compute what the reference computes? Tensor by tensor, in every batch shape, with gates that fail.

Each case (inputs, and what the reference makes of them) is run in several shapes: its rows alone, cycled up to the
middle and to the largest batch of the profile, and permuted there. The reference's rows are repeated in the same order,
so a result that depends on a row's neighbours, or on the batch size, is caught (as in TensorRT issues 4853 and 4813).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qpert.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from qpert.runtime.bundle.manifest import Manifest
from qpert.runtime.bundle.roles import BOX_SLOTS, BOX_WEIGHTS, PAIR_SCORER, TOKEN_SLOTS
from qpert.runtime.bundle.samples import Case, Samples
from qpert.runtime.errors import BundleError
from qpert.runtime.progress import Progress, Silent
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.sessions.protocol import Session
from qpert.runtime.verification.host import host_gates
from qpert.runtime.verification.result import Comparison, Gate, Verification
from qpert.runtime.verification.tolerances import PERTURBED_COSINE_DISTANCE, TOLERANCES

Selection = dict[str, npt.NDArray[np.int64]]
"""Axis name → which rows of the case, in which order."""


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
    with stage as advance, np.errstate(invalid="ignore"):  # values that are not finite are counted and fail
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
        *tensor_gates(encoder.manifest, comparisons),
        *(
            Gate(f"{graph}: rows independent of neighbours", value, TOLERANCES[precision].neighbour_abs)
            for graph, value in spread.items()
        ),
        *zero_weight_gates(encoder.manifest, own),
        *effect_gates(encoder.manifest, cases, own),
        *host_gates(encoder, samples),
    ]
    return Verification("tensor", reference, provider, precision, tuple(gates), tuple(comparisons))


def require_cases(encoder: Encoder, cases: Sequence[Case]) -> None:
    """Raise BundleError if a graph or its perturbation has no case: a pass would not cover it."""
    for name, session in encoder.sessions.items():
        mine = [case for case in cases if case.graph == name]
        if not mine:
            raise BundleError(
                f"graph {name!r} has no recorded case to verify it with; export the bundle again", code="case-missing"
            )
        if session.spec.takes_boxes and not any(has_weight(session.spec, case) for case in mine):
            raise BundleError(
                f"no case of graph {name!r} has a box of nonzero weight, so its perturbation would not be verified; "
                "export the bundle again, or pass another --seed with a live reference",
                code="case-without-boxes",
            )


def has_weight(spec: GraphSpec, case: Case) -> bool:
    """Whether the case has a box of nonzero weight."""
    return spec.takes_boxes and bool(np.any(case.inputs[spec.input(BOX_WEIGHTS).name]))


def shapes(spec: GraphSpec, case: Case) -> Iterator[tuple[str, Case, Selection]]:
    """Every selection of rows, and the middle one padded to the largest shape of the profile: with boxes of weight 0,
    and with masked tokens."""
    named = dict(selections(spec, case))
    for label, selection in named.items():
        yield label, case, selection
    if spec.takes_boxes:
        yield "most boxes, padded", with_padding_boxes(spec, case), named["middle"]
    if "L" in spec.ranges:
        yield "longest texts, padded", with_padding_tokens(spec, case), named["middle"]


def with_padding_tokens(spec: GraphSpec, case: Case) -> Case:
    """The case padded with masked tokens to the longest text of the profile: its outputs must not change."""
    names = [tensor.name for tensor in spec.inputs if tensor.slot in TOKEN_SLOTS]
    missing = spec.ranges["L"].max - case.inputs[names[0]].shape[-1]
    padded = {
        name: np.pad(case.inputs[name], [(0, 0)] * (case.inputs[name].ndim - 1) + [(0, missing)]) for name in names
    }
    return replace(case, inputs=case.inputs | padded)


def with_padding_boxes(spec: GraphSpec, case: Case) -> Case:
    """The case with empty boxes of weight 0 appended: its outputs must not change."""
    names = [spec.input(slot).name for slot in BOX_SLOTS]
    missing = spec.ranges["O"].max - case.inputs[names[0]].shape[1]
    padded = {
        name: np.pad(case.inputs[name], [(0, missing if axis == 1 else 0) for axis in range(case.inputs[name].ndim)])
        for name in names
    }
    return replace(case, inputs=case.inputs | padded)


def selections(spec: GraphSpec, case: Case) -> Iterator[tuple[str, Selection]]:
    """The shapes to run a case in, as rows of the case for each batch axis (B; T; I and T)."""
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
    """The axes to choose rows along, with the case's number of rows."""
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
    """Every row of the case (of a graph with two batch axes: every pair) in a call of its own, concatenated."""
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
    perturbed = has_weight(spec, case)
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
    """The largest difference of rows from the same rows computed alone, in the same session."""
    return max(
        float(np.abs(outputs[tensor.name].astype(np.float64) - select(alone[tensor.name], tensor, selection)).max())
        for tensor in spec.outputs
    )


def tensor_gates(manifest: Manifest, comparisons: Sequence[Comparison]) -> Iterator[Gate]:
    """For each graph: largest difference, largest angle, and the number of values that are not finite."""
    precision = manifest.precision
    limits = TOLERANCES[precision]
    for graph in dict.fromkeys(comparison.graph for comparison in comparisons):
        mine = [comparison for comparison in comparisons if comparison.graph == graph]
        role = manifest.graphs[graph].role
        if (max_abs := limits.max_abs(role)) is not None:
            yield Gate(f"{graph}: max abs difference", worst(mine, "max_abs"), max_abs)
        if role != PAIR_SCORER:  # scores are numbers, not directions
            stock = [comparison for comparison in mine if not comparison.perturbed]
            yield Gate(f"{graph}: 1 - cosine", worst(stock, "cosine_distance"), limits.cosine_distance)
            if perturbed := [comparison for comparison in mine if comparison.perturbed]:
                limit = PERTURBED_COSINE_DISTANCE[precision]
                yield Gate(f"{graph}: 1 - cosine, with boxes", worst(perturbed, "cosine_distance"), limit)
        yield Gate(f"{graph}: values not finite", float(sum(comparison.not_finite for comparison in mine)), 0.0)


def worst(comparisons: Sequence[Comparison], quantity: str) -> float:
    """The largest of a quantity; NaN if any is."""
    return float(np.max([getattr(comparison, quantity) for comparison in comparisons]))


def named_outputs(
    own: Mapping[tuple[str, str], Mapping[str, np.ndarray]], graph: str, ending: str
) -> list[tuple[str, Mapping[str, np.ndarray]]]:
    """The outputs of a graph's cases of one kind, recorded or fresh, with the part of their names before the kind."""
    return [
        (name.removesuffix(ending), outputs)
        for (owner, name), outputs in own.items()
        if owner == graph and name.endswith(ending)
    ]


def boxed_graphs(manifest: Manifest) -> list[str]:
    """Names of the graphs that take boxes."""
    return [name for name, graph in manifest.graphs.items() if graph.takes_boxes]


def zero_weight_gates(manifest: Manifest, own: Mapping[tuple[str, str], Mapping[str, np.ndarray]]) -> Iterator[Gate]:
    """Boxes of weight zero must give the same result as no boxes."""
    for graph in boxed_graphs(manifest):
        distances = [
            float(np.abs(zero[name] - own[graph, f"{prefix}no_boxes"][name]).max())
            for prefix, zero in named_outputs(own, graph, "zero_weights")
            for name in zero
        ]
        if distances:
            limit = TOLERANCES[manifest.precision].zero_weight_abs
            yield Gate(f"{graph}: zero weights against no boxes", float(np.max(distances)), limit)


def effect_gates(
    manifest: Manifest, cases: Sequence[Case], own: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
) -> Iterator[Gate]:
    """The effect of boxes compared with the reference's: |change - expected change| / |expected change|.

    Norms are over all cases with boxes, rows computed alone. 1 is what boxes without any effect give. In half precision
    the whole effect is smaller than the tolerance on the output; this still distinguishes a perturbation that is
    ignored, or reads other patches, from one that is only rounded.
    """
    expected = {(case.graph, case.name): case.expected for case in cases}
    for graph in boxed_graphs(manifest):
        error, size = 0.0, 0.0
        for kind in ("one_box", "many_boxes"):
            for prefix, outputs in named_outputs(own, graph, kind):
                stock, whole = (graph, f"{prefix}no_boxes"), (graph, f"{prefix}{kind}")
                for name, output in outputs.items():
                    wanted = expected[whole][name].astype(np.float64) - expected[stock][name]
                    error += float(((output.astype(np.float64) - own[stock][name] - wanted) ** 2).sum())
                    size += float((wanted**2).sum())
        if size:
            limit = TOLERANCES[manifest.precision].effect
            yield Gate(f"{graph}: effect of boxes, relative difference", float(np.sqrt(error / size)), limit)
