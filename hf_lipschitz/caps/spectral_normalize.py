"""``spectral_normalize``: a matrix whose norm exceeds the cap is scaled down to it; others stay, bit for bit.

It divides by a *proved* bound of the largest singular value. Power iteration, the usual choice, yields a lower bound,
with which the cap is exceeded.
"""

from __future__ import annotations

from torch import Tensor

from hf_lipschitz.caps.arithmetic import check_value, check_weight, float64, full_precision, peaks, stacked
from hf_lipschitz.caps.storage import store_within
from hf_lipschitz.caps.verified_norms import spectral_norms


def spectral_normalize(weight: Tensor, *, value: float = 1.0) -> Tensor:
    """Map singular values s to ``s / max(1, s_max / value)``, per matrix.

    Args:
        weight: (..., m, n), floating point.
        value: the cap, in units of the l2 operator norm.

    Returns:
        Tensor of the shape and dtype of ``weight``; the proved norm of each stored matrix is at most ``value``. A
        scaled matrix ends about 1e-6 below the cap in float32 and up to 0.1 % below in 16-bit dtypes.

    Raises:
        ValueError: not a floating-point matrix, or ``value`` not positive and finite.
        NonFiniteWeightError: an entry is NaN or infinite.

    Source: bounds/spectral.py for the norm, storage_slack for rounding.
    """
    check_weight(weight, "spectral_normalize")
    check_value(value, weight.dtype, "spectral_normalize")
    if weight.numel() == 0:
        return weight.clone()
    with full_precision(weight.device):
        result_SMN = stacked(weight).clone()
        peaks(result_SMN, "spectral_normalize")
        norms = spectral_norms(result_SMN)
        above = [index for index, norm in enumerate(norms) if norm > value]
        if above:
            stored = store_within(float64(result_SMN[above]), [norms[index] for index in above], value, weight.dtype)
            result_SMN[above] = stored.to(weight.device)
        return result_SMN.reshape(weight.shape)
