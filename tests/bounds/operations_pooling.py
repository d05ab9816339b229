"""The meaning of pools over images in torch (see operations.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from tests.bounds.meaning import Operation, Tensors


def _max_pool(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    kernel, stride, padding, dilation = (tuple(attrs[key]) for key in ("kernel", "stride", "padding", "dilation"))
    return functional.max_pool2d(xs[0], kernel, stride, padding, dilation, attrs["ceil"])


def _average_pool(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    kernel, stride, padding = (tuple(attrs[key]) for key in ("kernel", "stride", "padding"))
    return functional.avg_pool2d(xs[0], kernel, stride, padding, attrs["ceil"], attrs["count_padding"])


OPERATIONS: dict[str, Operation] = {
    "mean_pool@1": lambda attrs, tensors, scalars, xs: xs[0].mean(dim=(2, 3) if xs[0].ndim == 4 else 1),
    "max_pool@1": _max_pool,
    "average_pool@1": _average_pool,
}
