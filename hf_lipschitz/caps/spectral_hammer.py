"""``spectral_hammer``: only the largest singular value moves, to the cap, by a change of rank one.

It hits the nail that sticks out. It is no bound: the second singular value may exceed the cap as well, and then it is
the norm. What it keeps is every other direction.
"""

from __future__ import annotations

from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_value, check_weight, full_precision, peaks, stacked
from hf_lipschitz.caps.leading_direction import move_leading_value


def spectral_hammer(weight: Tensor, *, value: float = 1.0) -> Tensor:
    """Set the largest singular value to ``value``, from above or from below; the others and the vectors stay.

    Promised: for the unit vector u that the iteration found, ``u^T W`` has length ``value`` afterwards, up to the
    rounding of the stored entries. Not promised: a norm of at most ``value``. caps/leading_direction.py says when u is
    the leading singular vector; of several equal largest singular values one moves. A zero matrix stays zero.

    Args:
        weight: (..., m, n), floating point.
        value: the new largest singular value, in units of the l2 operator norm.

    Returns:
        Tensor of the shape and dtype of ``weight``. Entries that the dtype cannot hold (float16) become its largest.

    Raises:
        ValueError: not a floating-point matrix, or ``value`` not positive and finite.
        NonFiniteWeightError: an entry is NaN or infinite.

    Source: with v = W^T u / s, s = ||W^T u||, ``u^T (W + (value - s) u v^T) = value v^T``.
    """
    check_weight(weight, "spectral_hammer")
    check_value(value, weight.dtype, "spectral_hammer")
    if weight.numel() == 0:
        return weight.clone()
    with full_precision(weight.device):
        peaks(stacked(weight), "spectral_hammer")
        return move_leading_value(weight, 0.0, value)
