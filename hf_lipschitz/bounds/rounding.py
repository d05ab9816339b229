"""Outward-rounded arithmetic: floats rounded up or down, and elementwise enclosures of real numbers.

IEEE 754 rounds ``+ - * / sqrt`` correctly, so the neighbour of one rounded result, in the direction wanted, encloses
the exact one; this holds for one operation, never for a whole sum, which is why sums here round at every term. ``exp``
and ``log`` of a C library carry no such guarantee: they are taken from :mod:`decimal`, whose results are correctly
rounded to the context's 40 digits (General Decimal Arithmetic Specification, 1.70), and enclosed outward from there.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import KernelError

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
U = UNIT_ROUNDOFF["float64"]
Array = np.ndarray
_DIGITS = decimal.Context(prec=40, Emin=-99999, Emax=99999, rounding=decimal.ROUND_HALF_EVEN)


def up(value: float) -> float:
    """The next float above ``value``."""
    return math.nextafter(value, math.inf)


def down(value: float) -> float:
    """The next float below ``value``."""
    return math.nextafter(value, -math.inf)


def add_up(*terms: float) -> float:
    """An upper bound of the sum of non-negative terms, rounded up at every addition (0 for no terms)."""
    total = 0.0
    for term in terms:
        total = term if total == 0.0 else total if term == 0.0 else up(total + term)
    return total


def mul_up(*factors: float) -> float:
    """An upper bound of the product of non-negative factors; 0 times infinity is 0 (a zero bound is exact)."""
    product = 1.0
    for factor in factors:
        if factor == 0.0 or product == 0.0:
            return 0.0
        product = factor if product == 1.0 else product if factor == 1.0 else up(product * factor)
    return product


def div_up(numerator: float, denominator: float) -> float:
    """An upper bound of a quotient of a non-negative by a positive float."""
    if denominator <= 0.0:
        raise KernelError(f"cannot bound a quotient by {denominator!r}: the denominator must be positive")
    if denominator == 1.0 or numerator == 0.0:
        return numerator
    return up(numerator / denominator)


def sqrt_up(value: float) -> float:
    """An upper bound of a square root; exact for perfect squares of integers below 2**26."""
    root = math.sqrt(value)
    return root if root < 2.0**26 and root == int(root) and root * root == value else up(root)


def norm_up(*terms: float) -> float:
    """An upper bound of the Euclidean norm of non-negative terms."""
    return sqrt_up(add_up(*(mul_up(term, term) for term in terms))) if len(terms) != 1 else terms[0]


def gamma(count: int, roundoff: float = U) -> float:
    """gamma_n = n u / (1 - n u), rounded up; infinite where n u >= 1, so that a bound that needs it becomes void.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.
    """
    product = up(count * roundoff)
    return math.inf if product >= 1.0 else div_up(product, down(1.0 - product))


@dataclass(frozen=True)
class Arithmetic:
    """How a forward pass computes.

    Attributes:
        roundoff: unit roundoff of its dtype, at which every stored result is rounded.
        sums: unit roundoff at which plain sums (norms, averages) are accumulated, in any order.
        products: the same for the sums in matrix products.
        chunk: 0, or the longest sum of products that is left to a library; the sums of such chunks are then added in
            float64 and rounded once.
    """

    roundoff: float
    sums: float
    products: float
    chunk: int = 0

    def total(self, count: int) -> float:
        """Relative to the sum of absolute values: the error of a sum of ``count`` terms, stored in the dtype."""
        return self._stored(gamma(count, self.sums), self.sums)

    def dot(self, count: int) -> float:
        """The same for a sum of ``count`` products in a matrix product."""
        if not 0 < self.chunk < count:
            return self._stored(gamma(count, self.products), self.products)
        inner, outer = gamma(self.chunk, self.products), gamma(-(-count // self.chunk) + 1)
        return self._stored(add_up(inner, outer, mul_up(inner, outer)), U)

    def _stored(self, error: float, accumulated: float) -> float:
        return error if accumulated == self.roundoff else add_up(error, mul_up(self.roundoff, up(1.0 + error)))


# bfloat16 products are accumulated in float32, by every library that the claim for bfloat16 is made for
ARITHMETIC = {name: Arithmetic(u, min(u, 2.0**-24), min(u, 2.0**-24)) for name, u in UNIT_ROUNDOFF.items()}


def largest(roundoff: float) -> float:
    """What values of a forward pass in the dtype of this unit roundoff may reach: sums of their squares stay finite."""
    return 2.0**500 if roundoff == U else 2.0**60


@np.errstate(over="ignore")  # what overflows becomes an infinite bound
def array_norm_up(values: Array) -> float:
    """An upper bound of the Euclidean norm of all entries of a finite float array.

    The computed sum of n squares has relative error at most gamma_n; 1 + 2 gamma_{n+2} covers it, the square root and
    the product. Entries are scaled by a power of two first, so that no square over- or underflows unnoticed.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    largest = float(np.max(np.abs(flat), initial=0.0))
    if largest == 0.0:
        return 0.0
    exponent = math.frexp(largest)[1]
    scaled = np.ldexp(flat, -exponent)  # entries below 2**-1074 of the scale are lost: covered by the added term
    root = math.sqrt(float(scaled @ scaled)) * (1.0 + 2.0 * gamma(flat.size + 2))
    return up(float(np.ldexp(up(root + flat.size * 2.0**-500), exponent)))


