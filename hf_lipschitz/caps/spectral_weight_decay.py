"""``spectral_weight_decay``: weight decay of the largest singular value alone, by a change of rank one.

It has no cap, so it is not in the table of caps; a norm that an optimizer raises by u a step settles near u / rate.
"""

from __future__ import annotations

from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_weight, full_precision, peaks, stacked
from hf_lipschitz.caps.leading_direction import move_leading_value


def spectral_weight_decay(weight: Tensor, *, rate: float) -> Tensor:
    """Multiply the largest singular value by ``1 - rate``; the others and the vectors stay.

    Args:
        weight: (..., m, n), floating point.
        rate: the share that is taken away, in [0, 1]; 0 changes nothing.

    Returns:
        Tensor of the shape and dtype of ``weight``. For the unit vector u that the iteration found, ``u^T W`` is
        ``1 - rate`` times what it was, up to rounding; caps/leading_direction.py says when u is the leading singular
        vector. Of several equal largest singular values one decays.

    Raises:
        ValueError: not a floating-point matrix, or ``rate`` not in [0, 1].
        NonFiniteWeightError: an entry is NaN or infinite.

    Source: ``u^T (W - rate u u^T W) = (1 - rate) u^T W``.
    """
    check_weight(weight, "spectral_weight_decay")
    if not (isinstance(rate, int | float) and 0.0 <= rate <= 1.0):
        raise ValueError(
            f"spectral_weight_decay: the rate is a fraction in [0, 1], not {rate!r}: give one, such as 0.1"
        )
    with full_precision(weight.device):
        if weight.numel():
            peaks(stacked(weight), "spectral_weight_decay")
        return move_leading_value(weight, 1.0 - rate, 0.0) if rate and weight.numel() else weight.clone()
