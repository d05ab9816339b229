"""Proved upper bounds of the norms of stored tensors, for caps and for monitoring: never power iteration.

A norm kind is a row of ``NORMS``: a function from a weight to a bound that holds for the stored numbers exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.spectral import spectral_norm_upper
from hf_lipschitz.caps.arithmetic import float64, stacked

_U64 = 2.0**-53


def spectral_norms(weight: Tensor) -> list[float]:
    """A proved bound of the spectral norm of each matrix of a weight of shape (..., m, n), in float64 on the CPU.

    Raises:
        KernelError: an entry is NaN or infinite.
    """
    return [spectral_norm_upper(matrix).value for matrix in to_numpy(stacked(weight))]


def row_norms(weight: Tensor) -> Tensor:
    """Proved bounds of the Euclidean norms of the rows: (..., m, n) to (..., m), float64.

    Rows are divided by their largest entry p, so that squares stay in range; the sum of n squares of quotients, each
    with relative error 3u, has relative error below (n + 4) u, and the root, the product and the inflation itself are
    inside 1 + (n + 16) u. Entries that vanish in the division lose at most n 2^-1074 p, far inside that.
    """
    rows = float64(weight)
    peak = rows.abs().amax(dim=-1)
    unit = rows / torch.where(peak > 0, peak, torch.ones_like(peak))[..., None]
    return unit.square().sum(dim=-1).sqrt() * peak * (1.0 + (weight.shape[-1] + 16) * _U64)


def frobenius_norms(weight: Tensor) -> Tensor:
    """Proved bounds of the Frobenius norms of matrices: (..., m, n) to (...), float64.

    ``row_norms`` of all m n entries as one row, so with a relative excess of at most (m n + 16) 2^-52.

    Raises:
        KernelError: an entry is NaN or infinite.
    """
    _check_finite(weight, "Frobenius norm")
    return row_norms(weight.flatten(-2))


def largest_magnitude(weight: Tensor) -> float:
    """The largest absolute value of a tensor of any shape, exactly; 0 for an empty one.

    Raises:
        KernelError: an entry is NaN or infinite.
    """
    _check_finite(weight, "largest magnitude")
    return float(weight.detach().abs().max()) if weight.numel() else 0.0


def _check_finite(weight: Tensor, norm: str) -> None:
    if not torch.isfinite(weight).all():
        raise KernelError(f"a tensor contains NaN or infinite entries: it has no {norm}")


def split_heads(weight: Tensor, heads: int) -> Tensor:
    """The row blocks of the heads: (m, n) to (heads, m / heads, n), a view where the weight allows one.

    Raises:
        ValueError: the rows do not divide into that many heads.
    """
    if weight.ndim != 2 or weight.shape[0] % heads:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not divide into {heads} heads of equal rows")
    return weight.reshape(heads, weight.shape[0] // heads, weight.shape[1])


def _spectral(weight: Tensor, heads: int | None) -> float:
    return max(spectral_norms(weight), default=0.0)


def _row(weight: Tensor, heads: int | None) -> float:
    return float(row_norms(weight).max()) if weight.numel() else 0.0


def _per_head(weight: Tensor, heads: int | None) -> float:
    return max(spectral_norms(split_heads(weight, heads or 1)))


def _frobenius(weight: Tensor, heads: int | None) -> float:
    return float(frobenius_norms(weight).max()) if weight.numel() else 0.0


def _interval(weight: Tensor, heads: int | None) -> float:
    return largest_magnitude(weight)


NORMS: dict[str, Callable[[Tensor, int | None], float]] = {
    "spectral": _spectral,
    "row": _row,
    "per_head": _per_head,
    "frobenius": _frobenius,
    "interval": _interval,
}


def to_numpy(weight: Tensor) -> np.ndarray:
    """The same numbers as a NumPy array; 16-bit floats widen to float32, which holds them exactly."""
    wide = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return weight.detach().to("cpu", wide).numpy()
