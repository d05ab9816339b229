"""Storing a capped matrix: rounding to the stored dtype can raise its norm, and what is stored gets certified.

Rounding moves each entry by at most u relatively (u = 2^-24 in float32, 2^-8 in bfloat16), so the norm grows by at
most ``u || |W| ||_2 <= u sqrt(k) ||W||_2`` with k the shorter side: |W| has the Frobenius norm of W, which is at most
sqrt(k) ||W||_2.

- float32: shrink by that first. No verification is needed, and the loss is about 1e-6.
- 16-bit dtypes: that would cost 6 % at k = 256, while the norm really grows by 0.1 to 0.3 %. So: round, verify the
  stored tensor, shrink, repeat. float64 too, where the proved bound is less exact than the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lipschitz.caps.verified_norms import spectral_norms

_U64 = 2.0**-53
_BOUND_EXCESS = 5.1e-7  # what spectral_norm_upper may add, relatively, to the norm of a nearly orthogonal matrix
_SMALLEST = 1e-25  # below this, float32 entries may be subnormal and the relative error model void: verify instead
_ATTEMPTS = 64  # the shrinking doubles until nothing is left, so far fewer suffice


def storage_slack(rows: int, columns: int) -> float:
    """How much smaller than the value to aim so that the norm stored in float32, *as proved*, is at most the value.

    The larger of ``1.01 u sqrt(k)``, the rounding of the entries, and the excess of the proved bound where it is a
    loose one (that path is only taken where all singular values agree within it, so their root mean square, which
    rounding raises by u only, stands in for the norm); ``2 u`` for factor and mean; ``8 k n 2^-53`` for the float64
    products of the caps and the excess of the tight path.
    """
    u = 2.0**-24
    return max(1.01 * u * math.sqrt(min(rows, columns)), _BOUND_EXCESS) + 2.0 * u + 8.0 * _U64 * rows * columns


def store_within(exact_SMN: Tensor, bounds: Sequence[float], value: float, dtype: torch.dtype) -> Tensor:
    """Scale matrix i by ``value / bounds[i]`` and round it to ``dtype``; its stored norm is at most ``value``.

    Args:
        exact_SMN: float64 stack.
        bounds: a positive upper bound of each matrix's spectral norm, up to relative errors of ``8 k n 2^-53``.
        value: the cap.
        dtype: dtype to store.

    Returns:
        Stack of the same shape in ``dtype``.
    """
    if stores_without_check(dtype, value):
        aim = value * (1.0 - storage_slack(*exact_SMN.shape[-2:]))
        factors = torch.tensor([aim / bound for bound in bounds], dtype=torch.float64, device=exact_SMN.device)
        return (exact_SMN * factors[:, None, None]).to(dtype)
    stored = [
        store_strictly(matrix, value / bound, value, dtype) for matrix, bound in zip(exact_SMN, bounds, strict=True)
    ]
    return torch.stack(stored) if stored else exact_SMN.to(dtype)


def stores_without_check(dtype: torch.dtype, value: float) -> bool:
    """Whether ``storage_slack`` covers the rounding to this dtype; else the stored matrix must be verified."""
    return dtype == torch.float32 and value > _SMALLEST


def store_strictly(exact_MN: Tensor, factor: float, value: float, dtype: torch.dtype) -> Tensor:
    """Scale by ``factor``, round, verify, shrink, repeat, until the stored norm is at most ``value``.

    It ends, because the shrinking doubles until the zero matrix is left.
    """
    shrink = torch.finfo(dtype).eps / 16
    for _ in range(_ATTEMPTS):
        stored = (exact_MN * factor).to(dtype)
        norm = spectral_norms(stored)[0]
        if norm <= value:
            return stored
        factor *= value / norm * max(0.0, 1.0 - shrink)
        shrink *= 2.0
    return torch.zeros_like(exact_MN, dtype=dtype)
