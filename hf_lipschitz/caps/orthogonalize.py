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
    ones grow about 210-fold; with five it is 0.0014, [0.86, 1] and 780-fold. That is exact arithmetic:
    the first quintic takes some large values to near zero and the next ones lift them again, and there the rounding of
    bfloat16 products can leave a few lower. A zero matrix gives zero.

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
    compute = compute_dtype or update_dtype(matrix)
    if compute not in UPDATE_NORM_BOUND:
        raise ValueError(f"orthogonalize cannot compute in {compute}: use bfloat16, float32 or float64")
    schedule(steps)
    if matrix.numel() == 0:
        return matrix.clone()
    wide = torch.promote_types(torch.promote_types(matrix.dtype, compute), torch.float32)
    work_SMN = matrix.detach().reshape(-1, *matrix.shape[-2:]).to(wide, copy=True)
    return orthogonalize_(work_SMN, steps=steps, compute_dtype=compute).reshape(matrix.shape).to(matrix.dtype)


def update_dtype(matrix: Tensor) -> torch.dtype:
    """The dtype of the products for a matrix, unless another is asked for: float64 for float64, else the fastest."""
    return torch.float64 if matrix.dtype == torch.float64 else matmul_dtype(matrix.device)


def orthogonalize_(work_SMN: Tensor, *, steps: int, compute_dtype: torch.dtype) -> Tensor:
    """``orthogonalize`` for optimizers: a stack that may be overwritten, a result in the dtype of the products.

    Args:
        work_SMN: float32 or float64, not empty; it is scaled in place, because fresh memory for each pass costs as
            much as the pass.
        steps: see ``orthogonalize``.
        compute_dtype: a key of ``UPDATE_NORM_BOUND``, no wider than the stack.

    Returns:
        Tensor of the shape of the stack, in ``compute_dtype``.
    """
    with full_precision(work_SMN.device):
        is_tall = work_SMN.shape[-2] > work_SMN.shape[-1]
        *first, (a, b, c) = schedule(steps)
        room = _ROOM[compute_dtype]
        quintics = (*first, (room * a, room * b, room * c))
        y_SKN = _compose(work_SMN.mT if is_tall else work_SMN, quintics, compute_dtype)
        return y_SKN.mT if is_tall else y_SKN


def _compose(x_SKN: Tensor, quintics: Sequence[Quintic], dtype: torch.dtype) -> Tensor:
    """Apply the quintics after normalising; x is scaled in place, and two buffers take turns."""
    # The largest entry becomes 1, so that the Gram matrix neither overflows nor vanishes.
    peak_S11 = torch.maximum(x_SKN.amax(dim=(-2, -1), keepdim=True), -x_SKN.amin(dim=(-2, -1), keepdim=True))
    x_SKN.div_(_or_one(peak_S11))
    # In order also where x is the transpose of a tall stack: bfloat16 products into transposed memory are not fast.
    y_SKN = torch.empty(x_SKN.shape, dtype=dtype, device=x_SKN.device).copy_(x_SKN)
    (a, b, c), *rest = quintics
    gram_SKK = y_SKN @ y_SKN.mT
    square_SKK = gram_SKK @ gram_SKK
    size_S11 = _or_one(torch.linalg.vector_norm(square_SKK, dim=(-2, -1), keepdim=True, dtype=x_SKN.dtype).sqrt())
    gram_SKK.mul_((b / size_S11).to(dtype)).add_(square_SKK.mul_((c / size_S11.square()).to(dtype)))
    y_SKN.copy_(x_SKN.mul_(size_S11.rsqrt()))  # from the unrounded matrix: one rounding, not two
    y_SKN, other_SKN = torch.baddbmm(y_SKN, gram_SKK, y_SKN, beta=a), y_SKN
    for a, b, c in rest:
        torch.bmm(y_SKN, y_SKN.mT, out=gram_SKK)
        torch.baddbmm(gram_SKK, gram_SKK, gram_SKK, beta=b, alpha=c, out=square_SKK)
        torch.baddbmm(y_SKN, square_SKK, y_SKN, beta=a, out=other_SKN)
        y_SKN, other_SKN = other_SKN, y_SKN
    return y_SKN


def _or_one(divisor: Tensor) -> Tensor:
    """The divisor, 1 where it is zero: a zero matrix stays zero instead of becoming NaN."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
