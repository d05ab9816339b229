"""``orthogonalize``: the same singular vectors, all singular values near 1, by matrix products alone.

An odd polynomial of a matrix acts on its singular values and leaves the vectors alone. A composition of a few odd
quintics that were optimised together (schedules.py) lifts small singular values to near 1, never exceeds 1 on [0, 1]
and stays bounded a little above it, so the result's norm is bounded, which is what an optimizer that promises an update
of a given norm needs.

The input must have singular values in [0, 1]. The Frobenius norm would ensure that but is up to sqrt(k) too large. The
square of the Gram matrix A = X X^T, which the first step computes anyway, gives ``sigma_max = ||A^2||_2^(1/4) <=
||A^2||_F^(1/4)``, the eighth root of the sum of the eighth powers of the singular values: at most k^(1/8) too large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_weight, full_precision, matmul_dtype
from hf_lipschitz.caps.schedules import Quintic, schedule

# bfloat16 rounding overshoots the exact maximum by up to 0.5 % in what was tried (seven steps, small matrices); this
# factor on the last step takes most of it back, so that the bound below has room.
_ROOM = {torch.bfloat16: 0.997, torch.float32: 1.0, torch.float64: 1.0}

#: Bound of the result's spectral norm by the dtype of the products. The exact polynomial stays below 1; the rest is
#: rounding, bounded by test (tests/caps/test_orthogonalize.py), not by proof. Products in TF32 count as bfloat16.
UPDATE_NORM_BOUND = {torch.bfloat16: 1.005, torch.float32: 1.0 + 1e-6, torch.float64: 1.0}


def orthogonalize(matrix: Tensor, *, steps: int = 4, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Move every singular value towards 1, keeping the singular vectors.

    With four steps, values of at least 0.0042 of the normaliser ``||(M M^T)^2||_F^(1/4)`` land in [0.76, 1] and smaller
    ones grow about 210-fold; with five it is 0.0014, [0.86, 1] and 780-fold. A zero matrix gives zero.

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


def _compose(x: Tensor, quintics: Sequence[Quintic], dtype: torch.dtype) -> Tensor:
    """Apply the quintics to x of shape (k, n) or (s, k, n), k <= n, after normalising it."""
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    precise = x.to(torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32))
    # The largest entry becomes 1, so that the Gram matrix neither overflows nor vanishes.
    peak = torch.maximum(precise.amax(dim=(-2, -1), keepdim=True), -precise.amin(dim=(-2, -1), keepdim=True))
    precise = precise / _or_one(peak)
    y = precise.to(dtype)
    (a, b, c), *rest = quintics
    gram = y @ y.mT
    square = gram @ gram
    size = _or_one(torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True, dtype=precise.dtype).sqrt())
    polynomial = gram * (b / size).to(dtype) + square * (c / size.square()).to(dtype)
    y = (precise / size.sqrt()).to(dtype)  # from the unrounded matrix: one rounding, not two
    y = multiply_add(y, polynomial, y, beta=a)
    for a, b, c in rest:
        gram = y @ y.mT
        y = multiply_add(y, multiply_add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y


def _or_one(divisor: Tensor) -> Tensor:
    """The divisor, 1 where it is zero: a zero matrix stays zero instead of becoming NaN."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
