"""The end of a purification: the last one or two undecided eigenvalues, found from traces and removed exactly.

After the steered steps all eigenvalues of X are 0 or 1 to within about 1e-7, except those at the cut. They remain in
W = X − X². Let V = X W, and take traces as Σ_ij of products of two of W, V: both factors are zero off the undecided
subspace, so rounding errors elsewhere do not accumulate. With weights w_i² = (x_i − x_i²)² the mean of the undecided
x is f = ⟨V, W⟩ / ⟨W, W⟩ and, with Z = V − f W, their squared spread is s² = ⟨Z, Z⟩ / ⟨W, W⟩. If there are two values,
each of any multiplicity, they are x = f + t with t² − βt − s² = 0 (Gauss quadrature with two nodes).

β comes from one more trace: M = tr(W − V), of weight x(1 − x)², or M = tr(V), of weight x²(1 − x), whichever is
more accurate. With h the distance of f from 0 (or from 1), m = h M − ⟨W, W⟩ and β = ±(⟨Z, Z⟩ M / (m ⟨W, W⟩) − h). If m
is below rounding errors, the two are close together; assuming equal multiplicity, the ratio of their weights follows
from the slope of ln w.

P = X + a W + b Z moves the two values to 0 or 1. Keeping neither, the greater or both: the choice that keeps most while
its energy stays below τ follows the definition of the rank, here evaluated exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_graphsurgeon as gs

from qpert.graphs.perturbation.operators import Operators

NEAREST_TO_INTEGER = 1e-5
"""Undecided values are at least this far from 0 and 1; nearer ones are decided."""
SKEW_NOISE = 3e-5
"""The trace in m has an error of about 5e-7; β is used if that leaves it accurate to about a tenth of the spread."""
LEAST_LOGIT_SPREAD = 1e-2
"""s / (f (1 − f)) below this is one value: relative gaps of 1e-5 reach 0.04 or more here, rounding errors less."""
LEAST_SQUARED_SPREAD = 2e-11
"""⟨Z, Z⟩ of rounding errors is about 1e-12."""
LEAST_PARTICIPATION = 1.01
"""(tr W)² / ⟨W, W⟩ is 1 for a single undecided eigenvalue, 2 for two equal ones. Below this, the second is ignored."""
ALIKE_PARTICIPATION = 1.7
"""Values without a measurable β are close together, so their weights are nearly equal; less indicates a single value
and a distant one that is decided well enough."""
LEAST_KEPT_WEIGHT = 2e-8
"""⟨W, W⟩ of values below a half that may be kept: about 1.4e-4 for a single one."""


class _Undecided(NamedTuple):
    upper: gs.Tensor  # the greater value, [..., 1, 1]
    lower: gs.Tensor
    are_two: gs.Tensor  # bool; where false, both are the mean


class _Move(NamedTuple):
    """P = X + a W + b Z."""

    a: gs.Tensor
    b: gs.Tensor


def resolve(ops: Operators, C: gs.Tensor, X: gs.Tensor, *, threshold: gs.Tensor) -> gs.Tensor:
    """Emit the projector that X is close to, with two products; C has trace 1. See the module docstring."""
    W = ops("Sub", X, ops("MatMul", X, X))
    V = ops("MatMul", X, W)
    trace_W, trace_V = ops.trace(W), ops.dot(X, W)
    WW = ops("Max", ops.dot(W, W), ops.constant("least_weight", 1e-14))
    mean = ops("Div", ops.dot(V, W), WW)
    Z = ops("Sub", V, ops("Mul", mean, W))
    trace_Z = ops("Sub", trace_V, ops("Mul", mean, trace_W))
    values = _undecided(ops, mean, WW=WW, ZZ=ops.dot(Z, Z), trace_W=trace_W, trace_V=trace_V)

    neither, greater, both = _moves(ops, mean, values)
    energies = [ops.dot(C, matrix) for matrix in (X, W, Z)]
    traces = [ops.trace(X), trace_W, trace_Z]
    empty = ops.less(_moved(ops, traces, neither), 0.75)  # the rank is at least one
    # A value this near to 0 may be rounding errors over all dropped directions; keeping it would magnify them.
    real = ops.less(ops.constant("least_kept_weight", LEAST_KEPT_WEIGHT), ops("Max", WW, ops("Sub", mean, 0.5)))
    greater_fits = ops("Or", empty, ops.less(_moved(ops, energies, greater), threshold), dtype=bool)
    keep_greater = ops("And", ops("And", values.are_two, greater_fits, dtype=bool), real, dtype=bool)
    lone = ops("And", empty, ops("Not", keep_greater, dtype=bool), dtype=bool)
    both_fit = ops("Or", lone, ops.less(_moved(ops, energies, both), threshold), dtype=bool)
    keep_both = ops("And", both_fit, real, dtype=bool)
    move = _Move(
        *(ops("Where", keep_both, both[i], ops("Where", keep_greater, greater[i], neither[i])) for i in (0, 1))
    )
    return _moved(ops, [X, W, Z], move)


def _undecided(
    ops: Operators, mean: gs.Tensor, *, WW: gs.Tensor, ZZ: gs.Tensor, trace_W: gs.Tensor, trace_V: gs.Tensor
) -> _Undecided:
    mean = _inside(ops, mean)
    rest = ops("Sub", 1.0, mean)
    spread = ops("Max", ops("Sqrt", ops("Div", ZZ, WW)), ops.constant("least_spread", 1e-7))
    logit_spread = ops("Div", spread, ops("Mul", mean, rest))
    beta, measurable = _skew(ops, mean, rest, spread=spread, WW=WW, ZZ=ZZ, trace_W=trace_W, trace_V=trace_V)
    half = ops("Mul", beta, 0.5)
    root = ops("Sqrt", ops("Add", ops("Mul", half, half), ops("Mul", spread, spread)))
    upper = _inside(ops, ops("Add", mean, ops("Add", half, root)))
    lower = _inside(ops, ops("Add", mean, ops("Sub", half, root)))
    alike = ops.constant("alike_participation", ALIKE_PARTICIPATION)
    participation = ops("Where", measurable, ops.constant("least_participation", LEAST_PARTICIPATION), alike)
    conditions = (
        ops.less(ops.constant("least_distance", 1e-4), ops("Sub", upper, lower)),
        ops.less(ops("Mul", WW, participation), ops("Mul", trace_W, trace_W)),
        ops.less(ops.constant("least_logit_spread", LEAST_LOGIT_SPREAD), logit_spread),
        ops.less(ops.constant("least_squared_spread", LEAST_SQUARED_SPREAD), ZZ),
    )
    are_two = conditions[0]
    for condition in conditions[1:]:
        are_two = ops("And", are_two, condition, dtype=bool)
    return _Undecided(ops("Where", are_two, upper, mean), ops("Where", are_two, lower, mean), are_two)


def _skew(
    ops: Operators,
    mean: gs.Tensor,
    rest: gs.Tensor,
    *,
    spread: gs.Tensor,
    WW: gs.Tensor,
    ZZ: gs.Tensor,
    trace_W: gs.Tensor,
    trace_V: gs.Tensor,
) -> tuple[gs.Tensor, gs.Tensor]:
    """β, the sum of the two values' distances from the mean, and whether it was measured (otherwise derived)."""
    from_zero, from_one = (
        (h, M, ops("Sub", ops("Mul", h, M), WW)) for h, M in ((mean, ops("Sub", trace_W, trace_V)), (rest, trace_V))
    )
    clarity = [ops("Div", m, ops("Mul", h, h)) for h, _, m in (from_zero, from_one)]
    use_one = ops.less(*clarity)
    h, M, m = (ops("Where", use_one, one, zero) for zero, one in zip(from_zero, from_one, strict=True))
    noise = ops.constant("skew_noise", SKEW_NOISE)
    measurable = ops.less(noise, ops("Mul", ops("Max", *clarity), spread))
    ratio = ops("Div", ops("Mul", ZZ, M), ops("Mul", ops("Where", measurable, m, 1.0), WW))
    measured = ops("Sub", ratio, h)
    measured = ops("Where", use_one, ops("Neg", measured), measured)
    # For nearby values the weights w² are as exp(2 · 2s · d ln w / dx) : 1, with d ln w / dx = (1 − 2f) / (f (1 − f)).
    slope = ops("Div", ops("Sub", rest, mean), ops("Mul", mean, rest))
    log_ratio = _clipped(ops, ops("Mul", ops("Mul", spread, 2.0), slope), -3.0, 3.0)
    q = ops("Exp", log_ratio)
    derived = ops("Mul", spread, ops("Sub", ops("Div", 1.0, q), q))
    return ops("Where", measurable, measured, derived), measurable


