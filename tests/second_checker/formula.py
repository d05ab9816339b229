"""What a formula of the second checker is asked, and what it answers: one class an operation, all in intervals.

Sample shapes: ``(C, H, W)`` an image (a token is a pixel), ``(N, d)`` tokens, ``(d,)`` one token. An ``Extent`` bounds
a value: its largest token norm and the norm of all entries. Formulas are written from the mathematics of the bound
(math.md, and each rule's stated derivation), never from the kernel's code, and read neither its rules nor its engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tests.second_checker.exact import ZERO, Interval, exactly, gamma, root_of, smaller, total
from tests.second_checker.norms import Matrix

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Extent:
    """Bounds of a value: the largest token norm, and the norm of all entries."""

    token: Interval
    total: Interval

    def __add__(self, other: Extent) -> Extent:
        return Extent(self.token + other.token, self.total + other.total)


@dataclass(frozen=True)
class Precision:
    """A floating-point forward pass: ``unit`` its roundoff, ``sums`` that of accumulations, ``chunk`` terms at most.

    ``dot(n)`` is the relative error of a sum of n products: gamma_n at the accumulator's roundoff, then one rounding to
    the dtype if that is coarser, with sums split into chunks that are added in float64 if ``chunk`` is not 0.
    """

    unit: Fraction
    sums: Fraction
    chunk: int = 0

    def gamma(self, count: int) -> Interval:
        return gamma(count, self.unit)

    def sum(self, count: int) -> Interval:
        return self._stored(gamma(count, self.sums), self.sums)

    def dot(self, count: int) -> Interval:
        if not 0 < self.chunk < count:
            return self.sum(count)
        double = Fraction(1, 1 << 53)
        outer = gamma((count + self.chunk - 1) // self.chunk + 1, double)
        return self._stored(compounded(gamma(self.chunk, self.sums), outer), double)

    def _stored(self, error: Interval, accumulator: Fraction) -> Interval:
        return error if accumulator == self.unit else compounded(error, exactly(self.unit))


def compounded(first: Interval, second: Interval) -> Interval:
    """(1 + a)(1 + b) - 1: one relative error after another."""
    return first + second + first * second


SINGLE = Precision(Fraction(1, 1 << 24), Fraction(1, 1 << 24))
BRAIN = Precision(Fraction(1, 1 << 8), Fraction(1, 1 << 24))  # bfloat16, accumulated in float32
DOUBLE = Precision(Fraction(1, 1 << 53), Fraction(1, 1 << 53))


@dataclass(frozen=True)
class Asked:
    """One node: attributes (JSON), sample shapes of its inputs, tensors by slot, scalars by slot (a list of intervals;
    ``[x]`` for one of no dimension), how far a float forward's scalars may stray, and the extents of the exact inputs
    (none given: nothing is known of them).
    """

    attrs: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    tensors: Mapping[str, Matrix]
    scalars: Mapping[str, Sequence[Interval]] = field(default_factory=dict)
    strays: Mapping[str, Interval] = field(default_factory=dict)
    sizes: tuple[Extent, ...] = ()

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    def spread(self, slot: str, count: int) -> list[Interval]:
        """A scalar as ``count`` entries."""
        given = list(self.scalars[slot])
        return given * count if len(given) == 1 else given


class Formula:
    """One operation. ``slack`` is how far (relatively) the kernel may lie above, ``why`` explains more than 1e-9."""

    slack: float = 1e-9
    why: str = ""

    def shape(self, a: Asked) -> Shape:
        return a.shape

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        """For each input, a Lipschitz constant in that input alone."""
        raise LookupError("no gains")

    def lipschitz(self, a: Asked, geometry: str, incoming: Sequence[Interval]) -> Interval:
        """The triangle inequality over the inputs."""
        return total(gain * each for gain, each in zip(self.gains(a, geometry), incoming, strict=True))

    def at_zero(self, a: Asked) -> Extent:
        """The value at zero inputs."""
        return Extent(ZERO, ZERO)

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        """|f(x)| <= |f(0)| + L |x|, in both norms."""
        grown = Extent(
            self.lipschitz(a, "token_max", [each.token for each in incoming]),
            self.lipschitz(a, "l2", [each.total for each in incoming]),
        )
        return grown + self.at_zero(a)

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        """The l2 error of this operation alone at computed inputs of the given extents."""
        raise LookupError("no rounding")


class Exact(Formula):
    """An operation that is exact in floating point and 1-Lipschitz in both geometries."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [exactly(1)]

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return ZERO


def tokens_in(shape: Shape) -> int:
    """How many tokens a sample has."""
    return 1 if len(shape) == 1 else shape[0] if len(shape) == 2 else shape[1] * shape[2]


def channels_in(shape: Shape) -> int:
    """How wide a token is."""
    return shape[0] if len(shape) == 3 else shape[-1]


def every_token(shape: Shape, token: Interval) -> Extent:
    """The extent of a value whose tokens all have (at most) this norm."""
    return Extent(token, root_of(tokens_in(shape)) * token)


def sharpened(extent: Extent, shape: Shape) -> Extent:
    """token <= total <= sqrt(N) token."""
    return Extent(smaller(extent.token, extent.total), smaller(extent.total, root_of(tokens_in(shape)) * extent.token))
