"""``orthogonalize``: the same singular vectors, all singular values near 1, by matrix products alone.

An odd polynomial of a matrix acts on its singular values and leaves the vectors alone. A composition of a few odd
quintics that were optimised together lifts singular values from [1e-3, 1] to near 1;
``benchmarks/orthogonalize_coefficients.py`` derives the coefficients and says how they are chosen. The quintics never
exceed 1 on [0, 1] and stay bounded a little above it, so the result's norm is bounded, which is what an optimizer
that promises an update of a given norm needs.

The input must have singular values in [0, 1]. The Frobenius norm would ensure that but is up to sqrt(k) too large;
the Gram matrix A = X X^T, which the first step computes anyway, gives ``sigma_max = ||A||_2^(1/2) <= ||A||_F^(1/2)``,
at most k^(1/4) too large.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_weight, full_precision, matmul_dtype

# Printed by benchmarks/orthogonalize_coefficients.py; tests/caps/test_coefficients.py derives them again.
_QUINTICS = (
    (8.30508515035, -23.6630927795, 16.8755505878),
    (4.10392406599, -2.93196569929, 0.526290503563),
    (3.90081961142, -2.79687377533, 0.511897709456),
    (3.27829948101, -2.36899819888, 0.466608589026),
    (2.29638310091, -1.6197818997, 0.390264888201),
    (1.87636904664, -1.23250336349, 0.356781050468),
    (1.85654637125, -1.21332729568, 0.35678108434),
    (1.85653802098, -1.21334917496, 0.356810547714),
)
_DIVISORS = (
    1.99169573519,
    1.96591912417,
    1.86716502934,
    1.57005883101,
    1.13568774727,
    1.00193480784,
    1.00000121591,
    0.999999794177,
)
MAX_STEPS = len(_QUINTICS)
# bfloat16 rounding overshoots the exact maximum by up to 0.5 % in what was tried (seven steps, small matrices); this
# factor on the last step takes most of it back, so that the bound below has room.
_ROOM = {torch.bfloat16: 0.997, torch.float32: 1.0, torch.float64: 1.0}

#: Bound of the result's spectral norm by the dtype of the products. The exact polynomial stays below 1; the rest is
#: rounding, bounded by test (tests/caps/test_orthogonalize.py), not by proof. Products in TF32 count as bfloat16.
UPDATE_NORM_BOUND = {torch.bfloat16: 1.005, torch.float32: 1.0 + 1e-6, torch.float64: 1.0}


@functools.cache
def schedule(steps: int) -> tuple[tuple[float, float, float], ...]:
    """The quintics (a, b, c), each ``a x + b x^3 + c x^5``; composed they are at most 1 on [0, 1.02]."""
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"orthogonalize has schedules of 1 to {MAX_STEPS} steps, not {steps}: choose one of these")
    a, b, c = (coefficient / _DIVISORS[steps - 1] for coefficient in _QUINTICS[steps - 1])
    return (*_QUINTICS[: steps - 1], (a, b, c))


def orthogonalize(matrix: Tensor, *, steps: int = 5, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Move every singular value towards 1, keeping the singular vectors.

    With five steps, values of at least 1e-3 of the normaliser ``||M M^T||_F^(1/2)`` land in [0.76, 1]; smaller ones
    grow about 880-fold. A zero matrix gives zero.

    Args:
        matrix: (..., m, n), floating point; never changed in place.
        steps: number of quintics, 1 to 8; three matrix products each.
        compute_dtype: dtype of the products; default float64 for float64 input, else ``matmul_dtype`` of the device.

    Returns:
        Tensor of the shape and dtype of ``matrix``, spectral norm at most ``UPDATE_NORM_BOUND[compute_dtype]`` (up to
        the rounding to a 16-bit dtype, if ``matrix`` has one). NaN or infinite entries give NaN.

    Raises:
        ValueError: not a floating-point matrix, or no such schedule or compute dtype.
    """
    check_weight(matrix, "orthogonalize")
    if compute_dtype is None:
        compute_dtype = torch.float64 if matrix.dtype == torch.float64 else matmul_dtype(matrix.device)
    if compute_dtype not in UPDATE_NORM_BOUND:
        raise ValueError(f"orthogonalize cannot compute in {compute_dtype}: use bfloat16, float32 or float64")
    if matrix.numel() == 0:
        return matrix.clone()
    with full_precision(matrix.device):
        is_tall = matrix.shape[-2] > matrix.shape[-1]
        x = matrix.mT if is_tall else matrix
        x = x.reshape(-1, *x.shape[-2:]) if x.ndim > 3 else x
        *first, (a, b, c) = schedule(steps)
        room = _ROOM[compute_dtype]
        y = _compose(x, (*first, (room * a, room * b, room * c)), compute_dtype)
        return (y.mT if is_tall else y).reshape(matrix.shape).to(matrix.dtype)


def _compose(x: Tensor, quintics: tuple[tuple[float, float, float], ...], dtype: torch.dtype) -> Tensor:
    """Apply the quintics to x of shape (k, n) or (s, k, n), k <= n, after normalising it."""
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    precise = x.to(torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32))
    # The largest entry becomes 1, so that the Gram matrix neither overflows nor vanishes.
    precise = precise / _or_one(precise.abs().amax(dim=(-2, -1), keepdim=True))
    y = precise.to(dtype)
    for number, (a, b, c) in enumerate(quintics):
        gram = y @ y.mT
        if number == 0:
            squared_bound = _or_one(torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=precise.dtype))
            gram = (gram / squared_bound).to(dtype)
            y = (precise / squared_bound.sqrt()).to(dtype)  # from the unrounded matrix: one rounding, not two
        y = multiply_add(y, multiply_add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y


def _or_one(divisor: Tensor) -> Tensor:
    """The divisor, 1 where it is zero: a zero matrix stays zero instead of becoming NaN."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
