"""``frobenius_normalize``: a matrix whose Frobenius norm exceeds the cap is scaled down; others stay, bit for bit.

The cheapest cap: no product and no eigenvalue. The spectral norm is at most the Frobenius norm, so it is capped too,
though up to sqrt(k) lower than it needs to be, k the shorter side.
"""

from __future__ import annotations

from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_value, check_weight, full_precision, peaks, stacked
from hf_lipschitz.caps.row_normalize import row_normalize


def frobenius_normalize(weight: Tensor, *, value: float = 1.0) -> Tensor:
    """Divide each matrix by ``max(1, ||W||_F / value)``.

    Args:
        weight: (..., m, n), floating point.
        value: the cap of the Frobenius norm, and so of the l2 operator norm.

    Returns:
        Tensor of the shape and dtype of ``weight``; the proved norm of each stored matrix is at most ``value``.

    Raises:
        ValueError: not a floating-point matrix, or ``value`` not positive and finite.
        NonFiniteWeightError: an entry is NaN or infinite.

    Source: frobenius_norms; rounding is covered by measuring what is stored, see row_normalize: the Frobenius norm is
    the length of the one row that holds all entries.
    """
    check_weight(weight, "frobenius_normalize")
    check_value(value, weight.dtype, "frobenius_normalize")
    if weight.numel() == 0:
        return weight.clone()
    with full_precision(weight.device):
        stack_SMN = stacked(weight)
        peaks(stack_SMN, "frobenius_normalize")
        return row_normalize(stack_SMN.flatten(-2)[:, None], value=value).reshape(weight.shape)
