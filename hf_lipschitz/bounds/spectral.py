"""Verified upper bounds of spectral norms: ``spectral_norm_upper``.

The "any L" form. For every real k x k matrix L, ``sigma_max(A)^2 = lambda_max(A A^T) <= lambda_max(A A^T + L L^T)``.
With G = fl(A A^T), H = fl(L L^T), D = fl(fl(G + H) - mu I): the dot-product error model, valid for every order of
summation and for fused multiply-add, gives |G - A A^T| <= gamma_K |A||A|^T and |H - L L^T| <= gamma_k |L||L|^T, and S
= G + H satisfies S - mu I = D + Delta with |Delta_ij| <= u |D_ij| off the diagonal, |Delta_ii| <= 2u(1+u)|D_ii| + u
mu. So whatever L, mu, the Cholesky and the eigenvalue routines are,

    sigma_max^2 <= [ mu (1+u) + 1.001 ||D||_F + gamma_K F2 + gamma_k l2 ] (1 + 32u),
    F2 = tr(G)/(1 - gamma_{K+k+2}) (1+32u) >= ||A||_F^2,   l2 = tr(H)/(1 - gamma_{2k+2}) (1+32u) >= ||L||_F^2.

1.001 covers the roundings of the Frobenius norm for k < 10^6 and the factor (1 + 2u) of Delta, 1 + 32u the scalar
operations. Estimates (eigenvalues, a stored witness) only choose mu; they cannot make the result wrong, only larger.

Near-orthogonal matrices need no factorisation: with D = fl(G - c I) for any c >= 0,
``sigma_max^2 <= [c (1+u) + 1.001 ||D|| + gamma_K F2](1 + 32u)`` by the same argument with L = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .errors import KernelError
from .rounding import Array, U, add_up, div_up, down, gamma, mul_up, sqrt_up, up
from .trust import flushes_to_zero

_SCALARS = 1.0 + 32.0 * U
_NEAR_ORTHOGONAL = 1e-6  # the factor-free path is taken where it costs less than half of this in sigma


@dataclass(frozen=True)
class NormBound:
    """A proved bound ``sigma_max <= value`` of one matrix.

    ``method`` names the path taken, ``witness`` the mu (a number near sigma_max^2) that lets a verifier repeat it
    without eigenvalues; None where the path needs none.
    """

    value: float
    method: str
    witness: float | None = None


@np.errstate(over="ignore")  # what overflows becomes an infinite bound
def spectral_norm_upper(matrix: Array, *, witness: float | None = None) -> NormBound:
    """Bound the largest singular value of a real matrix from above, rigorously and tightly.

    Args:
        matrix: shape (m, n), float16, float32 or float64, finite; upcast to float64 exactly.
        witness: a mu from an earlier run; a useless one costs time or tightness, never soundness.

    Returns:
        NormBound; relative excess about 1e-12 for the factorised path, below 1e-6 for the near-orthogonal one.

    Raises:
        KernelError: not a matrix, an entry NaN or infinite, or a processor that flushes subnormals to zero.

    Source: module docstring (derivation).
    """
    a = _checked(matrix)
    if a.size == 0 or not np.any(a):
        return NormBound(0.0, "zero")
    a = a if a.shape[0] <= a.shape[1] else a.T
    a, exponent, lost = _scaled(a)
    bound = _best_squared(a, witness if exponent == 0 else None)
    root = add_up(sqrt_up(bound.value), lost)
    if exponent == 0:
        return NormBound(root, bound.method, bound.witness)
    return NormBound(up(float(np.ldexp(root, exponent))), bound.method)


def _checked(matrix: Array) -> Array:
    array = np.asarray(matrix)
    if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise KernelError(
            f"a spectral norm needs a real matrix of at most 64-bit floats, got {array.dtype} {array.shape}"
        )
    a = array.astype(np.float64)
    if not np.all(np.isfinite(a)):
        raise KernelError("a matrix contains NaN or infinite entries: no norm bounds it")
    if flushes_to_zero():
        raise KernelError("this process flushes subnormal numbers to zero: switch that mode off to certify")
    return a


def _scaled(a: Array) -> tuple[Array, int, float]:
    """Scale by a power of two iff needed for squares to stay in range; also a bound of what that lost (scaled
    units).
    """
    largest = float(np.max(np.abs(a)))
    if 2.0**-200 <= largest <= 2.0**200:
        return a, 0, 0.0
    exponent = math.frexp(largest)[1]
    lost = up(math.sqrt(a.size) * 2.0**-1074) if exponent > 0 else 0.0
    return np.ldexp(a, -exponent), exponent, lost


def _best_squared(a: Array, witness: float | None) -> NormBound:
    """Bound sigma_max(a)^2 for a with at most as many rows as columns."""
    k, wide = a.shape
    gram = a @ a.T
    trace = float(np.trace(gram))
    frobenius2 = mul_up(div_up(max(trace, 0.0), down(1.0 - gamma(wide + k + 2))), _SCALARS)
    gram_error = mul_up(gamma(wide), frobenius2)
    near = None if witness else _near_orthogonal(gram, trace / k, gram_error)  # a witness says which path was taken
    if near is not None:
        return near
    for mu in _candidates(gram, trace, witness):
        squared = _any_l(gram, mu, gram_error)
        if squared is not None:
            return NormBound(squared, "cholesky", mu)
    row_column = mul_up(_largest_sum(np.abs(a)), _largest_sum(np.abs(a).T))
    return NormBound(min(frobenius2, row_column), "fallback")


def _near_orthogonal(gram: Array, centre: float, gram_error: float) -> NormBound | None:
    deviation = gram.copy()
    deviation[np.diag_indices_from(deviation)] -= centre
    sums = max(_largest_sum(np.abs(deviation)), _largest_sum(np.abs(deviation.T)))
    distance = mul_up(1.001, min(float(np.linalg.norm(deviation)), sums))
    if not distance <= _NEAR_ORTHOGONAL * centre:
        return None
    squared = mul_up(add_up(mul_up(centre, 1.0 + 2.0 * U), distance, gram_error), _SCALARS)
    return NormBound(squared, "near_orthogonal")


def _candidates(gram: Array, trace: float, witness: float | None) -> Iterator[float]:
    """Shifts mu to try: the witness first, then the eigenvalue estimate with growing safety margins."""
    k = gram.shape[0]
    if witness is not None and math.isfinite(witness) and witness > 0.0:
        yield witness
    try:
        top = float(np.linalg.eigvalsh(gram)[-1])
    except np.linalg.LinAlgError:
        return
    if not (math.isfinite(top) and top > 0.0):
        return
    for attempt in range(12):
        safety = 8.0 * 8.0**attempt * k * U
        yield top * (1.0 + safety) + gamma(k + 1) * max(k * top - trace, 0.0) + 2.0 * k * U * top


def _any_l(gram: Array, mu: float, gram_error: float) -> float | None:
    """The bound of the module docstring for one mu; None if the factorisation failed or produced NaN."""
    k = gram.shape[0]
    shifted = -gram
    shifted[np.diag_indices(k)] += mu
    try:
        lower = np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return None
    product = lower @ lower.T
    trace = float(np.trace(product))
    deviation = gram + product
    deviation[np.diag_indices(k)] -= mu
    distance = float(np.linalg.norm(deviation))
    if not (math.isfinite(distance) and math.isfinite(trace)):
        return None
    lower2 = mul_up(div_up(max(trace, 0.0), down(1.0 - gamma(2 * k + 2))), _SCALARS)
    total = add_up(mul_up(mu, 1.0 + 2.0 * U), mul_up(1.001, distance), gram_error, mul_up(gamma(k), lower2))
    return mul_up(total, _SCALARS)


def _largest_sum(absolute: Array) -> float:
    """An upper bound of the largest row sum of a non-negative matrix."""
    return mul_up(float(np.max(np.sum(absolute, axis=1))), 1.0 + 2.0 * gamma(absolute.shape[1]))
