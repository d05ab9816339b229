"""The norm formula itself, term by term, in fractions.

Its terms are of the size of rounding errors, which no matrix of a test need reach; so dropping one is not refuted by a
norm, but it is by the formula. G, L and mu are the floats that the kernel meets (the same NumPy calls on the same
matrix); from there on everything is exact:

    sigma_max^2 <= [ mu (1+u) + 1.001 |D|_F + gamma_K F2 + gamma_k l2 ] (1 + 32u)
    F2 = tr(G)/(1 - gamma_{2K+k+2}) (1 + 32u),  l2 = tr(L L*)/(1 - gamma_{4k+2}) (1 + 32u),  D = G + L L* - mu I,

gamma_n replaced by sqrt(2) gamma_{2n} for complex matrices; for near-orthogonal matrices ``[ c (1+u) + 1.001 min(|D|_F,
row sums) + gamma_K F2 ] (1 + 32u)``, D = G - c I. The kernel forms half of D in blocks and counts it twice, so that its
|D| is known up to a factor sqrt(2), and where D is rounding noise, not at all from below.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tests.second_checker.exact import ZERO, Interval, exactly, gamma, smaller
from tests.second_checker.norms import fractions_of, frobenius, largest_row_sum

_U = Fraction(1, 1 << 53)
_MARGIN = exactly(Fraction(1001, 1000))
_NOISE = Fraction(1, 10**9)


def _trace(matrix: np.ndarray) -> Fraction:
    return Fraction(float(np.trace(matrix).real))


def _scalars(unit: Fraction) -> Interval:
    return exactly(1 + 32 * unit)


def _inflated(trace: Fraction, count: int, unit: Fraction) -> Interval:
    return exactly(trace / (1 - gamma(count, unit).high)) * _scalars(unit)


def _dot(count: int, matrix: np.ndarray, unit: Fraction) -> Interval:
    return exactly(2).sqrt() * gamma(2 * count, unit) if np.iscomplexobj(matrix) else gamma(count, unit)


def _size(matrix: np.ndarray) -> Interval:
    return frobenius(fractions_of(np.stack([matrix.real, matrix.imag])))


def factored(matrix: np.ndarray, mu: float, unit: Fraction = _U) -> Interval:
    """What the bracket of sigma_max^2 may be, for a matrix with at most as many rows as columns and a mu that works."""
    k, wide = matrix.shape
    gram = matrix @ matrix.conj().T
    shifted = -gram
    shifted[np.diag_indices(k)] += mu
    lower = np.tril(np.linalg.cholesky(shifted))
    product = lower @ lower.conj().T
    deviation = gram + product
    deviation[np.diag_indices(k)] -= mu
    distance = _MARGIN * _size(deviation)
    total = (
        exactly(Fraction(mu) * (1 + unit))
        + _dot(wide, matrix, unit) * _inflated(_trace(gram), 2 * wide + k + 2, unit)
        + _dot(k, matrix, unit) * _inflated(_trace(product), 4 * k + 2, unit)
    )
    least = distance if distance.low > _NOISE * Fraction(mu) else ZERO
    most = distance * exactly(2)
    return Interval(((total + least) * _scalars(unit)).low, ((total + most) * _scalars(unit)).high)


def near_orthogonal(matrix: np.ndarray, unit: Fraction = _U) -> Interval:
    """The bracket for the path without a factorisation; c is the mean of the diagonal of G."""
    k, wide = matrix.shape
    gram = matrix @ matrix.T
    trace = _trace(gram)
    centre = float(np.trace(gram)) / k
    deviation = gram.copy()
    deviation[np.diag_indices(k)] -= centre
    exact = fractions_of(deviation)
    distance = smaller(frobenius(exact), largest_row_sum(exact))
    total = (
        exactly(Fraction(centre) * (1 + unit))
        + _MARGIN * distance
        + gamma(wide, unit) * _inflated(trace, 2 * wide + k + 2, unit)
    )
    return total * _scalars(unit)


def crude(matrix: np.ndarray, unit: Fraction = _U) -> Interval:
    """The bracket that needs no estimate: the smaller of |A|_F^2 as above and (largest row sum)(largest column sum)."""
    k, wide = matrix.shape
    exact = fractions_of(matrix)
    sums = [
        largest_row_sum(side) * (exactly(1) + exactly(2) * gamma(side.shape[1] + 1, unit)) for side in (exact, exact.T)
    ]
    return smaller(_inflated(_trace(matrix @ matrix.T), 2 * wide + k + 2, unit), sums[0] * sums[1])
