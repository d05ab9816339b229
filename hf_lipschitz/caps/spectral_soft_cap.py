"""``spectral_soft_cap``: large singular values are lowered, small ones hardly; four matrix products.

The map is that of "Training Transformers with Enforced Lipschitz Constants": ``x - a x^3``, then ``y + a y^3``, which
together are ``x g(a x^2)`` with ``g(t) = 1 - 3 t^2 + 3 t^3 - t^4``: to leading order a decay with the fifth power of a
singular value. Its strength a is solved here from the reach k, a bound of the norm before capping (``W (1 - lr
weight_decay)`` plus ``lr`` times the update's norm), as the smallest with ``max over [0, k] of x g(a x^2) <= w``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lipschitz.caps.reach import Correction, cap_by_correction

LIMIT = 81.0 / 31.0  # reach / value beyond which no strength exists
_FIRST_REGIME = 81.0 / 62.0
_NEWTON_STEPS = 60  # it converges quadratically from 1/3, except at the double root 0, where it halves the distance


def soft_cap_strength(value: float, reach: float) -> float:
    """The smallest a >= 0 with ``|x g(a x^2)| <= value`` for all x in [0, reach].

    With t = a x^2, ``x g(t)`` is proportional to ``sqrt(t) g(t)``, whose derivative has the sign of ``1 - 15 t^2 +
    21 t^3 - 9 t^4``: positive below t = 1/3, where it vanishes, so sqrt(t) g(t) rises up to t = 1/3 and g(1/3) = 62/81.

    - reach <= value: 0.
    - reach <= 81/62 value: the maximum is at the end, t(reach) <= 1/3; ``g(t) = value / reach`` is solved by Newton
      from 1/3. ``1 - g`` is convex on [0, 1/3] (its second derivative is 6 - 18 t + 12 t^2 = 6 (1 - t)(1 - 2 t)), so
      every iterate is at or above the root: feasible.
    - reach <= 81/31 value: the maximum is inside, ``62/81 / sqrt(3 a) = value``, so ``a = 3844 / (19683 value^2)``.
      Here the largest values are mapped below smaller ones, past ``t = 1`` with the sign turned.
    - beyond, ``|x g|`` at the end exceeds the value for this a, and every larger one.

    Raises:
        ValueError: no strength exists, or a number is not positive.
    """
    if not (value > 0.0 and reach >= 0.0):
        raise ValueError(f"soft_cap_strength: value {value!r} and reach {reach!r} must be positive numbers")
    if reach <= value:
        return 0.0
    ratio = value / reach
    if ratio < 1.0 / LIMIT:
        raise ValueError(
            f"no soft cap brings a norm of {reach:g} down to {value:g}, more than {LIMIT:.3f} times less: lower the "
            "learning rate, or normalise or hard-cap the matrix first"
        )
    if ratio < 1.0 / _FIRST_REGIME:
        return 3844.0 / (19683.0 * value * value)
    t = 1.0 / 3.0
    for _ in range(_NEWTON_STEPS):
        excess = t * t * (3.0 - 3.0 * t + t * t) - (1.0 - ratio)
        step = excess / (t * (6.0 - 9.0 * t + 4.0 * t * t))
        if not step > 1e-17:
            break
        t -= step
    return t * (1.0 + 1e-14) / (reach * reach)


def spectral_soft_cap(
    weight: Tensor,
    *,
    value: float = 1.0,
    reach: Sequence[float] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Map singular values x to ``x (1 - 3 t^2 + 3 t^3 - t^4)``, t = a x^2, where the norm may exceed ``value``.

    Matrices with a reach of at most ``value`` stay, bit for bit. Beyond ``81/31 value`` no strength a exists, and a
    matrix is first scaled down to that.

    Args:
        weight: (..., m, n), floating point.
        value: the cap, in units of the l2 operator norm.
        reach: a bound of each matrix's norm, which is trusted (a tracked bound, for instance); None computes proved
            ones, by an eigenvalue decomposition each.
        compute_dtype: dtype of the products; None: float64 for float64 weights, else the device's fastest.

    Returns:
        Tensor of the shape and dtype of ``weight``, norms at most ``value``: float32 by the stated error of the
        products (``reach.PRODUCT_ERROR``), other dtypes verified on what is stored. It aims low by that error, 8 % of
        the correction in bfloat16.

    Raises:
        ValueError, NonFiniteWeightError: see ``reach.cap_what_exceeds``.

    Source: ``soft_cap_strength``; ``reach`` for rounding.
    """
    return cap_by_correction(
        weight,
        SOFT_CAP,
        cap="spectral_soft_cap",
        value=value,
        reach=reach,
        compute_dtype=compute_dtype,
    )


def _polynomial(y_SKN: Tensor) -> Tensor:
    """``(3 T^2 - 3 T^3 + T^4) Y`` with ``T = Y Y^T``, for ``Y = sqrt(a) X``."""
    t_SKK = y_SKN @ y_SKN.mT
    square_SKK = t_SKK @ t_SKK
    torch.baddbmm(square_SKK, square_SKK, square_SKK - 3.0 * t_SKK, beta=3.0, out=t_SKK)
    return t_SKK @ y_SKN


SOFT_CAP = Correction(
    before=lambda target, reach: soft_cap_strength(target, reach) ** 0.5,
    polynomial=_polynomial,
    after=lambda target, reach: soft_cap_strength(target, reach) ** -0.5,
    limit=LIMIT,
)
