"""Spectral norms between rationals: lambda_max(A A^T) < mu if and only if mu I - A A^T has only positive pivots.

The matrix of a bound is scaled to integers, so the test (Sylvester's criterion by fraction-free elimination, the LDL^T
of mu I - A A^T in integers) is exact, and bisection encloses sigma_max^2 as closely as wanted. Nothing is estimated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.second_checker.exact import ZERO, Interval, exactly

Matrix = np.ndarray  # of Fractions (dtype object)
_STEPS = 52  # relative width of an enclosure of sigma^2: at most k 2**-_STEPS


def fractions_of(values: object) -> Matrix:
    """A float array (any shape) as an array of the same numbers, exactly."""
    array = np.asarray(values)
    flat = [Fraction(float(value)) for value in array.ravel()]
    result = np.empty(len(flat), dtype=object)
    result[:] = flat
    return result.reshape(array.shape)


def _positive_pivots(matrix: list[list[int]]) -> bool:
    """Whether a symmetric integer matrix is positive definite (Bareiss: pivots are the leading minors)."""
    a, previous, k = [row[:] for row in matrix], 1, len(matrix)
    for step in range(k):
        pivot = a[step][step]
        if pivot <= 0:
            return False
        for i in range(step + 1, k):
            for j in range(step + 1, i + 1):
                a[i][j] = a[j][i] = (a[i][j] * pivot - a[i][step] * a[step][j]) // previous
        previous = pivot
    return True


def spectral_norm(matrix: Matrix) -> Interval:
    """sigma_max of an array (m, n) of Fractions."""
    denominator = math.lcm(*(entry.denominator for entry in matrix.ravel()))
    rows = tuple(tuple(int(entry * denominator) for entry in row) for row in matrix)
    shared = math.gcd(*(entry for row in rows for entry in row))
    if shared == 0:
        return ZERO
    rows = tuple(tuple(entry // shared for entry in row) for row in rows)
    rows = rows if len(rows) <= len(rows[0]) else tuple(zip(*rows, strict=True))
    return _integer_norm(rows) * exactly(Fraction(shared, denominator))


@functools.lru_cache(maxsize=4096)
def _integer_norm(rows: Sequence[Sequence[int]]) -> Interval:
    gram = [[sum(a * b for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]
    trace = sum(gram[i][i] for i in range(len(gram)))
    unit = 1 << max(0, 64 - trace.bit_length())
    gram = [[entry * unit for entry in row] for row in gram]
    low, high = max(row[i] for i, row in enumerate(gram)), trace * unit + 1  # lambda_max lies in [low, high)
    width = max(1, high >> _STEPS)
    while high - low > width:
        middle = (low + high) // 2
        shifted = [[(middle if i == j else 0) - gram[i][j] for j in range(len(gram))] for i in range(len(gram))]
        low, high = (low, middle) if _positive_pivots(shifted) else (middle, high)
    return Interval(Fraction(low, unit), Fraction(high, unit)).sqrt()


def scaled_rows_norm(scales: Sequence[Interval], matrix: Matrix) -> Interval:
    """sigma_max of diag(scales) A for scales that are not negative: monotone in each of them.

    (``|D A x| <= |D' A x|`` for every x if D <= D'.)
    """

    def with_ends(ends: Sequence[Fraction]) -> Matrix:
        return np.array([[end * entry for entry in row] for end, row in zip(ends, matrix, strict=True)], dtype=object)

    low = spectral_norm(with_ends([_short(max(s.low, Fraction(0)), up=False) for s in scales]))
    return Interval(low.low, spectral_norm(with_ends([_short(s.high, up=True) for s in scales])).high)


def _short(value: Fraction, up: bool) -> Fraction:
    """Ends of a scale with 64 bits: the integers of the elimination stay small."""
    if value == 0:
        return value
    shift = 64 - value.numerator.bit_length() + value.denominator.bit_length()
    power = Fraction(1 << shift) if shift >= 0 else Fraction(1, 1 << -shift)
    return (math.ceil(value * power) if up else math.floor(value * power)) / power


def complex_norm(real: Matrix, imaginary: Matrix) -> Interval:
    """sigma_max of X + iY, which is that of the real matrix [[X, -Y], [Y, X]]."""
    return spectral_norm(np.block([[real, -imaginary], [imaginary, real]]))


def frobenius(values: Matrix) -> Interval:
    """The Euclidean norm of all entries."""
    return exactly(sum((entry * entry for entry in values.ravel()), Fraction(0))).sqrt()


def largest_row_sum(matrix: Matrix) -> Interval:
    """The largest sum of absolute values of a row."""
    return exactly(max(sum((abs(entry) for entry in row), Fraction(0)) for row in matrix))