def log10_of(value: float) -> float:
    """The decimal logarithm printed beside a bound (a display value, not a bound)."""
    return math.log10(value) if 0.0 < value < math.inf else (-math.inf if value == 0.0 else math.inf)


@dataclass(frozen=True)
class Enclosure:
    """Elementwise intervals [low, high] that contain real numbers: float64 arrays of one shape."""

    low: Array
    high: Array

    @staticmethod
    def exactly(value: object) -> Enclosure:
        """The enclosure of stored numbers (any float dtype that float64 holds exactly)."""
        array = np.asarray(value, dtype=np.float64)
        if not np.all(np.isfinite(array)):
            raise KernelError("a scalar expression reads a value that is not finite")
        return Enclosure(array, array)

    def __add__(self, other: Enclosure) -> Enclosure:
        return _outward(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Enclosure) -> Enclosure:
        return _outward(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Enclosure) -> Enclosure:
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return _outward(np.minimum.reduce(corners), np.maximum.reduce(corners))

    def __truediv__(self, other: Enclosure) -> Enclosure:
        if np.any((other.low <= 0.0) & (other.high >= 0.0)):
            raise KernelError("a scalar expression divides by an interval that contains zero")
        corners = [a / b for a in (self.low, self.high) for b in (other.low, other.high)]
        return _outward(np.minimum.reduce(corners), np.maximum.reduce(corners))

    def sqrt(self) -> Enclosure:
        """Square root; refuses intervals that reach below zero."""
        if np.any(self.low < 0.0):
            raise KernelError("a scalar expression takes the square root of a negative number")
        return Enclosure(
            np.maximum(np.nextafter(np.sqrt(self.low), -1.0), 0.0), np.nextafter(np.sqrt(self.high), np.inf)
        )

    def exp(self) -> Enclosure:
        """Exponential."""
        return self._monotone(lambda x: x.exp(_DIGITS), lambda x: (0.0, math.inf) if x > 0 else (0.0, 1e-304), 0.0)

    def softplus(self) -> Enclosure:
        """log(1 + exp(x)); beyond 700 it exceeds max(x, 0) by less than exp(-700) < 1e-304."""
        return self._monotone(_decimal_softplus, lambda x: (x, up(x)) if x > 0 else (0.0, 1e-304), 0.0)

    def sigmoid(self) -> Enclosure:
        """1 / (1 + exp(-x))."""
        return self._monotone(_decimal_sigmoid, lambda x: (down(1.0), 1.0) if x > 0 else (0.0, 1e-304), 0.0, 1.0)

    def maximum(self) -> Enclosure:
        """The largest entry, as a scalar."""
        return Enclosure(np.max(self.low), np.max(self.high))

    def widened(self, relative: float) -> Enclosure:
        """Every number within the given relative distance of a member (the rounding of one floating-point result)."""
        if relative == 0.0:
            return self
        reach = np.nextafter(np.maximum(np.abs(self.low), np.abs(self.high)) * relative, math.inf)
        return _outward(self.low - reach, self.high + reach)

    def middle(self) -> Array:
        """A float64 inside the enclosure, for execution."""
        return self.low + 0.5 * (self.high - self.low)

    def _monotone(
        self,
        function: Callable[[decimal.Decimal], decimal.Decimal],
        far: Callable[[float], tuple[float, float]],
        least: float,
        most: float = math.inf,
    ) -> Enclosure:
        """Enclose an increasing function: ``function`` in 40 digits for |x| <= 700, the pair ``far(x)`` beyond."""

        def ends(value: float) -> tuple[float, float]:
            if math.isnan(value):
                return value, value
            if abs(value) > 700.0:
                return far(value)
            near = float(function(decimal.Decimal(value)))
            return max(down(near), least), min(up(near), most)

        low = np.array([ends(float(v))[0] for v in np.ravel(self.low)]).reshape(np.shape(self.low))
        high = np.array([ends(float(v))[1] for v in np.ravel(self.high)]).reshape(np.shape(self.high))
        return Enclosure(low, high)


def _outward(low: Array, high: Array) -> Enclosure:
    return Enclosure(np.nextafter(low, -math.inf), np.nextafter(high, math.inf))


def _decimal_softplus(x: decimal.Decimal) -> decimal.Decimal:
    """log(1 + e^x): below -30, e^x - e^2x/2 is within a relative e^2x/3 < 1e-26 of it."""
    power = x.exp(_DIGITS)
    if x < -30:
        return _DIGITS.multiply(power, _DIGITS.add(1, _DIGITS.multiply(power, decimal.Decimal("-0.5"))))
    return _DIGITS.add(power, 1).ln(_DIGITS)


def _decimal_sigmoid(x: decimal.Decimal) -> decimal.Decimal:
    return _DIGITS.divide(1, _DIGITS.add(1, _DIGITS.minus(x).exp(_DIGITS)))
