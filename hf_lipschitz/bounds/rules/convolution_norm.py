"""The norm of a convolution, bounded over all frequencies and so for every image size: ``convolution_norm_upper``.

With symbol M(theta) = sum_a K_a e^{-i<a, theta>}, a convolution on the integer lattice has norm S = sup_theta
sigma_max(M(theta)). Zero padding is a compression of it to a window, a circular convolution samples its frequencies:
both have norm at most S.

*One frequency speaks for a cell.* Let S = sigma_max(M(theta*)), u and v its singular vectors, d a direction, and q(t) =
Re u* M(theta* + t d) v up to a unimodular factor that centres the taps: a real entire function of exponential type tau
= nu_1 |d_1| + nu_2 |d_2|, nu = (taps - 1) / 2 for each axis, bounded by S on the real line, with q(0) = S. By Bernstein
and Szego (Duffin, Schaeffer 1938), q'^2 <= tau^2 (S^2 - q^2): arccos(q / S) is tau-Lipschitz, and so

    sigma_max(M(theta* + d)) >= S cos(nu_1 |d_1| + nu_2 |d_2|)   while the argument is at most pi.

*The search.* Diamonds |d_1| + |d_2| <= r = pi/N round the points r (i, j), i + j even, tile the torus, and each splits
into m^2 of radius r/m (a diamond is a square in the coordinates d_1 + d_2, d_1 - d_2). If S^2 > mu, the diamond that
holds theta* has sigma_max^2 > mu cos^2(r max nu) at its centre, at every level. So a diamond is discarded where
sigma_max^2 <= mu cos^2(r max nu) is *proved* at its centre, the others split, and when none is left S^2 <= mu. An axis
with one tap needs no search: intervals of the other axis take the place of diamonds. Estimates (eigenvalues at centres
that fail) raise mu while it is sought; a witness is a mu for which nothing need be sought. What was discarded with a
smaller mu stays discarded. Kernels are real, M(-theta) is the conjugate of M(theta): theta_2 in [0, pi] is enough.

If the cells become too many, mu is raised to what the last level allows, and the excess is that level's. Kernels so
wide that a second level would be too many (200 channels) have one level, as fine as may be: 1 % at 256, 8 % at 512.
Flat spectra, which would need that, have another proof: S^2 <= lambda_max(R_0) + 2 sum_{d > 0} ||R_d||_F with the
matrices below, d > 0 one of each pair +-d. R_0 is the mean of M M* over all theta, so that S^2 >= lambda_max(R_0):
where the sum is small (orthogonal convolutions) this is as tight.

*Rounding.* M M* = sum_d R_d e^{-i<d, theta>}, R_d = sum_{a - b = d} K_a K_b^T, is summed directly, with <d, (i, j)>
reduced mod 2N in integers. Products of n terms err by gamma_n, each cosine and sine by 21u (angle and library; 64u is
counted), so that entry by entry |error| <= sqrt(2) gamma_{n + 64} (A A^T), A = sum_a |K_a|, n all terms together; its
2-norm is at most that times ||A||_F^2. The proof at a centre is that of spectral.py for Hermitian matrices that near.

Not covered, since pixels are repeated: circular padding wider than half of the dilated kernel or with a stride that
does not divide the size, reflect and replicate padding. The rules refuse those or multiply by the norm of the padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import KernelError
from ..rounding import Array, add_up, array_norm_up, gamma, mul_up, sqrt_up, up
from ..spectral import NormBound, any_l, checked, freivalds, scaled, signs, spectral_norm_upper

_EXCESS = 1e-4  # how far mu is put above the largest eigenvalue found, half of it in the norm
_MARGIN = 1e-6  # how far below what is to be proved a factorisation is tried
_CHUNK = 2**21  # entries of Gram matrices computed together
_CELLS, _FINEST = 512, 2.0**-9  # give up at that many cells a tap, or at that angle
_TAPS = 1024  # kernels of more taps are not searched
_WORK = 2**36  # or at cells whose factorisations multiply that often: 64 cells of 512 channels


def convolution_norm_upper(
    kernel: Array, *, stride: tuple[int, int] = (1, 1), groups: int = 1, witness: float | None = None
) -> NormBound:
    """Bound the l2 norm of a 2-D convolution, zero-padded by any amount or circular, for every image size.

    Args:
        kernel: shape (out, in / groups, kh, kw), real, finite; for a transposed convolution (in, out / groups, kh, kw),
            whose norm is that of its adjoint. A 1-D convolution has kh = 1.
        stride: a strided convolution is one of the unshuffled image (an isometry), with ceil(k / s) taps. Dilation d
            changes no norm at stride 1; with stride s pass s / gcd(s, d), since one residue modulo the gcd is read.
        groups: the norm is the largest of the groups'.
        witness: the mu of an earlier run; a useless one costs time, never soundness.

    Returns:
        NormBound, relative excess at most 1e-4 (its ``slack`` says if more), method ``frequencies`` or ``flat``; of a
        kernel with one tap (a dense matrix) what ``spectral_norm_upper`` gives; ``fallback`` (root of the number of
        taps times the Frobenius norm) if the search failed, or for more than 1024 taps.

    Raises:
        KernelError: not a real, finite 4-D kernel, or rows that do not divide into the groups.

    Source: module docstring (derivation).
    """
    taps = _unshuffled(kernel, stride, groups)
    if taps.shape[:2] == (1, 1) or not np.any(taps):
        return spectral_norm_upper(taps[0, 0], witness=witness)
    taps, exponent, lost = scaled(taps)
    squared, method, mu, below = _squared(taps, 0.0 if exponent else witness or 0.0)
    root = add_up(sqrt_up(squared), mul_up(float(taps.shape[0] * taps.shape[1]), lost))
    slack = root / math.sqrt(below) - 1.0 if below > 0.0 else None
    value = up(float(np.ldexp(root, exponent))) if exponent else root
    return NormBound(value, method, None if exponent else mu, slack)


def _squared(taps: Array, witness: float) -> tuple[float, str, float | None, float]:
    """Bound S^2: (bound, method, witness, estimate from below or 0)."""
    if taps.shape[0] * taps.shape[1] > _TAPS:
        return _by_frobenius(taps)
    symbol = _symbol(taps)
    if symbol.tail <= _EXCESS * symbol.mean:
        centre = spectral_norm_upper(_joined(taps), witness=witness or None)
        squared = add_up(mul_up(centre.value, centre.value), symbol.tail)
        return squared, "flat", centre.witness, 0.0 if witness else symbol.mean
    for mu, search in ((witness, False), (0.0, True)):
        if search or 0.0 < mu < 2.0**500:
            found = _proved(symbol, mu, search)
            if found is not None:
                return found[0], "frequencies", found[0], found[1]
    return _by_frobenius(taps)


def _by_frobenius(taps: Array) -> tuple[float, str, float | None, float]:
    """S <= sum_a |K_a| <= sqrt(number of taps) times the Frobenius norm."""
    return mul_up(float(taps.shape[0] * taps.shape[1]), *[array_norm_up(taps)] * 2), "fallback", None, 0.0


def _unshuffled(kernel: Array, stride: tuple[int, int], groups: int) -> Array:
    """The taps (kh, kw, groups, rows, columns) of the convolution of the unshuffled image, rows <= columns."""
    kernel = checked(kernel)
    if kernel.ndim != 4 or kernel.dtype.kind == "c" or kernel.size == 0 or groups < 1 or kernel.shape[0] % groups:
        raise KernelError(
            f"a convolution kernel needs 4 dimensions of real numbers, the first a multiple of its groups, got "
            f"{kernel.dtype} {kernel.shape} and {groups} groups"
        )
    (rows, columns, *size), steps = kernel.shape, [min(s, k) for s, k in zip(stride, kernel.shape[2:], strict=True)]
    padded = np.pad(kernel, ((0, 0), (0, 0), *((0, -k % s) for k, s in zip(size, steps, strict=True))))
    h, w = (-(-k // s) for k, s in zip(size, steps, strict=True))
    taps = padded.reshape(groups, rows // groups, columns, h, steps[0], w, steps[1]).transpose(3, 5, 0, 1, 2, 4, 6)
    taps = taps.reshape(h, w, groups, rows // groups, -1)
    return np.ascontiguousarray(taps if taps.shape[3] <= taps.shape[4] else taps.swapaxes(3, 4))


@dataclass(frozen=True)
class _Symbol:
    """M M* of all groups: ``even`` and ``odd``, (terms, groups k k), are R_d +- R_d^T for half of the ``shifts`` d.

    ``mean`` estimates lambda_max(R_0) from below, ``tail`` bounds what the other R_d and all rounding add.
    """

    shifts: Array
    even: Array
    odd: Array
    taps: tuple[int, int]
    shape: tuple[int, int, int]
    error: float
    mean: float
    tail: float

    def gram(self, points: Array, n: int) -> Array:
        """M M* at frequencies pi points / n: (points, groups, k, k), within ``error`` in 2-norm."""
        angles = (points @ self.shifts.T % (2 * n)) * (math.pi / n)
        result = np.empty((len(points), *self.shape), np.complex128)
        result.real = _product(np.cos(angles), self.even).reshape(result.shape)
        result.imag = _product(-np.sin(angles), self.odd).reshape(result.shape)
        return result


def _symbol(taps: Array) -> _Symbol:
    (h, w), shape, terms = taps.shape[:2], (*taps.shape[2:4], taps.shape[3]), dict[tuple[int, int], Array]()
    for p in range(h):
        for q in range(1 - w if p else 0, w):
            left, right = taps[p:, max(q, 0) : w + min(q, 0)], taps[: h - p, max(-q, 0) : w - max(q, 0)]
            terms[p, q] = _product(_joined(left), _joined(right).swapaxes(1, 2))
    shifts, r = np.array(list(terms)), np.stack(list(terms.values()))
    even, odd = r + r.swapaxes(2, 3), r - r.swapaxes(2, 3)
    even[0] = r[0]
    count = h * w * taps.shape[4] + len(terms) + 80
    absolute = array_norm_up(np.abs(taps).sum(axis=(0, 1)))
    error = mul_up(1.5, gamma(count), absolute, absolute, 1.001)
    tail = mul_up(2.001, float(np.linalg.norm(r[1:], axis=(2, 3)).max(axis=1).sum()))
    mean = float(np.trace(r[0], axis1=1, axis2=2).max()) / shape[1]
    terms_kk = (even.reshape(len(r), -1), odd.reshape(len(r), -1))
    return _Symbol(shifts, *terms_kk, (h, w), shape, error, mean, add_up(tail, error))


def _joined(taps: Array) -> Array:
    return taps.transpose(2, 3, 0, 1, 4).reshape(*taps.shape[2:4], -1)


def _product(left: Array, right: Array) -> Array:
    """left @ right, tested by plain sums."""
    product, x = left @ right, signs(right.shape[-1])
    expected = np.einsum("...ij,...j->...i", left, np.einsum("...ij,j->...i", right, x))
    norm = mul_up(array_norm_up(left), array_norm_up(right), sqrt_up(float(x.size)))
    freivalds(np.einsum("...ij,j->...i", product, x) - expected, mul_up(gamma(2 * sum(right.shape[-2:]) + 8), norm))
    return product


def _proved(symbol: _Symbol, mu: float, search: bool) -> tuple[float, float] | None:
    """The mu that is proved to bound S^2, the given one or one found, and the largest eigenvalue seen; None if that
    fails.
    """
    nu, many, top = (max(symbol.taps) - 1) / 2.0, np.array(symbol.taps) > 1, 0.0
    n, pieces = 2 ** math.ceil(math.log2(8 * nu)), 3
    size = max(1, _CHUNK // max(math.prod(symbol.shape), len(symbol.shifts)))
    budget = min(_CELLS * math.prod(symbol.taps), _WORK // (math.prod(symbol.shape) * symbol.shape[1] * 8))
    once, points = math.isqrt(budget), _grid(n, many)
    wide, single = bool(many.all()) and once > n, bool(many.all()) and once <= n
    while len(points) <= 2 * budget and math.pi * nu / n > _FINEST:
        cosine2, failed = math.cos(math.pi * nu / n * (1.0 + 1e-15)) ** 2 * (1.0 - 1e-14), list[tuple[Array, bool]]()
        for start in range(0, len(points), size):
            chunk = points[start : start + size]
            for point, gram in zip(chunk, symbol.gram(chunk, n), strict=True):
                if (single and search) or not _below(gram, mu * cosine2, symbol.error):
                    low = search and _below(gram, mu / (1.0 + _EXCESS / 2.0), symbol.error)
                    failed.append((point, low))
                    if search and not low:
                        top = max(top, float(np.linalg.eigvalsh(gram).max()))
                        mu = max(mu, top * (1.0 + _EXCESS))
        if wide and len(failed) * pieces**2 > budget:  # one level as fine as may be is better than this and no more
            n, wide, single, points = once, False, True, _grid(once, many)
            continue
        wide = False
        if search and (single or len(failed) * pieces**2 > budget):
            mu, pieces, single = mu / cosine2 * (1.0 + 2.0 * _MARGIN), 1, False
            failed = [(point, low) for point, low in failed if not low]  # what is below the old mu is below mu cos^2
        if not failed:
            return mu, top
        points = (pieces * np.array([point for point, _ in failed])[:, None] + _moves(pieces, many)).reshape(-1, 2)
        n, pieces = n * pieces, 2
    return None


def _grid(n: int, many: Array) -> Array:
    """Centres of the first diamonds, in units of pi / n; no axis but those with several taps is searched."""
    points = np.argwhere(np.indices((2 * n, n + 1)).sum(axis=0) % 2 == 0)
    return points[np.all(points[:, ~many] == 0, axis=1)]


def _moves(pieces: int, many: Array) -> Array:
    """Where the pieces^2 parts of a diamond lie round its centre (pieces parts if one axis is searched), in their
    radius.
    """
    steps = np.arange(1 - pieces, pieces, 2)
    if not many.all():
        return steps[:, None] * many
    u, v = np.meshgrid(steps, steps)
    return np.stack([u + v, u - v], axis=-1).reshape(-1, 2) // 2


def _below(gram: Array, limit: float, error: float) -> bool:
    """Whether all eigenvalues are proved to be at most the limit."""
    start = limit * (1.0 - _MARGIN) - 2.0 * error
    bound = any_l(gram, start, error) if start > 0.0 else None
    return bound is not None and bound <= limit
