"""Real numbers between two fractions: the only arithmetic of the second checker.

An ``Interval`` holds a real number between two rationals. Every operation returns an interval that contains the exact
result; ends are shortened outward to ``_BITS`` significant bits so that fractions do not grow without end. No float
takes part. Elementary functions are Taylor series with the remainder added (see ``elementary.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

_BITS = 160  # significant bits that an end keeps: far more than any slack that is asked for


def _shift(value: Fraction) -> int:
    """The power of two that gives ``value`` an integer part of about _BITS bits."""
    return _BITS - value.numerator.bit_length() + value.denominator.bit_length()


def _scaled(value: Fraction, shift: int) -> Fraction:
    return value * (1 << shift) if shift >= 0 else value / (1 << -shift)


def shortened_down(value: Fraction) -> Fraction:
    """The largest number of _BITS bits that is at most ``value`` (or ``value`` itself where it is short)."""
    if value.denominator.bit_length() + value.numerator.bit_length() <= _BITS:
        return value
    shift = _shift(value)
    return _scaled(Fraction(math.floor(_scaled(value, shift))), -shift)


@dataclass(frozen=True)
class Interval:
    """A real number in [low, high]; ``infinite`` marks a bound that is void (plus infinity)."""

    low: Fraction
    high: Fraction
    infinite: bool = False

    def __add__(self, other: Interval) -> Interval:
        if self.infinite or other.infinite:
            return INFINITE
        return _rounded(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return _rounded(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        if self.infinite or other.infinite:
            return ZERO if ZERO in (self, other) else INFINITE  # a zero bound is exact, whatever it multiplies
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return _rounded(min(corners), max(corners))

    def __truediv__(self, other: Interval) -> Interval:
        if other.low <= 0 <= other.high:
            raise ZeroDivisionError("an interval that contains zero divides nothing")
        if self.infinite:
            return INFINITE
        return self * Interval(1 / other.high, 1 / other.low)

    def __abs__(self) -> Interval:
        if self.infinite:
            return INFINITE
        ends = sorted((abs(self.low), abs(self.high)))
        return Interval(Fraction(0) if self.low < 0 < self.high else ends[0], ends[1])

    def square(self) -> Interval:
        """The square: tighter than a product, which does not know that both factors are one number."""
        size = abs(self)
        return size * size

    def sqrt(self) -> Interval:
        """The square root of a number that is not negative (a low end below zero is an enclosure's width)."""
        if self.infinite:
            return INFINITE
        return Interval(_root(max(self.low, Fraction(0)), up=False), _root(self.high, up=True))

    def middle(self) -> Fraction:
        """The rational halfway."""
        return (self.low + self.high) / 2


def _rounded(low: Fraction, high: Fraction) -> Interval:
    return Interval(shortened_down(low), -shortened_down(-high))


def _root(value: Fraction, up: bool) -> Fraction:
    """A rational within 2**-_BITS (relatively) of the square root, on the side asked for; exact for exact squares."""
    if value == 0:
        return value
    shift = _shift(value) + _BITS
    shift += shift % 2
    scaled = _scaled(value, shift)
    whole = scaled.numerator // scaled.denominator
    root = math.isqrt(whole)
    exact = root * root == whole and scaled.denominator == 1
    return _scaled(Fraction(root + (1 if up and not exact else 0)), -(shift // 2))


ZERO = Interval(Fraction(0), Fraction(0))
ONE = Interval(Fraction(1), Fraction(1))
INFINITE = Interval(Fraction(0), Fraction(0), infinite=True)


def exactly(value: int | float | Fraction) -> Interval:
    """The interval of one number; floats are the rationals that they are."""
    if isinstance(value, float) and math.isinf(value):
        return INFINITE
    fraction = Fraction(value)
    return Interval(fraction, fraction)


def total(terms: Iterable[Interval]) -> Interval:
    """The sum (zero for no terms)."""
    result = ZERO
    for term in terms:
        result = result + term
    return result


def euclidean(terms: Iterable[Interval]) -> Interval:
    """The Euclidean norm."""
    return total(term.square() for term in terms).sqrt()


def larger(*terms: Interval) -> Interval:
    """The maximum."""
    if any(term.infinite for term in terms):
        return INFINITE
    return Interval(max(term.low for term in terms), max(term.high for term in terms))


def smaller(*terms: Interval) -> Interval:
    """The minimum."""
    finite = [term for term in terms if not term.infinite]
    return Interval(min(t.low for t in finite), min(t.high for t in finite)) if finite else INFINITE


def root_of(count: int) -> Interval:
    """The square root of a whole number."""
    return exactly(count).sqrt()


def gamma(count: int, roundoff: Fraction) -> Interval:
    """n u / (1 - n u): the relative error of n roundings, void from n u = 1 on."""
    product = count * roundoff
    return INFINITE if product >= 1 else exactly(product / (1 - product))
