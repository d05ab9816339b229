"""exp, log, softplus, sigmoid, tanh, erf and pi between rationals: series with their remainders.

Derivations. Let ``T`` be a partial sum and ``t`` the first omitted term.

- ``exp`` at ``0 <= y <= 1/2``: terms ``y^n/n!`` shrink by at least 2, so the remainder lies in [0, 2 t]. Elsewhere
  ``exp(x) = exp(x / 2^m)^(2^m)``, and ``exp(-x) = 1 / exp(x)``.
- ``log(z) = 2 artanh((z-1)/(z+1))`` for ``z`` in [2/3, 4/3], artanh by its series in ``s``, whose terms shrink by
  ``s^2 <= 1/25``: remainder in [0, 2 t]. ``log 2 = 2 artanh(1/3)``.
- ``pi = 16 arctan(1/5) - 4 arctan(1/239)`` (Machin), alternating series.
- ``erf(x) = 2/sqrt(pi) exp(-x^2) sum_n 2^n x^(2n+1) / (1 3 ... (2n+1))`` for ``x >= 0``; from ``n >= 2 x^2`` on, terms
  shrink by at least 2: remainder in [0, 2 t].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

from tests.second_checker.exact import ONE, ZERO, Interval, exactly, shortened_down

_LEAST = Fraction(
    1, 1 << 150
)  # series stop where their terms are below this part of the first (or of a sum of order one)


def _monotone(function: Callable[[Fraction], Interval], x: Interval) -> Interval:
    """An increasing function of an interval, from its values at the ends."""
    return Interval(function(x.low).low, function(x.high).high)


def _series(first: Interval, ratio: Callable[[int], Interval], settled: int = 0) -> Interval:
    """The sum of terms of one sign with ``term[n+1] = ratio(n) term[n]``, ratios at most 1/2 from ``settled`` on."""
    sum_, term, n = ZERO, first, 0
    while n < settled or term.high > first.high * _LEAST:
        sum_, term, n = sum_ + term, term * ratio(n), n + 1
    return sum_ + Interval(Fraction(0), 2 * term.high)


@functools.lru_cache(maxsize=4096)
def _exp_at(x: Fraction) -> Interval:
    if x < 0:
        return ONE / _exp_at(-x)
    halvings = max(0, (x * 2).__ceil__().bit_length())
    y = exactly(x / (1 << halvings))
    result = _series(ONE, lambda n: y * exactly(Fraction(1, n + 1)))
    for _ in range(halvings):
        result = result * result
    return result


def exp(x: Interval) -> Interval:
    """e^x."""
    return _monotone(_exp_at, x)


def _artanh(s: Interval) -> Interval:
    square = s * s
    return _series(s, lambda n: square * exactly(Fraction(2 * n + 1, 2 * n + 3)))


@functools.cache
def _log_two() -> Interval:
    return exactly(2) * _artanh(exactly(Fraction(1, 3)))


@functools.lru_cache(maxsize=4096)
def _log_at(x: Fraction) -> Interval:
    if x < 1:
        return ZERO - _log_at(1 / x)
    power = x.numerator.bit_length() - x.denominator.bit_length()
    z = x / (1 << power) if power >= 0 else x * (1 << -power)
    while z > Fraction(4, 3):
        z, power = z / 2, power + 1
    while z < Fraction(2, 3):
        z, power = z * 2, power - 1
    s = exactly((z - 1) / (z + 1))
    series = _artanh(s) if z >= 1 else ZERO - _artanh(ZERO - s)
    return exactly(power) * _log_two() + exactly(2) * series


def log(x: Interval) -> Interval:
    """The natural logarithm of a positive number."""
    return _monotone(_log_at, x)


def softplus(x: Interval) -> Interval:
    """log(1 + e^x) = 2 artanh(y / (2 + y)) with y = e^x, y <= 1; for x > 0 it is x more at -x."""
    return _monotone(lambda at: _log_above_one(at) if at <= 0 else exactly(at) + _log_above_one(-at), x)


def _log_above_one(x: Fraction) -> Interval:
    y = _exp_at(x)
    return exactly(2) * _artanh(y / (exactly(2) + y))


def sigmoid(x: Interval) -> Interval:
    """1 / (1 + e^-x)."""
    return _monotone(lambda at: ONE / (ONE + _exp_at(-at)), x)


def tanh(x: Interval) -> Interval:
    """2 sigmoid(2 x) - 1."""
    return exactly(2) * sigmoid(exactly(2) * x) - ONE


@functools.cache
def pi() -> Interval:
    """The circle's number."""

    def arctan_of_inverse(q: int) -> Interval:
        sum_, n = Fraction(0), 0
        while Fraction(1, (2 * n + 1) * q ** (2 * n + 1)) > _LEAST:
            sum_ += Fraction((-1) ** n, (2 * n + 1) * q ** (2 * n + 1))
            n += 1
        return Interval(shortened_down(sum_ - _LEAST), -shortened_down(-sum_ - _LEAST))

    return exactly(16) * arctan_of_inverse(5) - exactly(4) * arctan_of_inverse(239)


@functools.lru_cache(maxsize=4096)
def _erf_at(x: Fraction) -> Interval:
    if x < 0:
        return ZERO - _erf_at(-x)
    if x == 0:
        return ZERO
    double_square = 2 * x * x
    ratio = exactly(double_square)
    sum_ = _series(exactly(x), lambda n: ratio * exactly(Fraction(1, 2 * n + 3)), settled=double_square.__ceil__() + 1)
    return exactly(2) / pi().sqrt() * exp(exactly(-x * x)) * sum_


def erf(x: Interval) -> Interval:
    """The error function."""
    return _monotone(_erf_at, x)


def cosine_sine(angle: Fraction) -> tuple[Interval, Interval]:
    """cos and sin of a rational angle: alternating series after halving, then doubling formulas."""
    halvings = max(0, (abs(angle) * 2).__ceil__().bit_length())
    y = angle / (1 << halvings)
    cos, sin, term, n = ZERO, ZERO, ONE, 0
    while abs(term).high > _LEAST:
        signed = term if n % 4 < 2 else ZERO - term
        cos, sin = (cos + signed, sin) if n % 2 == 0 else (cos, sin + signed)
        term, n = term * exactly(y / (n + 1)), n + 1
    width = Interval(-_LEAST, _LEAST)
    cos, sin = cos + width, sin + width
    for _ in range(halvings):
        cos, sin = cos.square() - sin.square(), exactly(2) * sin * cos
    return cos, sin
