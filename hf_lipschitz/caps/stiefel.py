"""``stiefel``: every singular value becomes the cap, by cubic Newton-Schulz steps.

One step is ``X - E X / 2`` with E = X X^T - I, which maps singular values by p(s) = (3 s - s^3) / 2. p has its
maximum, 1, at s = 1, and |p| <= 1 on [0, 2]: a step never overshoots, and near 1 it squares the error, |1 - p(s)| <=
1.5 (1 - s)^2 + ... So the steps run in float32 until one more suffices, and
that last one runs in float64, whose exact result has a norm of at most 1 *whatever* the earlier ones did (their
rounding, TF32, too few steps), as long as they left the norm below 2, which is checked. What remains to cover is the
rounding of storing (storage.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_value, check_weight, float64, full_precision, peaks, stacked
from hf_lipschitz.caps.orthogonalize import orthogonalize
from hf_lipschitz.caps.storage import store_within
from hf_lipschitz.caps.verified_norms import spectral_norms

_MAX_STEPS = 12  # from s = 0.005 to 1; a matrix that needs more has values that are zero for float32
_LAST_STEP = {torch.float32: 1e-3, torch.float64: 1e-7}  # ||E||_2 from which one step lands within 4e-7 (4e-15) of 1
_NEAR = 0.95  # ||E||_2 up to which the cubic steps alone converge within _MAX_STEPS
_UNSAFE = 3.0 - 1e-6  # ||E||_F below this proves singular values below 2


def stiefel(weight: Tensor, *, value: float = 1.0, slack: float | None = None) -> Tensor:
    """Set every singular value to ``value`` (less a few 1e-6); the singular vectors stay.

    Singular values below about 1e-5 of the largest are only lifted, zero stays zero; the norm is at most ``value``
    for every finite input.

    Args:
        weight: (..., m, n), floating point.
        value: the common singular value, in units of the l2 operator norm.
        slack: aim at ``value * (1 - slack)``; None aims just low enough for the rounding of the stored dtype, about
            1e-6 at 256 x 256 in float32 and 0.1 to 0.3 % in 16-bit dtypes (found by verifying the stored tensor).

    Returns:
        Tensor of the shape and dtype of ``weight``; the proved norm of each stored matrix is at most ``value``.

    Raises:
        ValueError: not a floating-point matrix, ``value`` not positive and finite, ``slack`` not in [0, 1).
        NonFiniteWeightError: an entry is NaN or infinite.

    Source: the module docstring; storage_slack for rounding.
    """
    check_weight(weight, "stiefel")
    check_value(value, weight.dtype, "stiefel")
    if slack is not None and not 0.0 <= slack < 1.0:
        raise ValueError(
            f"stiefel: slack is a fraction in [0, 1), not {slack!r}: leave it out for the smallest safe one"
        )
    if weight.numel() == 0:
        return weight.clone()
    aim = value * (1.0 - (slack or 0.0))
    with full_precision(weight.device):
        is_tall = weight.shape[-2] > weight.shape[-1]
        stack_SKN = stacked(weight.mT if is_tall else weight)
        exact_SKN = _last_step(_near_orthonormal(_to_unit_size(stack_SKN, value)))
        stored_SKN = store_within(exact_SKN, [1.0] * len(exact_SKN), aim, weight.dtype).to(weight.device)
        return (stored_SKN.mT if is_tall else stored_SKN).reshape(weight.shape)


def _to_unit_size(stack_SKN: Tensor, value: float) -> Tensor:
    """Divide by the value, or by the largest entry where that is more than orthonormal rows can have."""
    work = torch.promote_types(stack_SKN.dtype, torch.float32)
    sizes = [max(peak if peak > 2.0 * value else value, torch.finfo(work).tiny) for peak in peaks(stack_SKN, "stiefel")]
    return stack_SKN.to(work) / torch.tensor(sizes, dtype=work, device=stack_SKN.device)[:, None, None]


def _near_orthonormal(x_SKN: Tensor) -> Tensor:
    """Bring ``||E||_2`` near _LAST_STEP where the rank allows it.

    Not in bfloat16, though that would converge as well: its rounding turns the singular vectors, for good.
    """
    enough = _LAST_STEP[x_SKN.dtype]
    error_SKK = _error(x_SKN)
    far = [index for index, size in enumerate(_largest_eigenvalues(error_SKK)) if not size <= _NEAR]
    if far:
        x_SKN = x_SKN.index_copy(
            0, torch.tensor(far, device=x_SKN.device), orthogonalize(x_SKN[far], steps=5, compute_dtype=x_SKN.dtype)
        )
        error_SKK = _error(x_SKN)
    for _ in range(_MAX_STEPS):
        size = max(_largest_eigenvalues(error_SKK))
        if size <= enough:
            break
        x_SKN = torch.baddbmm(x_SKN, error_SKK, x_SKN, alpha=-0.5)
        if size * size <= enough:  # an error e becomes 0.75 e^2: no need to measure that again
            break
        error_SKK = _error(x_SKN)
    return x_SKN


def _last_step(x_SKN: Tensor) -> Tensor:
    """One cubic step in float64: singular values at most 1, up to the relative error that storage_slack covers.

    With ||x|| <= 2: the Gram's error gamma_n ||x||_F^2 <= 4 n k u enters times ||x|| / 2, the product's is below
    gamma_k ||E||_F ||x||_F / 2 <= 3 k^1.5 u; together below 8 n k u.
    """
    x_SKN = float64(x_SKN)
    error_SKK = _error(x_SKN)
    residuals = torch.linalg.matrix_norm(error_SKK).tolist()
    unsafe = [index for index, residual in enumerate(residuals) if not residual <= _UNSAFE]
    if unsafe:  # rank-deficient: ||E||_F counts the zeros, so only the verified norm can tell
        x_SKN = x_SKN.clone()
        norms = torch.tensor(spectral_norms(x_SKN[unsafe]), dtype=x_SKN.dtype, device=x_SKN.device)
        x_SKN[unsafe] = x_SKN[unsafe] / norms.clamp(min=1.0)[:, None, None]
        error_SKK = _error(x_SKN)
    return torch.baddbmm(x_SKN, error_SKK, x_SKN, alpha=-0.5)


def _error(x_SKN: Tensor) -> Tensor:
    """E = X X^T - I."""
    gram_SKK = x_SKN @ x_SKN.mT
    gram_SKK.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return gram_SKK


def _largest_eigenvalues(error_SKK: Tensor) -> list[float]:
    """Estimates of ||E||_2 from below, by power iteration from each matrix's longest column.

    They only decide how many steps are run; the norm of the result is bounded without them.
    """
    longest = torch.linalg.vector_norm(error_SKK, dim=-2).argmax(dim=-1)
    vector_SK1 = torch.take_along_dim(error_SKK, longest[:, None, None], dim=-1)
    for _ in range(3):
        length = torch.linalg.vector_norm(vector_SK1, dim=-2, keepdim=True)
        vector_SK1 = error_SKK @ (vector_SK1 / torch.where(length > 0.0, length, torch.ones_like(length)))
    sizes: list[float] = torch.linalg.vector_norm(vector_SK1, dim=(-2, -1)).tolist()
    return sizes
