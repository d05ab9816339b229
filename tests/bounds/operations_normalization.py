"""The meaning of normalisation layers in torch (see operations.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from tests.bounds.meaning import Operation, Tensors


def _batch_norm(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    x = xs[0].transpose(1, 2) if xs[0].ndim == 3 else xs[0]  # tokens: torch wants the channels first
    statistics = (tensors["mean"], tensors["variance"], tensors.get("weight"), tensors.get("bias"))
    y = functional.batch_norm(x, *statistics, training=False, eps=attrs["eps"])
    return y.transpose(1, 2) if xs[0].ndim == 3 else y


def _layer_norm(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    return functional.layer_norm(xs[0], xs[0].shape[-1:], tensors.get("weight"), tensors.get("bias"), attrs["eps"])


def _rms_norm(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    y = functional.rms_norm(xs[0], xs[0].shape[-1:], tensors.get("weight"), attrs["eps"])
    return y + tensors["bias"] if "bias" in tensors else y


OPERATIONS: dict[str, Operation] = {
    "batch_norm@1": _batch_norm,
    "layer_norm@1": _layer_norm,
    "rms_norm@1": _rms_norm,
}
