"""``spectral_power_cap``: a decay that acts on the p-th power of singular values; fewer products, closer to a hard cap.

``x - b x^p`` with ``b = (k - w) / k^p`` takes the reach k to the value w. Its derivative ``1 - p b x^(p - 1)`` is
smallest at k, where it is ``1 - p (k - w) / k``: for ``k <= w p / (p - 1)`` the map is monotone on [0, k], so w is its
maximum and the order of the singular values stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hf_lipschitz.caps.reach import Correction, cap_by_correction

POWERS = (3, 5, 9)  # two, three and four matrix products


def power_cap_limit(power: int) -> float:
    """The largest reach / value at which the map is monotone."""
    return power / (power - 1.0)


def spectral_power_cap(
    weight: Tensor,
    *,
    value: float = 1.0,
    reach: Sequence[float] | None = None,
    power: int = 5,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Map singular values x to ``x - b x^power`` where the norm may exceed ``value``.

    Matrices with a reach of at most ``value`` stay, bit for bit. Beyond ``value power / (power - 1)`` a matrix is first
    scaled down to that.

    Args:
        weight: (..., m, n), floating point.
        value: the cap, in units of the l2 operator norm.
        reach: a bound of each matrix's norm, which is trusted; None computes proved ones.
        power: 3, 5 or 9, for two, three or four matrix products; higher powers spare small singular values more.
        compute_dtype: dtype of the products; None: float64 for float64 weights, else the device's fastest.

    Returns:
        As ``spectral_soft_cap``.

    Raises:
        ValueError: a power that is not offered; see also ``reach.cap_what_exceeds``.
        NonFiniteWeightError: see there.

    Source: the module docstring; ``reach`` for rounding.
    """
    if power not in POWERS:
        raise ValueError(f"spectral_power_cap: power is {power!r}: choose 3, 5 or 9")
    return cap_by_correction(
        weight,
        POWER_CAPS[power],
        cap="spectral_power_cap",
        value=value,
        reach=reach,
        compute_dtype=compute_dtype,
    )


def _polynomial(y_SKN: Tensor, *, power: int) -> Tensor:
    """``(Y Y^T)^((power - 1) / 2) Y``."""
    gram_SKK = y_SKN @ y_SKN.mT
    for _ in range({3: 0, 5: 1, 9: 2}[power]):
        gram_SKK = gram_SKK @ gram_SKK
    return gram_SKK @ y_SKN


def _correction(power: int) -> Correction:
    """``(k - w) (Y Y^T)^((power - 1) / 2) Y`` with ``Y = X / k``."""
    return Correction(
        before=lambda target, reach: 1.0 / reach,
        polynomial=partial(_polynomial, power=power),
        after=lambda target, reach: reach - target,
        limit=power_cap_limit(power),
    )


POWER_CAPS = {power: _correction(power) for power in POWERS}
