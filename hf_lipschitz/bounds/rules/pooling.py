"""Pooling over tokens: (N, d) -> (d,)."""

from __future__ import annotations

import numpy as np

from ..rounding import Array, add_up, gamma, mul_up, sqrt_up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of
from .attributes import need, number


class _Pool(Rule):
    """A pool that is 1-Lipschitz from all tokens together; N tokens that each move by one move sqrt(N) together."""

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 2, f"pooling takes tokens, got sample shape {call.shapes[0]}")
        return (call.shapes[0][1],)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0 if geometry == "l2" else sqrt_up(float(tokens_of(call.shapes[0]))),)


class L2Pool(_Pool):
    """y_c = sqrt(sum_n x_nc^2 + eps): the norm of the vector (x_1c, ..., x_Nc, sqrt(eps)), so 1-Lipschitz channel by
    channel.
    """

    op = "l2_pool@1"
    source = "reverse triangle inequality, channel by channel"
    attrs = {"eps": number(1e-12, 1.0)}

    def apply(self, call: Call, *values: Array) -> Array:
        return np.sqrt(np.sum(values[0] * values[0], axis=1) + call.attrs["eps"])

    def offset(self, call: Call) -> Size:
        size = sqrt_up(mul_up(float(call.shapes[0][1]), call.attrs["eps"]))
        return Size(size, size)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # N squares, N additions, eps rounded, a root: relative error below gamma_{N+4} of the exact pool of the
        # computed input; a square that underflows moves a root of at least sqrt(eps) by far less than the engine's
        # underflow term
        return mul_up(
            gamma(tokens_of(call.shapes[0]) + 4, roundoff), add_up(incoming[0].total, self.offset(call).total)
        )


class SumPool(_Pool):
    """y_c = sum_n x_nc / sqrt(N): the product with a unit vector."""

    op = "sum_pool@1"
    source = "Cauchy-Schwarz: |sum_n x_n| <= sqrt(N) |X|_F"

    def apply(self, call: Call, *values: Array) -> Array:
        return np.sum(values[0], axis=1) / np.sqrt(float(values[0].shape[1]))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # N - 1 additions, sqrt(N) rounded, a division: gamma_{N+2} sum_n |x_nc| / sqrt(N) <= gamma_{N+2} |x_c|
        return mul_up(gamma(tokens_of(call.shapes[0]) + 2, roundoff), incoming[0].total)


RULES: tuple[Rule, ...] = (L2Pool(), SumPool())
