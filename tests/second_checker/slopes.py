"""The largest slope of a smooth function of one variable, between rationals: Taylor arithmetic and branch and bound.

A ``Jet`` is a function's value and first three derivatives in interval arithmetic, at a point or over a whole box. On a
box of centre c and half width h, ``phi'(x) <= phi'(c) + |phi''(c)| h + sup |phi'''| h^2 / 2``; boxes that cannot hold
the maximum are dropped, the others halved, until what is left is known to ``_WIDTH``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from tests.second_checker import elementary
from tests.second_checker.exact import ONE, ZERO, Interval, exactly

_WIDTH = Fraction(1, 10**12)
_REACH = 64  # beyond it, the slopes asked about are within 1e-20 of 0 or 1: they are sums of 0 or 1 and x^3 e^-|x|


@dataclass(frozen=True)
class Jet:
    """Value and derivatives of order 1 to 3."""

    values: tuple[Interval, Interval, Interval, Interval]

    def __add__(self, other: Jet) -> Jet:
        return Jet(tuple(a + b for a, b in zip(self.values, other.values, strict=True)))  # type: ignore[arg-type]

    def __mul__(self, other: Jet) -> Jet:
        (a, a1, a2, a3), (b, b1, b2, b3) = self.values, other.values
        two, three = exactly(2), exactly(3)
        second = a2 * b + two * a1 * b1 + a * b2
        third = a3 * b + three * a2 * b1 + three * a1 * b2 + a * b3
        return Jet((a * b, a1 * b + a * b1, second, third))

    def through(self, outer: tuple[Interval, Interval, Interval, Interval]) -> Jet:
        """g(self), from g and its derivatives at self's value (Faa di Bruno)."""
        (g, g1, g2, g3), (_, u1, u2, u3) = outer, self.values
        third = g3 * u1 * u1.square() + exactly(3) * g2 * u1 * u2 + g1 * u3
        return Jet((g, g1 * u1, g2 * u1.square() + g1 * u2, third))


def constant(value: Interval) -> Jet:
    """A function that does not move."""
    return Jet((value, ZERO, ZERO, ZERO))


def sigmoid(x: Jet) -> Jet:
    """s' = s (1 - s), s'' = s' (1 - 2 s), s''' = s' (1 - 6 s')."""
    s = elementary.sigmoid(x.values[0])
    slope = s * (ONE - s)
    return x.through((s, slope, slope * (ONE - exactly(2) * s), slope * (ONE - exactly(6) * slope)))


def softplus(x: Jet) -> Jet:
    """Its derivative is the sigmoid."""
    s, s1, s2, _ = sigmoid(Jet((x.values[0], ONE, ZERO, ZERO))).values
    return x.through((elementary.softplus(x.values[0]), s, s1, s2))


def tanh(x: Jet) -> Jet:
    """t' = 1 - t^2, t'' = -2 t t', t''' = t' (6 t^2 - 2)."""
    t = elementary.tanh(x.values[0])
    slope = ONE - t.square()
    return x.through((t, slope, exactly(-2) * t * slope, slope * (exactly(6) * t.square() - exactly(2))))


def silu(x: Jet) -> Jet:
    """z sigmoid(z)."""
    return x * sigmoid(x)


def mish(x: Jet) -> Jet:
    """z tanh(softplus z)."""
    return x * tanh(softplus(x))


def gelu_tanh(x: Jet) -> Jet:
    """z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2."""
    scale = (exactly(2) / elementary.pi()).sqrt()
    inner = constant(scale) * (x + constant(exactly(Fraction(44715, 10**6))) * x * x * x)
    return constant(exactly(Fraction(1, 2))) * x * (constant(ONE) + tanh(inner))


def gelu_erf_slope() -> Interval:
    """phi' = Phi + x N(x), phi'' = N(x) (2 - x^2): largest at sqrt 2, (1 + erf 1) / 2 + e^-1 / sqrt(pi)."""
    half = (ONE + elementary.erf(ONE)) / exactly(2)
    return half + elementary.exp(exactly(-1)) / elementary.pi().sqrt()


@functools.cache
def steepest(function: Callable[[Jet], Jet]) -> Interval:
    """sup |phi'| over the real line (where the slope far out is less than the maximum, see _REACH)."""
    edges = [Fraction(edge) for edge in (-_REACH, -16, -8, *range(-4, 5), 8, 16, _REACH)]
    boxes = list(itertools.pairwise(edges))
    while True:
        judged = [(box, *_slope_on(function, *box)) for box in boxes]
        best = max(low for _, low, _ in judged)
        judged = [each for each in judged if each[2] >= best]
        worst = max(high for _, _, high in judged)
        if worst - best <= _WIDTH:
            return Interval(best, worst)
        boxes = [half for (a, b), _, _ in judged for half in ((a, (a + b) / 2), ((a + b) / 2, b))]


def _slope_on(function: Callable[[Jet], Jet], a: Fraction, b: Fraction) -> tuple[Fraction, Fraction]:
    """|phi'| at the centre of a box from below, and an upper bound over the whole box."""
    centre, half = (a + b) / 2, exactly((b - a) / 2)
    at = function(Jet((exactly(centre), ONE, ZERO, ZERO))).values
    over = function(Jet((Interval(a, b), ONE, ZERO, ZERO))).values
    second_order = abs(at[1]) + abs(at[2]) * half + abs(over[3]) * half.square() / exactly(2)
    return abs(at[1]).low, min(second_order.high, abs(over[1]).high)