def _moves(ops: Operators, mean: gs.Tensor, values: _Undecided) -> tuple[_Move, _Move, _Move]:
    """Moves that send (upper, lower) to (0, 0), (1, 0) and (1, 1)."""
    keep = [ops("Div", 1.0, x) for x in values[:2]]  # x + (x − x²) / x = 1
    drop = [ops("Div", -1.0, ops("Sub", 1.0, x)) for x in values[:2]]  # x − (x − x²) / (1 − x) = 0
    distance = ops("Where", values.are_two, ops("Sub", values.upper, values.lower), 1.0)
    offset = ops("Sub", values.upper, mean)

    def through(at_upper: gs.Tensor, at_lower: gs.Tensor) -> _Move:
        b = ops("Div", ops("Sub", at_upper, at_lower), distance)
        return _Move(ops("Sub", at_upper, ops("Mul", b, offset)), b)

    return through(drop[0], drop[1]), through(keep[0], drop[1]), through(keep[0], keep[1])


def _moved(ops: Operators, parts: list[gs.Tensor], move: _Move) -> gs.Tensor:
    """x + a w + b z of matrices, or of any linear function of them."""
    return ops("Add", parts[0], ops.combine(move.a, parts[1], move.b, parts[2]))


def _inside(ops: Operators, x: gs.Tensor) -> gs.Tensor:
    return _clipped(ops, x, NEAREST_TO_INTEGER, 1 - NEAREST_TO_INTEGER)


def _clipped(ops: Operators, x: gs.Tensor, low: float, high: float) -> gs.Tensor:
    return ops("Clip", x, ops.constant(f"clip_{low}", low), ops.constant(f"clip_{high}", high))
