"""Projectors onto leading eigenvectors without an eigensolver: density-matrix purification in standard ONNX operators.

Source: SP2, A. M. N. Niklasson, Phys. Rev. B 66, 155115 (2002): repeated X² or 2X − X² drives the eigenvalues of X to 0
or 1 and leaves its eigenvectors alone. There the trace says which of the two to take; here the energy tr(C X) / tr(C)
does, as the cut is defined by it. What is added to SP2:

1. `_scaled`: eigenvalues are mapped to [0, 1] between the bounds of Wolkowicz and Styan (Linear Algebra Appl. 29, 471,
   1980), mean ± deviation √(d−1), so that a nearly flat spectrum starts spread out.
2. `_accelerated`: eigenvectors with x ≥ u hold at most E/u of the energy E (Markov), so all with x ≥ E/τ lie above the
   cut. They need no order among themselves: X ← 2αX − α²X² with α = 2/(1 + E/τ) folds them onto each other and
   stretches the rest by up to 4 instead of 2. (Folding: E. H. Rubensson, J. Chem. Theory Comput. 7, 1233, 2011.)
3. `_steered`: near the target both results may straddle τ; then the mean of the undecided eigenvalues,
   tr(X (X − X²)) / tr(X − X²), decides, which keeps them away from 1, where a step would merge them with what is kept.
4. `settlement.settle`: the last one or two undecided values are computed from traces and removed exactly.

Products of d × d matrices: 42 (12 + 23 + 1 steps, 2 to settle, 4 to polish), whatever d and the rank. Nothing is
transposed or symmetrised on the way: rounding that is not symmetric grows and shrinks as symmetric rounding does.

Measured in ONNX Runtime on a CPU against `torch.linalg.eigh` in float64, over the spectra of tests/spectra.py with
d = 64, 32 and 16 and τ in {0.85, 0.9, 0.95, 0.99}, where |c − τ| > 1e-5 and the gap at the cut exceeds 1e-5 λ_1
(benchmarks/perturbation_accuracy.py):

- 25,696 matrices of the battery: no wrong rank, no error ‖P − P_oracle‖_F above 1e-3; 8.5e-7 in the median, 1.7e-4 at
  the 99th percentile. An exact eigendecomposition of the same float32 C has 3.3e-7 and 1.4e-4.
- 2,089 with pairs of eigenvalues 1e-5 to 1e-2 λ_1 apart: two wrong ranks, 176 errors above 1e-3, where the exact
  decomposition of the float32 C has 87: there float32 sets the limit.
- 9,000 of rank 2, 3 and 5 with a ratio 3e-5 to 1e-3 from τ: no wrong rank, no error above 1e-3.
- Not asked, and not always right: c_1 within 1e-5 of τ, where p is one on either side. Of 3,000 matrices of rank two
  with c_1 1e-6 to 1e-5 from τ, 88 have an error above 1e-3.

Everything is float32, whatever surrounds it; on a GPU the products must not be rounded to TF32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.operators import Operators
from qpert.graphs.perturbation.settlement import settle

ACCELERATED_STEPS = 12
"""From then on E is close to τ, and the accelerated step is no better than the plain one."""
STEERED_STEPS = 23
"""Fewer leave close eigenvalues together: of 5,369 matrices, some with close pairs, 28 had a wrong rank with
15 steps, 12 with 17, 4 with 19, 1 with 21, none with 23."""
CENTRED_STEPS = 1
"""Steered by the mean alone: brings what is undecided towards the middle, where settling is best conditioned."""
POLISHING_STEPS = 2
"""Each squares what is left: the error of the settled values. With one, 6 of the same 5,369 were idempotent to 1e-4 no
more, with two 3."""
PRODUCTS = ACCELERATED_STEPS + STEERED_STEPS + CENTRED_STEPS + 2 + 2 * POLISHING_STEPS

STEPS_AT_ONE_SCALE = 4
"""s goes from 1 to 4, 4³, 4⁷, 4¹⁵ at most, while R shrinks as much; one step more and squares of R would underflow."""

STEPS_BY_RECURRENCE = 6
"""After so many the energy and the trace are measured again. 2E − E' doubles an error of E at every step that grows,
and near τ such steps come in runs of twelve and more: without, of 9,000 matrices with a ratio 1e-5 to 1e-4 from τ, 223
had an error above 1e-3; measured at every fourth step 71, at every step as many."""

SLACK = 0.01
"""The bounds are widened by this share, so that rounding leaves no eigenvalue outside [0, 1], where steps diverge."""

OUTSIDE = -5e-5
"""Rounding can leave values above 1, which X² doubles, or below 0, which 2X − X² doubles. Where all is decided this may
go on for many steps: Σ x (x − x²) or Σ (1 − x)(x − x²) below this, beyond what rounding makes of them, shows it."""

GREATEST_DEFECT = 0.05
"""‖P − P²‖² before the last polish; one eigenvalue of 0.5 makes 0.06, one of −0.2 or 1.2 as much."""


class _Scaled(NamedTuple):
    """X as s R: so X² is s² R², and aX² + bX is a s² (R² + l R), two passes over the matrices instead of three."""

    R: gs.Tensor  # [B, A, H, O, d, d]
    scale: gs.Tensor  # [B, A, H, O, 1, 1], s
    energy: gs.Tensor  # [B, A, H, O, 1, 1], tr(C X) / tr(C)


class _Folded(NamedTuple):
    iterate: _Scaled
    bound: gs.Tensor  # [B, A, H, O, 1, 1], what lies above it is kept


class _Steered(NamedTuple):
    iterate: _Scaled  # s is 1 or −1
    trace: gs.Tensor  # [B, A, H, O, 1, 1], tr(X)


def leading_projectors(ops: Operators, gram: gs.Tensor, threshold: gs.Tensor) -> gs.Tensor:
    """Emit P for every matrix of `gram`.

    Args:
        ops: where to add the operators.
        gram: float32 [B, A, H, O, d, d], symmetric and positive semi-definite.
        threshold: float32 scalar τ.

    Returns:
        float32 [B, A, H, O, d, d]; zero where `gram` is zero, and where it holds anything that is not finite;
        fractional where too many eigenvalues coincide at the cut for float32 to choose.
    """
    trace = ops.trace(gram)
    covered = ops.less(0.0, trace)
    C = ops("Div", gram, ops("Where", covered, trace, 1.0))
    X = _scaled(ops, C)
    one = ops.constant("first_scale", 1.0)
    iterate = _Scaled(X, one, ops.dot(C, X))
    folded = _Folded(iterate, ops.constant("first_fold_bound", 1.0))
    for step in range(ACCELERATED_STEPS):
        with ops.scope(f"accelerated_{step:02}"):
            folded = _accelerated(ops, C, threshold, folded)
            if (step + 1) % STEPS_AT_ONE_SCALE == 0:
                R = _rescaled(ops, folded.iterate)
                folded = folded._replace(iterate=_Scaled(R, one, ops.dot(C, R)))
    steered = _Steered(folded.iterate, ops.trace(folded.iterate.R))
    for step in range(STEERED_STEPS + CENTRED_STEPS):
        with ops.scope(f"steered_{step:02}"):
            if step and step % STEPS_BY_RECURRENCE == 0:
                steered = _measured(ops, C, steered)
            steered = _steered(ops, C, threshold, steered, by_energy=step < STEERED_STEPS)
    X = _rescaled(ops, steered.iterate)
    with ops.scope("settle"):
        P = settle(ops, C, X, threshold=threshold)
    return _polished_or_soft(ops, P, X, covered)


def _scaled(ops: Operators, C: gs.Tensor) -> gs.Tensor:
    """(C − low I) / (high − low), for tr(C) = 1: the mean eigenvalue is 1/d."""
    size = ops.size
    identity = ops.constant("identity", np.eye(size))
    squares = ops.dot(C, C)
    excess = ops("Max", ops("Sub", squares, ops.constant("flat_squares", 1 / size)), 0.0)
    deviation = ops("Sqrt", ops("Mul", excess, ops.constant("bound_factor", (size - 1) / size)))
    low = ops("Max", ops("Sub", ops.constant("mean_less_slack", (1 - SLACK) / size), deviation), 0.0)
    high = ops("Min", ops("Sqrt", squares), ops("Add", deviation, ops.constant("mean", 1 / size)))
    high = ops("Mul", high, ops.constant("slack", 1 + SLACK))
    width = ops("Max", ops("Sub", high, low), ops.constant("least_width", SLACK / size))
    return ops("Div", ops("Sub", C, ops("Mul", low, identity)), width)


def _accelerated(ops: Operators, C: gs.Tensor, threshold: gs.Tensor, folded: _Folded) -> _Folded:
    """X² where the energy has reached τ, else 2αX − α²X²; the bound moves as the eigenvalues do."""
    (R, scale, energy), bound = folded
    Y = ops("MatMul", R, R)
    scale_squared = ops("Mul", scale, scale)
    energy_squared = ops("Mul", scale_squared, ops.dot(C, Y))
    below = ops.less(ops("Sub", ops("Mul", energy, 2.0), energy_squared), threshold)
    bound = ops("Min", bound, ops("Div", energy, threshold))
    alpha = ops("Div", 2.0, ops("Add", bound, 1.0))
    a = ops("Where", below, ops("Neg", ops("Mul", alpha, alpha)), 1.0)
    b = ops("Where", below, ops("Mul", alpha, 2.0), 0.0)
    linear = ops("Where", below, ops("Div", -2.0, ops("Mul", alpha, scale)), 0.0)  # b / (a s)
    iterate = _Scaled(
        ops("Add", Y, ops("Mul", linear, R)),
        ops("Mul", a, scale_squared),
        ops.combine(a, energy_squared, b, energy),
    )
    return _Folded(iterate, ops.combine(a, ops("Mul", bound, bound), b, bound))


def _rescaled(ops: Operators, iterate: _Scaled) -> gs.Tensor:
    return ops("Mul", iterate.scale, iterate.R)


def _measured(ops: Operators, C: gs.Tensor, steered: _Steered) -> _Steered:
    """The same matrices; energy and trace are theirs again, not what a recurrence made of earlier ones."""
    R, sign, _ = steered.iterate
    return _Steered(_Scaled(R, sign, ops("Mul", sign, ops.dot(C, R))), ops("Mul", sign, ops.trace(R)))


def _steered(ops: Operators, C: gs.Tensor, threshold: gs.Tensor, steered: _Steered, *, by_energy: bool) -> _Steered:
    """X² or 2X − X²: by energy where both results lie on one side of τ, else by the mean of what is undecided.

    2X − X² never lowers the energy, so "E ≥ τ, or the mean is high and the result would reach τ" is one comparison.
    """
    (R, sign, energy), trace = steered
    Y = ops("MatMul", R, R)  # X²
    squared, cubed = ops.trace(Y), ops("Mul", sign, ops.dot(R, Y))  # tr X², tr X³
    energy_squared = ops.dot(C, Y)
    energy_grown = ops("Sub", ops("Mul", energy, 2.0), energy_squared)
    undecided = ops("Sub", trace, squared)
    weighted = ops("Sub", squared, cubed)  # Σ x (x − x²)
    square = ops.less(undecided, ops("Mul", weighted, 2.0))  # the mean of the undecided exceeds a half
    if by_energy:
        square = ops("GreaterOrEqual", ops("Where", square, energy_grown, energy), threshold, dtype=bool)
    outside = ops.constant("outside", OUTSIDE)
    square = ops("Or", square, ops.less(ops("Sub", undecided, weighted), outside), dtype=bool)
    square = ops("And", square, ops.less(outside, weighted), dtype=bool)
    linear = ops("Where", square, 0.0, ops("Mul", sign, -2.0))
    iterate = _Scaled(
        ops("Add", Y, ops("Mul", linear, R)),
        ops("Where", square, 1.0, -1.0),
        ops("Where", square, energy_squared, energy_grown),
    )
    return _Steered(iterate, ops("Where", square, squared, ops("Add", trace, undecided)))


def _polished_or_soft(ops: Operators, P: gs.Tensor, X: gs.Tensor, covered: gs.Tensor) -> gs.Tensor:
    """3P² − 2P³ (R. McWeeny, Rev. Mod. Phys. 32, 335, 1960): eigenvalues within ±0.36 of 0 or 1 converge, squaring.

    Where three or more eigenvalues coincide at the cut, nothing computed in float32 can say which of them to keep, and
    the settled P is no projector. X keeps a fraction of each there, whatever the basis: that is the answer then.
    """
    for step in range(POLISHING_STEPS):
        with ops.scope(f"polish_{step}"):
            squared = ops("MatMul", P, P)
            defect = ops("Sub", P, squared)
            P = ops("Sub", ops("Mul", squared, 3.0), ops("Mul", ops("MatMul", squared, P), 2.0))
    settled = ops.less(ops.dot(defect, defect), ops.constant("greatest_defect", GREATEST_DEFECT))
    # What is not finite must not reach a query, not even times zero.
    bounded = ops.less(ops.dot(X, X), ops.constant("greatest_norm", ops.size + 1))
    settled, bounded = (ops("And", covered, kind, dtype=bool) for kind in (settled, bounded))
    return ops("Where", settled, P, ops("Where", bounded, X, 0.0))
