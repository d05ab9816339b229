"""``row_normalize``: rows longer than the cap are shortened to it; others stay as they are, bit for bit.

The cap of classifier heads: class scores of unit rows differ by at most ``||w_i - w_j||`` times the feature's change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_value, check_weight, float64, full_precision, peaks, stacked
from hf_lipschitz.caps.verified_norms import row_norms

_ATTEMPTS = 64  # the shrinking doubles until nothing is left of a row, so far fewer suffice


def row_normalize(weight: Tensor, *, value: float = 1.0) -> Tensor:
    """Divide each row by ``max(1, ||row|| / value)``.

    Args:
        weight: (..., m, n), floating point.
        value: the cap of each row's Euclidean norm.

    Returns:
        Tensor of the shape and dtype of ``weight``; the proved norm of each stored row is at most ``value``.

    Raises:
        ValueError: not a floating-point matrix, or ``value`` not positive and finite.
        NonFiniteWeightError: an entry is NaN or infinite.

    Source: row_norms; rounding is covered by measuring the stored rows, and shrinking those that rounding made too
    long.
    """
    check_weight(weight, "row_normalize")
    check_value(value, weight.dtype, "row_normalize")
    if weight.numel() == 0:
        return weight.clone()
    with full_precision(weight.device):
        peaks(stacked(weight), "row_normalize")
        exact = float64(weight)
        factors = torch.ones(exact.shape[:-1], dtype=exact.dtype, device=exact.device)
        stored, shrink = exact.to(weight.dtype), torch.finfo(weight.dtype).eps / 16
        for _ in range(_ATTEMPTS):
            norms = row_norms(stored)
            too_long = norms > value
            if not too_long.any():
                break
            factors = torch.where(too_long, factors * (value / norms) * max(0.0, 1.0 - shrink), factors)
            stored, shrink = (exact * factors[..., None]).to(weight.dtype), 2.0 * shrink
        return stored.to(weight.device)
