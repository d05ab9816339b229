"""Formulas of activations: sorts and reflections, and pointwise functions with their largest slope."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tests.second_checker import slopes
from tests.second_checker.elementary import log
from tests.second_checker.exact import INFINITE, ONE, ZERO, Interval, exactly, larger, root_of, smaller
from tests.second_checker.formula import Asked, Exact, Extent, Formula, Precision, channels_in, every_token
from tests.second_checker.norms import frobenius

Of = Callable[[Any], Interval]  # of the attributes


def everywhere(a: Asked, value: Interval) -> Extent:
    """The extent of a sample whose entries are all ``value``."""
    return Extent(root_of(channels_in(a.shape)) * value, root_of(math.prod(a.shape)) * value)


def least(first: Extent, second: Extent) -> Extent:
    """The smaller bound of each."""
    return Extent(smaller(first.token, second.token), smaller(first.total, second.total))


def _always(value: Fraction | int) -> Of:
    return lambda attrs: exactly(value)


@dataclass(frozen=True)
class Pointwise(Formula):
    """phi entry by entry: largest slope, |phi(0)|, largest |phi|, and rounding units (of u times the size)."""

    slope: Of = lambda attrs: ONE
    zero: Of = lambda attrs: ZERO
    most: Of = lambda attrs: INFINITE
    units: Fraction = Fraction(8)

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [self.slope(a.attrs)]

    def at_zero(self, a: Asked) -> Extent:
        return everywhere(a, self.zero(a.attrs))

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        return least(super().extent(a, incoming), everywhere(a, self.most(a.attrs)))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(self.units * p.unit) * self.extent(a, incoming).total


class LeakyReLU(Pointwise):
    """Only negative entries are rounded: a constant and a product."""

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(Fraction(5, 2) * p.unit * abs(Fraction(a.attrs["slope"]))) * incoming[0].total


class Softplus(Pointwise):
    """log(1 + e^(beta x)) / beta; a forward may jump to x beyond its threshold: at most log(1 + e^-20) / beta."""

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        jump = exactly(Fraction(2.1e-9) / Fraction(a.attrs["beta"]))
        return super().rounding(a, p, incoming) + everywhere(a, jump).total


class HardTanh(Pointwise):
    """Only the ends are rounded, and only if they have more than the 8 bits of the coarsest dtype."""

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        ends = [abs(Fraction(a.attrs[key])) for key in ("low", "high")]
        long = [end for end in ends if (end.numerator // (end.numerator & -end.numerator or 1)).bit_length() > 8]
        return everywhere(a, exactly(max(long, default=Fraction(0)) * p.unit)).total


class Householder(Exact):
    """A reflection of pairs, or nothing; 64 u for sines and cosines."""

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(64 * p.unit) * incoming[0].total


class NActivation(Formula):
    """x - 2 clip(x, s, t): slopes 1 and -1; at zero, twice the number of [s, t] closest to zero."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [ONE]

    def at_zero(self, a: Asked) -> Extent:
        pairs = zip(a.tensors["first"], a.tensors["second"], strict=True)
        closest = [2 * max(min(pair), min(max(pair), Fraction(0))) for pair in pairs]
        return every_token(a.shape, frobenius(np.array(closest, dtype=object)))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(p.unit) * self.extent(a, incoming).total


class PReLU(Formula):
    """Slopes 1 and w, one product."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [exactly(max(1, *(abs(slope) for slope in a.tensors["weight"])))]

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(p.unit) * self.gains(a, "l2")[0] * incoming[0].total


def _steeper(key: str) -> Of:
    return lambda attrs: larger(ONE, exactly(abs(Fraction(attrs[key]))))


def _log_two(attrs: Any) -> Interval:
    return log(exactly(2))


def _gelu(attrs: Any) -> Interval:
    return slopes.gelu_erf_slope() if attrs["approximate"] == "none" else slopes.steepest(slopes.gelu_tanh)


# The scale and alpha of SELU are published decimals; its slope at 0 from the left is their product.
_SELU = Fraction("1.0507009873554804934193349852946") * Fraction("1.6732632423543772848170429916717")
_ENDS = ("low", "high")

FORMULAS: dict[str, Formula] = {
    "maxmin@1": Exact(),
    "group_sort@1": Exact(),
    "abs@1": Exact(),
    "householder@1": Householder(),
    "n_activation@1": NActivation(),
    "prelu@1": PReLU(),
    "relu@1": Pointwise(units=Fraction(0)),
    "leaky_relu@1": LeakyReLU(_steeper("slope")),
    "hardtanh@1": HardTanh(
        zero=lambda attrs: exactly(abs(max(Fraction(attrs["low"]), min(Fraction(attrs["high"]), Fraction(0))))),
        most=lambda attrs: exactly(max(abs(Fraction(attrs[key])) for key in _ENDS)),
    ),
    "hardsigmoid@1": Pointwise(_always(Fraction(1, 6)), _always(Fraction(1, 2)), _always(1), units=Fraction(4)),
    "hardswish@1": Pointwise(_always(Fraction(3, 2))),
    "softshrink@1": Pointwise(units=Fraction(2)),
    "elu@1": Pointwise(_steeper("alpha")),
    "celu@1": Pointwise(),
    "selu@1": Pointwise(_always(_SELU)),
    "tanh@1": Pointwise(most=_always(1)),
    "tanhshrink@1": Pointwise(),
    "sigmoid@1": Pointwise(_always(Fraction(1, 4)), _always(Fraction(1, 2)), _always(1)),
    "logsigmoid@1": Pointwise(zero=_log_two),
    "softplus@1": Softplus(zero=lambda attrs: log(exactly(2)) / exactly(Fraction(attrs["beta"]))),
    "softsign@1": Pointwise(most=_always(1), units=Fraction(4)),
    "gelu@1": Pointwise(_gelu),
    "silu@1": Pointwise(lambda attrs: slopes.steepest(slopes.silu)),
    "mish@1": Pointwise(lambda attrs: slopes.steepest(slopes.mish)),
}
