"""Caps that start from a *reach*: a bound of a matrix's norm that is known already, such as after an optimizer's step.

Such a cap changes W by a correction C, a polynomial of W with ``||C|| <= reach - target``, and stores ``W - C``. Only C
is computed by fast matrix products, whose rounding is thus relative to a correction of the size of the step, not to W:
with ``e`` the products' relative error, the result's norm is at most ``target + e (reach - target)``. The target is
chosen so that this, and the rounding of the stored numbers, stays within the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import (
    check_value,
    check_weight,
    float64,
    full_precision,
    matmul_dtype,
    peaks,
    stacked,
)
from hf_lipschitz.caps.storage import storage_slack, store_strictly, stores_without_check
from hf_lipschitz.caps.verified_norms import spectral_norms

#: Relative error of a correction, ``||computed - exact|| <= e (reach - target)``, by the dtype of its products.
#: Bounded by test (tests/caps/test_reach.py), not by proof.
PRODUCT_ERROR = {torch.bfloat16: 0.08, torch.float32: 1e-4, torch.float64: 1e-10}

_SMALL_FACTOR = 1e-6


@dataclass(frozen=True)
class Correction:
    """What a cap subtracts: ``after * polynomial(before * X)``, with factors that depend on where a matrix is to go.

    Attributes:
        before: ``before(target, reach)``, so that ``before * X`` has a norm of at most 1.
        polynomial: from a stack with K <= N, in the dtype of the products, to one of the same shape.
        after: ``after(target, reach)``.
        limit: the largest reach / target that it can repair.
    """

    before: Callable[[float, float], float]
    polynomial: Callable[[Tensor], Tensor]
    after: Callable[[float, float], float]
    limit: float


@dataclass(frozen=True)
class Aims:
    """Where matrices of given reaches go, so that rounding included they end within a value.

    Attributes:
        widest: the reach beyond which a matrix is scaled down first.
        before, after: the correction's factors, one for each matrix.
    """

    widest: float
    before: list[float]
    after: list[float]


def aims_of(
    correction: Correction, reaches: Sequence[float], value: float, size: tuple[int, int], compute: torch.dtype
) -> Aims:
    """The factors for matrices of one size, ``size = (K, N)``, whose products are computed in ``compute``."""
    error, aim = PRODUCT_ERROR[compute], value * (1.0 - storage_slack(*size))
    # r <= limit t with t = (aim - e r) / (1 - e), solved for r
    widest = correction.limit * aim / (1.0 + error * (correction.limit - 1.0)) * (1.0 - 1e-9)
    pairs = [(target_of(aim, min(bound, widest), error), min(bound, widest)) for bound in reaches]
    return Aims(widest, [correction.before(*pair) for pair in pairs], [correction.after(*pair) for pair in pairs])


def cap_by_correction(
    weight: Tensor,
    correction: Correction,
    *,
    cap: str,
    value: float,
    reach: Sequence[float] | None,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """Cap by subtracting a correction; what reaches beyond the correction's limit is scaled down to it first.

    Args:
        weight: (..., m, n), floating point.
        correction: see ``Correction``.
        cap: its name, for messages.
        value: the cap, in units of the l2 operator norm.
        reach: see ``cap_what_exceeds``.
        compute_dtype: of the products; None: float64 for float64 weights, else ``matmul_dtype`` of the device.

    Returns:
        As ``cap_what_exceeds``.

    Raises:
        ValueError: a compute dtype without a stated error; see also ``cap_what_exceeds``.
        NonFiniteWeightError: see there.
    """
    compute = compute_dtype or (torch.float64 if weight.dtype == torch.float64 else matmul_dtype(weight.device))
    if compute not in PRODUCT_ERROR:
        raise ValueError(f"{cap} cannot compute in {compute}: use bfloat16, float32 or float64")

    def transform(x_SKN: Tensor, reaches: list[float]) -> Tensor:
        aims = aims_of(correction, reaches, value, (x_SKN.shape[-2], x_SKN.shape[-1]), compute)
        if max(reaches) > aims.widest:
            x_SKN = scaled(x_SKN, [min(1.0, aims.widest / bound) for bound in reaches])
        raw_SKN = correction.polynomial((x_SKN * per_matrix(aims.before, x_SKN)).to(compute).contiguous())
        return x_SKN - raw_SKN.to(x_SKN.dtype) * per_matrix(aims.after, x_SKN)

    return cap_what_exceeds(weight, transform, cap=cap, value=value, reach=reach)


def correct_(
    matrices: Sequence[Tensor], work_SMN: Tensor, correction: Correction, *, value: float, reach: Sequence[float]
) -> bool:
    """``cap_by_correction`` for optimizers: float32 matrices of one shape, corrected in place without copies of them.

    Args:
        matrices: S matrices (m, n), views of parameters; all of them are corrected.
        work_SMN: float32 memory, which is overwritten.
        correction: see ``Correction``.
        value: the cap; each norm is at most that afterwards.
        reach: a bound of each norm, which is trusted.

    Returns:
        False, with nothing changed, where a matrix must be scaled down first or values meet subnormal numbers:
        ``cap_by_correction`` does that.
    """
    rows, columns = work_SMN.shape[-2:]
    is_tall, compute = rows > columns, matmul_dtype(work_SMN.device)
    aims = aims_of(correction, reach, value, (min(rows, columns), max(rows, columns)), compute)
    if max(reach) > aims.widest or not stores_without_check(work_SMN.dtype, value):
        return False
    with full_precision(work_SMN.device):
        torch.stack(list(matrices), out=work_SMN)
        x_SKN = work_SMN.mT if is_tall else work_SMN
        x_SKN.mul_(per_matrix(aims.before, x_SKN))
        y_SKN = torch.empty(x_SKN.shape, dtype=compute, device=x_SKN.device).copy_(x_SKN)  # in order, see orthogonalize
        raw_SKN = correction.polynomial(y_SKN)
        for matrix, raw, after in zip(matrices, raw_SKN.mT if is_tall else raw_SKN, aims.after, strict=True):
            matrix.add_(raw, alpha=-after)
    return True


def target_of(aim: float, reach: float, error: float) -> float:
    """The t with ``t + error (reach - t) = aim``; the aim itself where the reach is below it."""
    return (aim - error * max(reach, aim)) / (1.0 - error)


def cap_what_exceeds(
    weight: Tensor,
    transform: Callable[[Tensor, list[float]], Tensor],
    *,
    cap: str,
    value: float,
    reach: Sequence[float] | None,
) -> Tensor:
    """Transform the matrices whose reach exceeds ``value``; the others stay, bit for bit.

    Args:
        weight: (..., m, n), floating point.
        transform: ``transform(x_SKN, reaches)``: matrices with K <= N, in float32 where the result is stored without a
            check, else in float64; its result, in that dtype, has norms of at most ``value (1 - storage_slack(K, N))``.
        cap: its name, for messages.
        value: the cap, in units of the l2 operator norm.
        reach: a bound of each matrix's norm, which is trusted; None computes proved ones, by an eigenvalue
            decomposition each.

    Returns:
        Tensor of the shape and dtype of ``weight``; each stored matrix has a norm of at most ``value``. Other dtypes
        than float32, and values that may meet subnormal numbers, are verified on what is stored.

    Raises:
        ValueError: not a floating-point matrix, a value that is no norm, or a reach that is not one number for each.
        NonFiniteWeightError: an entry is NaN or infinite, where no reach is given.
    """
    check_weight(weight, cap)
    check_value(value, weight.dtype, cap)
    if weight.numel() == 0:
        return weight.clone()
    with full_precision(weight.device):
        stack_SMN = stacked(weight)
        reaches = _reaches(stack_SMN, reach, cap)
        above = [index for index, bound in enumerate(reaches) if bound > value]
        if not above:
            return weight.clone()
        is_whole, is_tall = len(above) == len(stack_SMN), weight.shape[-2] > weight.shape[-1]
        chosen_SMN = stack_SMN if is_whole else stack_SMN[above]
        is_free = stores_without_check(weight.dtype, value)
        x_SKN = chosen_SMN.mT if is_tall else chosen_SMN
        capped_SKN = transform(x_SKN if is_free else float64(x_SKN), [reaches[index] for index in above])
        if not is_free:
            capped_SKN = torch.stack([store_strictly(matrix, 1.0, value, weight.dtype) for matrix in capped_SKN])
        capped_SMN = capped_SKN.mT if is_tall else capped_SKN
        if is_whole:
            return capped_SMN.to(weight.device).reshape(weight.shape)
        result_SMN = stack_SMN.clone()
        result_SMN[above] = capped_SMN.to(weight.device)
        return result_SMN.reshape(weight.shape)


def per_matrix(numbers: Sequence[float], like: Tensor) -> Tensor:
    """A number for each matrix of a stack, to multiply it with: (S, 1, 1)."""
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None, None]


def _reaches(stack_SMN: Tensor, reach: Sequence[float] | None, cap: str) -> list[float]:
    if reach is None:
        peaks(stack_SMN, cap)
        return spectral_norms(stack_SMN)
    if len(reach) != len(stack_SMN) or not all(0.0 <= bound < math.inf for bound in reach):
        raise ValueError(
            f"{cap}: reach is {list(reach)!r}: give a finite bound of the norm of each of the {len(stack_SMN)} matrices"
        )
    return [float(bound) for bound in reach]


def scaled(x_SKN: Tensor, factors: Sequence[float]) -> Tensor:
    """Multiply each matrix by its factor; in float64 where one is so small that float32 would lose digits of it."""
    if min(factors) >= _SMALL_FACTOR:
        return x_SKN * per_matrix(factors, x_SKN)
    wide = float64(x_SKN)
    return (wide * per_matrix(factors, wide)).to(x_SKN)
