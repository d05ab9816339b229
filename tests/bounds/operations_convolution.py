"""The meaning of convolutions in torch (see operations.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from tests.bounds.meaning import Operation, Tensors


def _convolution(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    x, weight, (rows, columns) = xs[0], tensors["weight"], attrs["padding"]
    if weight.ndim == 3:
        return _along_rows(attrs, weight, tensors.get("bias"), x)
    if attrs["padding_mode"] == "circular":
        x, rows, columns = functional.pad(x, (columns, columns, rows, rows), mode="circular"), 0, 0
    stride, dilation = tuple(attrs["stride"]), tuple(attrs["dilation"])
    return functional.conv2d(x, weight, tensors.get("bias"), stride, (rows, columns), dilation, attrs["groups"])


def _along_rows(attrs: Mapping[str, Any], weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """conv1d on the single row of an image."""
    padding, (stride, dilation) = attrs["padding"][1], (attrs[key][1] for key in ("stride", "dilation"))
    row = x[:, :, 0]
    if attrs["padding_mode"] == "circular":
        row, padding = functional.pad(row, (padding, padding), mode="circular"), 0
    return functional.conv1d(row, weight, bias, stride, padding, dilation, attrs["groups"])[:, :, None]


def _convolution_batch_norm(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    y = _convolution(attrs, tensors, scalars, xs)
    statistics = (tensors["mean"], tensors["variance"], tensors.get("gamma"), tensors.get("beta"))
    return functional.batch_norm(y, *statistics, training=False, eps=attrs["eps"])


def _transposed(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    weight = tensors["weight"] if tensors["weight"].ndim == 4 else tensors["weight"][:, :, None]
    return functional.conv_transpose2d(
        xs[0],
        weight,
        tensors.get("bias"),
        tuple(attrs["stride"]),
        tuple(attrs["padding"]),
        tuple(attrs["output_padding"]),
        attrs["groups"],
        tuple(attrs["dilation"]),
    )


OPERATIONS: dict[str, Operation] = {
    "convolution@1": _convolution,
    "convolution_batch_norm@1": _convolution_batch_norm,
    "transposed_convolution@1": _transposed,
}
