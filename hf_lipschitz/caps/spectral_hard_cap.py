"""``spectral_hard_cap``: singular values above the cap become the cap, all others stay: s -> min(s, value).

With X a matrix of K rows and N >= K columns (else its transpose), scaled to norm 1, w the cap in that scale:

- O = msign(X), the same vectors with singular values 1, by odd polynomials; it must be right for s >= w only. Below,
  o(s) may be anything in [0, 1], so that small and vanishing values cost nothing.
- H = X O^T is symmetric with eigenvalues s o(s): s where s >= w, less than w elsewhere. H is linear in s; the Gram
  matrix would square the condition.
- S = sign(H - w I), P = (I + S) / 2, the projector on what exceeds; Q = O^T P O is the same for the right vectors.
- ``W' = w O + (I - P) (X - w O) (I - Q) = X - C``, ``C = P D + (I - P) M P O``, D = X - w O, M = H - w I,

because D Q = M P O. Where P is 0, C is 0, whatever O is there. One projector would do in exact arithmetic, ``X - P D``,
but an error E of P would enter as E D, of the size of the largest singular value; with two it enters as ``E D (I - Q)``
and ``(I - P) D E``, of the size of w. Where the sign is not resolved, p strictly between 0 and 1, the error is
``(1 - p)^2 (s - w)`` above w and at most ``w - s`` below: tiny, because only s close to w are not resolved.

Both signs come from blocks of six quintics of ``orthogonalize``, which multiply small values by about 1,900, and from
cubic steps ``(3 X - X X^T X) / 2``, which converge quadratically and never overshoot 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_value, check_weight, float64, full_precision, peaks, stacked
from hf_lipschitz.caps.schedules import schedule
from hf_lipschitz.caps.storage import store_within
from hf_lipschitz.caps.verified_norms import spectral_norms

_BLOCK = schedule(6)
_BLOCK_LEAST = 0.996  # a block maps [1e-3, 1] into [this, 1]
_CUBIC_FROM = 0.1  # from here cubic steps cost less than a block
# Rounding errors of the products reach the result enlarged by norm / value. Up to this ratio float32 keeps them
# below 1e-5 of the value; above, the products run in float64.
_RATIO_OF_FLOAT32 = 4.0
_LARGEST_RATIO = 1e8  # float64 products resolve the cap down to about 1e-12 of the norm
_RESOLVED = 32.0  # values farther from the cap than this many units of the weight's precision are told apart from it


def spectral_hard_cap(weight: Tensor, *, value: float = 1.0, reach: Sequence[float] | None = None) -> Tensor:
    """Map singular values s to ``min(s, value)``, per matrix; the singular vectors stay.

    By matrix products, with K the shorter side: where the norm is up to twice the value, 40 of K x K by K x K and 8 to
    16 of K x K by K x N; at a hundred times the value 62 and 22, in float64; for float64 weights about 100 and 10
    to 22.

    Args:
        weight: (..., m, n), floating point.
        value: the cap, in units of the l2 operator norm.
        reach: an upper bound of the norm of each matrix of the stack, if known; matrices whose reach is at most
            ``value`` are not looked at. None computes proved norms.

    Returns:
        Tensor of the shape and dtype of ``weight``; the proved norm of each stored matrix is at most ``value``.
        Matrices that satisfy this already stay bit for bit. The others follow the formula within 1e-5 of ``value`` for
        float32 and 1e-10 for float64, up to a norm of a hundred times the value (measured in
        tests/caps/test_spectral_hard_cap.py); for 16-bit dtypes their rounding dominates. At larger norms float64
        products err by about 1e-12 of the norm. A matrix of more than 1e8 times the value is scaled down to that first:
        smaller singular values are not resolved, and shrink.

    Raises:
        ValueError: not a floating-point matrix, ``value`` not positive and finite, or ``reach`` of another length.
        NonFiniteWeightError: an entry is NaN or infinite.

    Source: the module docstring for the function, bounds/spectral.py for the norm, storage_slack for rounding.
    """
    check_weight(weight, "spectral_hard_cap")
    check_value(value, weight.dtype, "spectral_hard_cap")
    if weight.numel() == 0:
        return weight.clone()
    with full_precision(weight.device):
        result_SMN = stacked(weight).clone()
        if reach is not None and len(reach) != len(result_SMN):
            raise ValueError(
                f"spectral_hard_cap: {len(reach)} bounds for {len(result_SMN)} matrices: give one for each"
            )
        peaks(result_SMN, "spectral_hard_cap")
        doubtful = [i for i in range(len(result_SMN)) if reach is None or not reach[i] <= value]
        norms = dict(zip(doubtful, spectral_norms(result_SMN[doubtful]), strict=True))
        above = [i for i in doubtful if norms[i] > value]
        if above:
            exact = _capped(result_SMN[above], [norms[i] for i in above], value)
            bounds = [max(norm, value) for norm in spectral_norms(exact)]  # never scaled up
            result_SMN[above] = store_within(exact, bounds, value, weight.dtype).to(weight.device)
        return result_SMN.reshape(weight.shape)


def _capped(stack_SMN: Tensor, norms: list[float], value: float) -> Tensor:
    """The formula of the module docstring in float64, with corrections computed in float32 where that suffices."""
    is_tall = stack_SMN.shape[-2] > stack_SMN.shape[-1]
    exact_SKN = float64(stack_SMN.mT if is_tall else stack_SMN)
    size_S11 = torch.tensor(norms, dtype=torch.float64, device=exact_SKN.device)[:, None, None]
    exact_SKN = exact_SKN / size_S11
    ratio = min(max(norms) / value, _LARGEST_RATIO)
    w_S11 = (value / size_S11).clamp(min=1.0 / ratio)
    is_simple = stack_SMN.dtype != torch.float64 and ratio <= _RATIO_OF_FLOAT32
    x_SKN = exact_SKN.to(torch.float32) if is_simple else exact_SKN
    precision = torch.finfo(torch.promote_types(stack_SMN.dtype, torch.float32)).eps
    capped_SKN = (exact_SKN - _excess(x_SKN, w_S11.to(x_SKN.dtype), ratio, precision)) / w_S11 * value
    return capped_SKN.mT if is_tall else capped_SKN


def _excess(x_SKN: Tensor, w_S11: Tensor, ratio: float, precision: float) -> Tensor:
    """C: what exceeds w, for matrices of norm at most 1 and caps of at least ``1 / ratio``."""
    finest = torch.finfo(x_SKN.dtype).eps
    o_SKN = _msign(x_SKN, max(1.0 / ratio, finest))
    h_SKK = x_SKN @ o_SKN.mT
    eye_KK = torch.eye(h_SKK.shape[-1], dtype=h_SKK.dtype, device=h_SKK.device)
    m_SKK = (h_SKK + h_SKK.mT) / 2.0 - w_S11 * eye_KK
    scale_S11 = torch.maximum(w_S11, 1.0 - w_S11)  # the eigenvalues of M lie in [-w, 1 - w]
    smallest = 1.0 / max(1.0, ratio - 1.0)  # of w / scale
    s_SKK = _msign(m_SKK / scale_S11, max(_RESOLVED * precision * smallest, finest))
    p_SKK = (eye_KK + (s_SKK + s_SKK.mT) / 2.0) / 2.0
    twice_SKN = m_SKK @ (p_SKK @ o_SKN)
    return twice_SKN + p_SKK @ (x_SKN - w_S11 * o_SKN - twice_SKN)


def _msign(x_SKN: Tensor, lowest: float) -> Tensor:
    """Move the singular values in [lowest, 1] to 1 within the precision of the dtype; those below grow towards 1."""
    while lowest < _CUBIC_FROM:
        for a, b, c in _BLOCK:
            gram_SKK = x_SKN @ x_SKN.mT
            factor_SKK = torch.baddbmm(gram_SKK, gram_SKK, gram_SKK, beta=b, alpha=c)
            x_SKN = torch.baddbmm(x_SKN, factor_SKK, x_SKN, beta=a)
            lowest = a * lowest + b * lowest**3 + c * lowest**5
        lowest = min(lowest, _BLOCK_LEAST)
    while 1.0 - lowest > torch.finfo(x_SKN.dtype).eps:
        x_SKN = torch.baddbmm(x_SKN, x_SKN @ x_SKN.mT, x_SKN, beta=1.5, alpha=-0.5)
        lowest = 1.5 * lowest - 0.5 * lowest**3
    return x_SKN
