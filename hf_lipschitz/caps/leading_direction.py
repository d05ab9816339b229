"""The leading singular triplet by block subspace iteration, and the rank-one change that moves its singular value.

A block of eight vectors is multiplied by powers of the short-side Gram matrix B = W W^T and made orthonormal again;
an eigendecomposition of the 8 x 8 projection of B picks the leading combination u (Rayleigh-Ritz). The start is random
with a fixed seed, so runs repeat.

Convergence: a round multiplies the angle between u and the leading singular vector by ``(s_9 / s_1)^16``, with s_9 the
ninth singular value: up to eight nearly equal leading ones do not slow it down. Rounds stop when B u - t u, t the Ritz
value, has vanished for the precision, or after ``_ROUNDS`` = 40: by then the angle has shrunk 400,000-fold where s_9 =
0.98 s_1, 600-fold where s_9 = 0.99 s_1. With more than eight leading values closer together than that, u is a
combination of their vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import float64, stacked

_BLOCK = 8
_SQUARINGS = 3  # B^8: one round is worth eight plain ones
_ROUNDS = 40
_ENOUGH = 8.0  # residuals of this many units of the precision, relative to the leading eigenvalue, are rounding


def move_leading_value(weight: Tensor, factor: float, target: float) -> Tensor:
    """Add ``(target + (factor - 1) s) u v^T``: the leading singular value s becomes ``factor * s + target``.

    Args:
        weight: (..., m, n), floating point, finite.
        factor, target: the new leading singular value; one of them is usually 0.

    Returns:
        Tensor of the shape and dtype of ``weight``. For the unit vector u that was found, ``u^T W'`` is ``(factor s +
        target) v^T`` with unit v, up to rounding and *however far u is from the leading singular vector*. Zero matrices
        stay. Entries beyond the range of the dtype are set to its largest number.
    """
    is_tall = weight.shape[-2] > weight.shape[-1]
    exact_SKN = float64(stacked(weight.mT if is_tall else weight))
    peak_S11 = exact_SKN.abs().amax(dim=(-2, -1), keepdim=True)
    unit_SKN = exact_SKN / torch.where(peak_S11 > 0.0, peak_S11, torch.ones_like(peak_S11))
    work = torch.promote_types(weight.dtype, torch.float32)
    u_SK1 = _leading_vector(unit_SKN.to(work)).to(torch.float64)
    u_SK1 = u_SK1 / torch.linalg.vector_norm(u_SK1, dim=-2, keepdim=True)
    row_S1N = u_SK1.mT @ unit_SKN
    size_S11 = torch.linalg.vector_norm(row_S1N, dim=-1, keepdim=True)
    v_S1N = row_S1N / torch.where(size_S11 > 0.0, size_S11, torch.ones_like(size_S11))  # 0 for a zero matrix
    moved_SKN = exact_SKN + (target + (factor - 1.0) * size_S11 * peak_S11) * (u_SK1 @ v_S1N)
    largest = torch.finfo(weight.dtype).max
    moved = (moved_SKN.mT if is_tall else moved_SKN).clamp(-largest, largest)
    return moved.reshape(weight.shape).to(weight.dtype).to(weight.device)


def _leading_vector(x_SKN: Tensor) -> Tensor:
    """The leading left singular vector of each matrix, (s, k, 1), for matrices whose largest entry is 1 (or 0)."""
    gram_SKK = x_SKN @ x_SKN.mT
    trace_S11 = gram_SKK.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]
    gram_SKK = gram_SKK / torch.where(trace_S11 > 0.0, trace_S11, torch.ones_like(trace_S11))
    power_SKK = gram_SKK
    for _ in range(_SQUARINGS):
        power_SKK = power_SKK @ power_SKK
        # The largest diagonal entry of a positive semidefinite matrix is its largest entry.
        peak_S11 = power_SKK.diagonal(dim1=-2, dim2=-1).amax(dim=-1)[:, None, None]
        power_SKK = power_SKK / torch.where(peak_S11 > 0.0, peak_S11, torch.ones_like(peak_S11))
    block_SKB = _start(x_SKN)
    for _ in range(_ROUNDS):
        block_SKB = torch.linalg.qr(power_SKK @ block_SKB)[0]
        image_SKB = gram_SKK @ block_SKB
        values_SB, turn_SBB = torch.linalg.eigh(block_SKB.mT @ image_SKB)
        u_SK1, image_SK1 = block_SKB @ turn_SBB[..., -1:], image_SKB @ turn_SBB[..., -1:]
        top_S = values_SB[..., -1]
        residual_S = torch.linalg.vector_norm(image_SK1 - top_S[:, None, None] * u_SK1, dim=(-2, -1))
        if bool((residual_S <= _ENOUGH * torch.finfo(x_SKN.dtype).eps * top_S).all()):
            break
    return u_SK1


def _start(x_SKN: Tensor) -> Tensor:
    """Orthonormal random blocks, the same for all matrices of a shape."""
    rows = x_SKN.shape[-2]
    generator = torch.Generator().manual_seed(rows)
    block = torch.randn(rows, min(rows, _BLOCK), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(block)[0].to(x_SKN).expand(len(x_SKN), -1, -1)
