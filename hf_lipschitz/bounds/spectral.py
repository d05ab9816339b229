"""Verified upper bounds of spectral norms: ``spectral_norm_upper``.

The "any L" form. For every k x k matrix L, ``sigma_max(A)^2 = lambda_max(A A*) <= lambda_max(A A* + L L*)``.
With G = fl(A A*), H = fl(L L*), D = fl(fl(G + H) - mu I): the dot-product error model, valid for every order of
summation and for fused multiply-add, gives |G - A A*| <= gamma_K |A||A|^T and |H - L L*| <= gamma_k |L||L|^T, and S
= G + H satisfies S - mu I = D + Delta with |Delta_ij| <= u |D_ij| off the diagonal, |Delta_ii| <= 2u(1+u)|D_ii| + u
mu. So whatever L, mu, the Cholesky and the eigenvalue routines are,

    sigma_max^2 <= [ mu (1+u) + 1.001 ||D||_F + gamma_K F2 + gamma_k l2 ] (1 + 32u),
    F2 = tr(G)/(1 - gamma_{K+k+2}) (1+32u) >= ||A||_F^2,   l2 = tr(H)/(1 - gamma_{2k+2}) (1+32u) >= ||L||_F^2.

1.001 covers the roundings of the Frobenius norm for k < 10^6 and the factor (1 + 2u) of Delta, 1 + 32u the scalar
operations. Estimates (eigenvalues, a stored witness) only choose mu; they cannot make the result wrong, only larger.
Of H and D only the lower block triangle is formed: it stands for both, and ||D||_F^2 <= 2 ||lower part||_F^2.
Complex entries: gamma_n becomes sqrt(2) gamma_{2n}. A stack of matrices is one block-diagonal matrix: its norm is the
largest, all blocks share mu, and every term of the formula is the largest of its blocks.

Near-orthogonal matrices need no factorisation: with D = fl(G - c I) for any c >= 0,
``sigma_max^2 <= [c (1+u) + 1.001 ||D|| + gamma_K F2](1 + 32u)`` by the same argument with L = 0.

A BLAS that computes wrong products breaks the error model. So the products meet a Freivalds test: for signs x,
``G x = A (A* x)`` and ``L (L* x) = mu x - G x + D x`` must hold within that model, right sides and G x in plain sums
(``numpy.einsum`` without ``optimize`` calls no BLAS).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .errors import KernelError
from .rounding import Array, U, add_up, div_up, down, gamma, mul_up, sqrt_up, up
from .trust import flushes_to_zero

_SCALARS = 1.0 + 32.0 * U
_NEAR_ORTHOGONAL = 1e-6  # the factor-free path is taken where it costs less than half of this in sigma
_BLOCKS = 6  # L L* is formed in this many blocks of columns, which takes 0.26 of a full product


@dataclass(frozen=True)
class NormBound:
    """A proved bound ``norm <= value`` of one matrix, stack or convolution.

    ``method`` names the path taken, ``witness`` the mu (a number near the squared norm) that lets a verifier repeat it
    without eigenvalues; None where the path needs none. ``slack`` is how far the bound may be from the norm,
    relatively: its distance from an estimate from below; None where nothing was estimated (with a witness). It is
    information, no claim, and not compared.
    """

    value: float
    method: str
    witness: float | None = None
    slack: float | None = field(default=None, compare=False)


@np.errstate(over="ignore")  # what overflows becomes an infinite bound
def spectral_norm_upper(matrix: Array, *, witness: float | None = None) -> NormBound:
    """Bound the largest singular value of a matrix, or of all matrices of a stack, from above, rigorously and tightly.

    Args:
        matrix: shape (m, n), or (..., m, n) for the maximum over a stack; float16, float32, float64, complex64 or
            complex128, finite; upcast to double precision exactly.
        witness: a mu from an earlier run; a useless one costs time or tightness, never soundness.

    Returns:
        NormBound; relative excess about 1e-12 for the factorised path, below 1e-6 for the near-orthogonal one.

    Raises:
        KernelError: not a matrix, an entry NaN or infinite, a processor that flushes subnormals to zero, or a BLAS
            whose products are wrong.

    Source: module docstring (derivation).
    """
    a = checked(matrix)
    if not np.any(a):
        return NormBound(0.0, "zero", slack=0.0)
    a, exponent, lost = scaled(a.reshape(-1, *a.shape[-2:]))
    a = a if a.shape[1] <= a.shape[2] else a.swapaxes(1, 2)
    squared, method, mu, below = _best_squared(a, None if exponent else witness)
    root = add_up(sqrt_up(squared), lost)
    slack = root / math.sqrt(below) - 1.0 if below > 0.0 else None
    value = up(float(np.ldexp(root, exponent))) if exponent else root
    return NormBound(value, method, None if exponent else mu, slack)


def checked(matrix: Array) -> Array:
    """A stack of matrices in double precision, or KernelError (see ``spectral_norm_upper``)."""
    array = np.asarray(matrix)
    if array.ndim < 2 or array.dtype.char not in "efdFD":  # half, single and double precision, real and complex
        raise KernelError(
            f"a spectral norm needs a matrix or a stack of at most 64-bit floats, got {array.dtype} {array.shape}"
        )
    if not np.all(np.isfinite(array)):
        raise KernelError("a matrix contains NaN or infinite entries: no norm bounds it")
    if flushes_to_zero():
        raise KernelError("this process flushes subnormal numbers to zero: switch that mode off to certify")
    return np.ascontiguousarray(array, np.complex128 if array.dtype.kind == "c" else np.float64)


def scaled(a: Array) -> tuple[Array, int, float]:
    """Scale by a power of two iff needed for squares to stay in range: (scaled, exponent, Frobenius norm of what was
    lost, in scaled units).
    """
    parts = a.view(np.float64)
    largest = float(max(parts.max(), -parts.min()))
    if 2.0**-200 <= largest <= 2.0**200:
        return a, 0, 0.0
    exponent = math.frexp(largest)[1]
    lost = up(math.sqrt(parts.size) * 2.0**-1074) if exponent > 0 else 0.0
    return np.ldexp(parts, -exponent).view(a.dtype), exponent, lost


def _best_squared(a: Array, witness: float | None) -> tuple[float, str, float | None, float]:
    """Bound sigma_max^2 of a stack (b, k, K), k <= K: (bound, method, witness, estimate from below or 0)."""
    k, wide = a.shape[1:]
    gram = a @ a.conj().swapaxes(1, 2)
    trace = np.trace(gram, axis1=1, axis2=2).real
    frobenius2 = mul_up(div_up(max(float(trace.max()), 0.0), down(1.0 - gamma(2 * wide + k + 2))), _SCALARS)
    freivalds(_times(gram) - _times(a, _adjoint_times(a)), mul_up(gamma(6 * wide + 6 * k + 8), frobenius2))
    gram_error = mul_up(_dot(wide, a), frobenius2)
    near = None if witness else _near_orthogonal(gram, trace / k, gram_error)  # a witness says which path was taken
    if near is not None:
        return near, "near_orthogonal", None, float(trace.max()) / k
    for mu, below in _candidates(gram, float(trace.min()), witness):
        squared = any_l(gram, mu, gram_error)
        if squared is not None:
            return squared, "cholesky", mu, below
    row_column = mul_up(_largest_sum(a), _largest_sum(a.swapaxes(1, 2)))
    return min(frobenius2, row_column), "fallback", None, float(trace.max()) / k


def _near_orthogonal(gram: Array, centre: Array, gram_error: float) -> float | None:
    diagonal = np.einsum("bii->bi", gram)
    kept = diagonal.copy()
    diagonal -= centre[:, None]
    sums = max(_largest_sum(gram), _largest_sum(gram.swapaxes(1, 2)))
    distance = mul_up(1.001, min(float(np.linalg.norm(gram)), sums))
    diagonal[...] = kept
    if not distance <= _NEAR_ORTHOGONAL * centre.max():
        return None
    return mul_up(add_up(mul_up(float(centre.max()), 1.0 + 2.0 * U), distance, gram_error), _SCALARS)


def _candidates(gram: Array, trace: float, witness: float | None) -> Iterator[tuple[float, float]]:
    """Shifts mu to try, each with an estimate of the norm's square: the witness first, then the eigenvalue estimate
    with growing safety margins.
    """
    k = gram.shape[-1]
    if witness is not None and math.isfinite(witness) and witness > 0.0:
        yield witness, 0.0
    try:
        top = float(np.linalg.eigvalsh(gram)[:, -1].max())
    except np.linalg.LinAlgError:
        return
    if not (math.isfinite(top) and top > 0.0):
        return
    for attempt in range(12):
        safety = 8.0 * 8.0**attempt * k * U
        yield top * (1.0 + safety) + gamma(k + 1) * max(k * top - trace, 0.0) + 2.0 * k * U * top, top


def any_l(gram: Array, mu: float, gram_error: float) -> float | None:
    """Bound lambda_max of all Hermitian matrices within ``gram_error`` (2-norm) of a stack (b, k, k), which is given by
    its lower triangles, by the formula of the module docstring for one mu; None if the factorisation failed.
    """
    k = gram.shape[-1]
    shifted = -gram
    np.einsum("bii->bi", shifted)[...] += mu
    try:
        lower = np.tril(np.linalg.cholesky(shifted))
    except np.linalg.LinAlgError:
        return None
    trace, distance2, step = 0.0, 0.0, max(32, -(-k // _BLOCKS))
    for start in range(0, k, step):
        rows, stop = slice(start, start + step), start + step
        block = lower[:, start:, :stop] @ lower[:, rows, :stop].conj().swapaxes(1, 2)
        diagonal = np.einsum("bii->bi", block[:, : block.shape[2]])
        trace = trace + diagonal.real.sum(axis=1)
        block += gram[:, start:, rows]
        diagonal -= mu
        distance2 = distance2 + 2.0 * np.linalg.norm(block, axis=(1, 2)) ** 2
    distance, lower_trace = mul_up(1.001, math.sqrt(np.max(distance2))), float(np.max(trace))
    if not (math.isfinite(distance) and math.isfinite(lower_trace)):
        return None
    lower2 = mul_up(div_up(max(lower_trace, 0.0), down(1.0 - gamma(4 * k + 2))), _SCALARS)
    rounded = mul_up(gamma(12 * k + 64), add_up(distance, mul_up(float(k), mu), lower2))
    residual = mu * signs(k) - _times(gram) - _times(lower, _adjoint_times(lower))
    freivalds(residual, add_up(distance, rounded, gram_error))
    total = add_up(mul_up(mu, 1.0 + 2.0 * U), distance, gram_error, mul_up(_dot(k, lower), lower2))
    return mul_up(total, _SCALARS)


def _dot(count: int, like: Array) -> float:
    """The error factor of a dot product of ``count`` terms."""
    return mul_up(1.4142135623730952, gamma(2 * count)) if like.dtype.kind == "c" else gamma(count)


@functools.cache
def signs(count: int) -> Array:
    """A fixed vector of random signs."""
    return np.random.default_rng(count).choice((-1.0, 1.0), count)


def _times(a: Array, x: Array | None = None) -> Array:
    """a x for every matrix of a stack in plain sums; x is the signs if not given."""
    return np.einsum("bij,j->bi", a, signs(a.shape[2])) if x is None else np.einsum("bij,bj->bi", a, x)


def _adjoint_times(a: Array) -> Array:
    return np.einsum("bij,i->bj", a.conj(), signs(a.shape[1]))


def freivalds(residual: Array, norm: float) -> None:
    """Refuse if ``residual``, what square matrices of 2-norm at most ``norm`` make of signs, is larger than that."""
    if not np.linalg.norm(residual) <= mul_up(norm, sqrt_up(float(residual.size)), 1.001):
        raise KernelError("a matrix product fails its test by plain sums: use another NumPy build or OPENBLAS_CORETYPE")


def _largest_sum(a: Array) -> float:
    """An upper bound of the largest sum of absolute values of a row."""
    sums = np.sum(np.abs(np.real(a)) + np.abs(np.imag(a)), axis=2)
    return mul_up(float(np.max(sums)), 1.0 + 2.0 * gamma(a.shape[2] + 1))
