"""``decay``: scale a matrix by value / reach; no matrix product at all.

With Muon, whose update has a known norm u, the reach after a step is ``w + lr u`` for a matrix that was at its cap w,
and the scaling is a decoupled weight decay of ``u / (w + lr u)``, so the norm stays within w for ever. It lowers
*every* singular value in each step, which is what the other caps avoid: with random updates most of the spectrum ends
far below the cap. Without a reach it scales by a proved norm, as ``spectral_normalize`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_lipschitz.caps.reach import cap_what_exceeds, scaled
from hf_lipschitz.caps.storage import storage_slack


def decay(weight: Tensor, *, value: float = 1.0, reach: Sequence[float] | None = None) -> Tensor:
    """Map singular values x to ``x value / max(value, reach)``.

    Args:
        weight: (..., m, n), floating point.
        value: the cap, in units of the l2 operator norm.
        reach: a bound of each matrix's norm, which is trusted; None computes proved ones.

    Returns:
        Tensor of the shape and dtype of ``weight``, norms at most ``value``, the rounding of the stored numbers
        included: float32 aims about 1e-6 low, other dtypes are verified on what is stored.

    Raises:
        ValueError, NonFiniteWeightError: see ``reach.cap_what_exceeds``.

    Source: the norm is homogeneous; ``reach`` for rounding.
    """

    def transform(x_SKN: Tensor, reaches: list[float]) -> Tensor:
        aim = value * (1.0 - storage_slack(*x_SKN.shape[-2:]))
        return scaled(x_SKN, [aim / bound for bound in reaches])

    return cap_what_exceeds(weight, transform, cap="decay", value=value, reach=reach)
