"""Matrix products whose rounding is known: sums accumulated in a wider dtype, stored in the dtype of the model.

How a library orders the sum inside a product is its own business, so a bound of its rounding error has to allow for
the worst order, which is about K unit roundoffs for K terms. In float64 those K roundoffs are nothing beside one of
float32: a float32 forward pass with float64 products has an error that is proved to be small, whatever the order was.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.nn import functional as F

_ACCUMULATE: ContextVar[torch.dtype | None] = ContextVar("accumulate", default=None)


@contextmanager
def products_in(dtype: torch.dtype) -> Generator[None]:
    """Inside, this package's layers accumulate matrix products (and their bias) in ``dtype`` and round the sum once.

    Products of two float32 numbers are exact in float64, so a sum of K of them and a bias has the error of K + 1
    additions in float64 and of one rounding. It costs about the time of float64 products, the activations stay float32.
    Attention scores and averages are not affected.
    """
    token = _ACCUMULATE.set(dtype)
    try:
        yield
    finally:
        _ACCUMULATE.reset(token)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``: (..., in) -> (..., out), in the dtype of x."""
    wide = _ACCUMULATE.get()
    if wide is None or wide == x.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` in the dtype of ``right``."""
    wide = _ACCUMULATE.get()
    if wide is None or wide == right.dtype:
        return torch.matmul(left, right)
    return torch.matmul(left.to(wide), right.to(wide)).to(right.dtype)
