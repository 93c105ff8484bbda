"""Projectors onto leading eigenvectors without an eigensolver: density-matrix purification in standard ONNX operators.

Source: SP2, A. M. N. Niklasson, Phys. Rev. B 66, 155115 (2002): repeated X² or 2X − X² drives the eigenvalues of X to 0
or 1 and keeps its eigenvectors. In SP2 the trace decides between the two; here the energy tr(C X) / tr(C) does,
because it defines the cut. Additions to SP2:

1. `_scaled`: eigenvalues are mapped to [0, 1] between the bounds of Wolkowicz and Styan (Linear Algebra Appl. 29, 471,
   1980), mean ± deviation √(d−1), so that a nearly flat spectrum is spread out first.
2. `_accelerated`: if even 2X − X² stays below τ, all eigenvectors with x ≥ u = (E(X) − E(X²)) / (τ − E(X)) are above
   the cut: there x + x (1 − x) / u ≥ 1, and the energy E of X + (X − X²) / u is τ. Their order does not matter:
   X ← 2αX − α²X² with α = 2/(1 + u) folds them onto each other and stretches the rest by up to 4 instead of 2.
   (Folding: E. H. Rubensson, J. Chem. Theory Comput. 7, 1233, 2011.) Otherwise X²: it lowers the undecided values,
   so that the next stretch is long. No trace is needed.
3. `_steered`: if τ is between the two results, the mean of the undecided eigenvalues decides,
   tr((X + X²)(X − X²)) / tr(X − X²) against 3/4; this keeps them away from 0 and 1, where a step would merge them
   with dropped or kept values.
4. `undecided.resolve`: the last one or two undecided values are computed from traces and removed exactly.

Products of d × d matrices: 40 (16 + 17 + 1 steps, 2 to resolve, 4 to polish), for any d and rank. Nothing is
transposed or symmetrised in between: asymmetric rounding errors grow and shrink as symmetric ones do.

Accuracy (benchmarks/perturbation_accuracy.py against `torch.linalg.eigh` in float64; figures in benchmarks/results):
if the ratio at the cut is farther than 1e-5 from τ and the gap at the cut exceeds 1e-5 λ_1, errors are as large as
those of an exact decomposition of the same float32 C; about one matrix in 10,000 exceeds ‖P − P_oracle‖_F = 1e-3.
Eigenvalues of the cut closer than that are limited by float32 itself, and within 1e-5 of τ the rank may be one off.

Everything is float32, in graphs of any precision; on a GPU the products must not be rounded to TF32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.operators import Operators
from qpert.graphs.perturbation.undecided import resolve

ACCELERATED_STEPS = 16
STEERED_STEPS = 17
"""The fewest that reach that accuracy; fewer steered steps leave close pairs undecided."""
CENTRED_STEPS = 1
"""Steered by the mean only: moves undecided values towards the middle, where `resolve` is best conditioned."""
POLISHING_STEPS = 2
"""Each squares the remaining error of the resolved values."""
PRODUCTS = ACCELERATED_STEPS + STEERED_STEPS + CENTRED_STEPS + 2 + 2 * POLISHING_STEPS

STEPS_AT_ONE_SCALE = 4
"""k goes from 1 to 4⁻¹, 4⁻³, 4⁻⁷, 4⁻¹⁵ at most, and R with it; after another step, squares of R would underflow."""

UNFOLDED = 0.1
"""u is moved towards 1 by this share. The bound is sharp if X has two distinct values: a value just below it, which
must be dropped, would be folded onto kept ones. It costs no steps."""

STEPS_BY_RECURRENCE = 6
"""After this many, the energy and the trace are measured again. 2E − E' doubles an error of E at every step that grows,
and near τ such steps come in runs of twelve and more."""

SLACK = 0.01
"""The bounds are widened by this share, so that rounding leaves no eigenvalue outside [0, 1], where steps diverge."""

OUTSIDE = -5e-5
"""Rounding can leave values above 1, which X² doubles, or below 0, which 2X − X² doubles. If all is decided, this may
continue for many steps: then Σ w (x + x²) / 2 with w = x − x², or Σ w minus that, is below this bound, which rounding
alone does not reach."""
STEPS_BETWEEN_GUARDS = 4
"""The interval of that check: three doublings stay small."""

GREATEST_DEFECT = 0.05
"""‖P − P²‖² before the last polish; one eigenvalue of 0.5 makes 0.06, one of −0.2 or 1.2 as much."""


class _Folded(NamedTuple):
    """X as R / k: X² is R² / k², and 2αX − α²X² only needs R² − (2k/α) R."""

    R: gs.Tensor  # [B, A, H, O, d, d]
    one: gs.Tensor  # [B, A, H, O, 1, 1], k: the value in R of X's eigenvalue 1
    energy: gs.Tensor  # [B, A, H, O, 1, 1], tr(C R) / tr(C)


class _Steered(NamedTuple):
    """X as ±R; the other fields describe X."""

    R: gs.Tensor  # [B, A, H, O, d, d]
    twice: gs.Tensor  # [B, A, H, O, 1, 1], ±2
    energy: gs.Tensor  # [B, A, H, O, 1, 1], tr(C X) / tr(C)
    trace: gs.Tensor  # [B, A, H, O, 1, 1]


class Projectors(NamedTuple):
    """Two matrices and their weights: one weight is 1, or both are 0."""

    resolved: gs.Tensor  # [B, A, H, O, d, d]
    soft: gs.Tensor  # [B, A, H, O, d, d]
    resolved_weight: gs.Tensor  # [B, A, H, O, 1, 1]
    soft_weight: gs.Tensor  # [B, A, H, O, 1, 1]


def leading_projectors(ops: Operators, gram: gs.Tensor, threshold: gs.Tensor) -> Projectors:
    """Emit P for every matrix of `gram`.

    Args:
        ops: where to add the operators.
        gram: float32 [B, A, H, O, d, d], symmetric and positive semi-definite.
        threshold: float32 scalar τ.

    Returns:
        P = resolved_weight · resolved + soft_weight · soft, float32 [B, A, H, O, d, d]; zero if `gram` is zero;
        fractional if more eigenvalues coincide at the cut than float32 can separate; not finite if `gram` is not.
    """
    trace = ops.trace(gram)
    covered = ops.less(0.0, trace)
    C = ops("Div", gram, ops("Where", covered, trace, 1.0))
    X = _scaled(ops, C, covered)
    unit = ops.constant("first_one", 1.0)
    folded = _Folded(X, unit, ops.dot(C, X))
    for step in range(ACCELERATED_STEPS):
        with ops.scope(f"accelerated_{step:02}"):
            folded = _accelerated(ops, C, threshold, folded)
            if (step + 1) % STEPS_AT_ONE_SCALE == 0 or step + 1 == ACCELERATED_STEPS:
                X = ops("Mul", folded.R, ops("Div", 1.0, folded.one))
                folded = _Folded(X, unit, ops.dot(C, X))
    steered = _Steered(X, ops.constant("first_twice", 2.0), folded.energy, ops.trace(X))
    for step in range(STEERED_STEPS + CENTRED_STEPS):
        with ops.scope(f"steered_{step:02}"):
            if step and step % STEPS_BY_RECURRENCE == 0:
                steered = _measured(ops, C, steered)
            guarded = (step + 1) % STEPS_BETWEEN_GUARDS == 0
            steered = _steered(ops, C, threshold, steered, by_energy=step < STEERED_STEPS, guarded=guarded)
    X = ops("Mul", steered.R, ops("Mul", steered.twice, 0.5))
    with ops.scope("settle"):
        P = resolve(ops, C, X, threshold=threshold)
    return _polished_or_soft(ops, P, X, covered)


def _scaled(ops: Operators, C: gs.Tensor, covered: gs.Tensor) -> gs.Tensor:
    """(C − low I) / (high − low), for tr(C) = 1: the mean eigenvalue is 1/d. Zero if C is."""
    size = ops.size
    identity = ops.constant("identity", np.eye(size))
    squares = ops.dot(C, C)
    excess = ops("Max", ops("Sub", squares, ops.constant("flat_squares", 1 / size)), 0.0)
    deviation = ops("Sqrt", ops("Mul", excess, ops.constant("bound_factor", (size - 1) / size)))
    low = ops("Max", ops("Sub", ops.constant("mean_less_slack", (1 - SLACK) / size), deviation), 0.0)
    low = ops("Where", covered, low, 0.0)
    high = ops("Min", ops("Sqrt", squares), ops("Add", deviation, ops.constant("mean", 1 / size)))
    high = ops("Mul", high, ops.constant("slack", 1 + SLACK))
    width = ops("Max", ops("Sub", high, low), ops.constant("least_width", SLACK / size))
    return ops("Div", ops("Sub", C, ops("Mul", low, identity)), width)


def _accelerated(ops: Operators, C: gs.Tensor, threshold: gs.Tensor, folded: _Folded) -> _Folded:
    """X² if 2X − X² would reach τ, else 2αX − α²X² with α = 2 / (1 + u), which folds at 1/α, midway from u to 1."""
    R, one, energy = folded
    Y = ops("MatMul", R, R)
    energy_squared = ops.dot(C, Y)
    one_squared = ops("Mul", one, one)
    E = ops("Div", energy, one)
    gained, missing = ops("Sub", E, ops("Div", energy_squared, one_squared)), ops("Sub", threshold, E)
    below = ops.less(gained, missing)
    u = ops("Max", ops("Div", gained, missing), 0.0)
    twice_center = ops("Add", ops("Mul", u, ops.constant("folded", 1 - UNFOLDED)), ops.constant("least", 1 + UNFOLDED))
    linear = ops("Where", below, ops("Mul", twice_center, one), 0.0)  # 2k / α
    top = ops("Mul", ops("Mul", linear, linear), -0.25)  # R² − (2k/α) R where R is k/α
    return _Folded(
        ops("Sub", Y, ops("Mul", linear, R)),
        ops("Where", below, top, one_squared),
        ops("Sub", energy_squared, ops("Mul", linear, energy)),
    )


def _measured(ops: Operators, C: gs.Tensor, steered: _Steered) -> _Steered:
    """The same matrices, with energy and trace measured again instead of carried on by the recurrence."""
    R, twice, _, _ = steered
    sign = ops("Mul", twice, 0.5)
    return _Steered(R, twice, ops("Mul", sign, ops.dot(C, R)), ops("Mul", sign, ops.trace(R)))


def _steered(
    ops: Operators, C: gs.Tensor, threshold: gs.Tensor, steered: _Steered, *, by_energy: bool, guarded: bool
) -> _Steered:
    """X² or 2X − X²: by energy if both results are on the same side of τ, else by the mean of the undecided values.

    2X − X² never lowers the energy, so "E ≥ τ, or the mean is high and the result would reach τ" is one comparison.
    """
    R, twice, energy, trace = steered
    Y = ops("MatMul", R, R)  # X²
    squared, fourth = ops.trace(Y), ops.dot(Y, Y)  # tr X², tr X⁴
    energy_squared = ops.dot(C, Y)
    energy_grown = ops("Add", energy, ops("Sub", energy, energy_squared))
    undecided = ops("Sub", trace, squared)  # Σ w, w = x − x²
    weighted = ops("Sub", squared, fourth)  # Σ w (x + x²)
    square = ops.less(ops("Mul", undecided, 0.75), weighted)  # the undecided values are above a half
    if by_energy:
        square = ops("GreaterOrEqual", ops("Where", square, energy_grown, energy), threshold, dtype=bool)
    if guarded:
        outside = ops.constant("outside", OUTSIDE)
        half = ops("Mul", weighted, 0.5)  # w where x is 1
        square = ops("Or", square, ops.less(ops("Sub", undecided, half), outside), dtype=bool)
        square = ops("And", square, ops.less(outside, half), dtype=bool)
    return _Steered(
        ops("Sub", Y, ops("Mul", ops("Where", square, 0.0, twice), R)),
        ops("Where", square, 2.0, -2.0),
        ops("Where", square, energy_squared, energy_grown),
        ops("Where", square, squared, ops("Add", trace, undecided)),
    )


def _polished_or_soft(ops: Operators, P: gs.Tensor, X: gs.Tensor, covered: gs.Tensor) -> Projectors:
    """3P² − 2P³ (R. McWeeny, Rev. Mod. Phys. 32, 335, 1960): eigenvalues within ±0.36 of 0 or 1 converge, squaring.

    If three or more eigenvalues coincide at the cut, float32 cannot decide which of them to keep, and the resolved P is
    not a projector. X keeps a fraction of each, in any basis; it is the result then.
    """
    for step in range(POLISHING_STEPS):
        with ops.scope(f"polish_{step}"):
            squared = ops("MatMul", P, P)
            defect = ops("Sub", P, squared)
            P = ops("Add", squared, ops("Mul", ops("MatMul", P, defect), 2.0))
    resolved = ops.less(ops.dot(defect, defect), ops.constant("greatest_defect", GREATEST_DEFECT))
    bounded = ops.less(ops.dot(X, X), ops.constant("greatest_norm", ops.size + 1))
    bounded = ops("And", covered, bounded, dtype=bool)
    weight = ops("Where", bounded, 1.0, 0.0)
    resolved_weight = ops("Where", resolved, weight, 0.0)
    return Projectors(P, X, resolved_weight, ops("Sub", weight, resolved_weight))
