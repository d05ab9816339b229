"""``clip``: every entry into an interval around zero; for scalars and vectors such as temperatures and step sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import FLOAT_DTYPES, check_value, full_precision, peaks, stacked

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def clip(weight: Tensor, *, value: float = 1.0) -> Tensor:
    """Map each entry w to ``min(max(w, -value), value)``.

    Args:
        weight: a floating-point tensor of any shape, scalars included.
        value: the largest magnitude allowed.

    Returns:
        Tensor of the shape and dtype of ``weight``. Entries within the interval stay bit for bit, others become the
        largest number of the dtype that is at most ``value``, or its negative.

    Raises:
        ValueError: not a floating-point tensor, or ``value`` not positive and finite.
        NonFiniteWeightError: an entry is NaN or infinite; of tensors of up to two dimensions, matrix 0 holds it.

    Source: the definition; the number to clip at is computed exactly.
    """
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"clip needs a floating-point tensor, this one is {weight.dtype} of shape {tuple(weight.shape)}: route it "
            "to another rule"
        )
    check_value(value, weight.dtype, "clip")
    if weight.numel() == 0:
        return weight.clone()
    with full_precision(weight.device):
        peaks(stacked(torch.atleast_2d(weight)), "clip")
        largest = _at_most(value, weight.dtype).to(weight.device)
        return weight.clamp(-largest, largest)


def _at_most(value: float, dtype: torch.dtype) -> Tensor:
    """The largest number of the dtype that is at most ``value``, as a scalar tensor."""
    nearest = torch.tensor(value, dtype=dtype)
    if nearest.item() <= value:
        return nearest
    return (nearest.view(_BITS[dtype]) - 1).view(dtype)  # positive floats are ordered as their bits are
