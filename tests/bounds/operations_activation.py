"""The meaning of pointwise and parametric activations in torch (see operations.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.bounds.meaning import Operation, Tensors


def _householder(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    """The published form: the pair itself on one side of a line, its reflection on the other."""
    a, b = xs[0].chunk(2, dim=-1)
    angle = tensors["angle"]
    kept = a * (angle / 2).sin() - b * (angle / 2).cos() > 0.0
    first = torch.where(kept, a, angle.cos() * a + angle.sin() * b)
    second = torch.where(kept, b, angle.sin() * a - angle.cos() * b)
    return torch.cat([first, second], dim=-1)


def _n_activation(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    ends = torch.stack([tensors["first"], tensors["second"]])
    low, high = ((end[:, None, None] if xs[0].ndim == 4 else end) for end in (ends.amin(dim=0), ends.amax(dim=0)))
    return torch.where(xs[0] < low, xs[0] - 2.0 * low, torch.where(xs[0] > high, xs[0] - 2.0 * high, -xs[0]))


def _prelu(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    """By parts: torch's own cannot be differentiated in batches (test_pointwise.py compares the two)."""
    slopes = tensors["weight"].view(1, -1, *[1] * (xs[0].ndim - 2))
    return xs[0].clamp_min(0.0) + slopes * xs[0].clamp_max(0.0)


def _softplus(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    """The exact function; test_pointwise.py compares it with torch's, which jumps at its threshold."""
    return torch.logaddexp(attrs["beta"] * xs[0], torch.zeros_like(xs[0])) / attrs["beta"]


OPERATIONS: dict[str, Operation] = {
    "householder@1": _householder,
    "n_activation@1": _n_activation,
    "prelu@1": _prelu,
    "relu@1": lambda attrs, tensors, scalars, xs: functional.relu(xs[0]),
    "leaky_relu@1": lambda attrs, tensors, scalars, xs: functional.leaky_relu(xs[0], attrs["slope"]),
    "hardtanh@1": lambda attrs, tensors, scalars, xs: functional.hardtanh(xs[0], attrs["low"], attrs["high"]),
    # torch's own has the derivative 1/6 in float32 for every dtype, which is too large
    "hardsigmoid@1": lambda attrs, tensors, scalars, xs: (xs[0] + 3.0).clamp(0.0, 6.0) / 6.0,
    "hardswish@1": lambda attrs, tensors, scalars, xs: functional.hardswish(xs[0]),
    "softshrink@1": lambda attrs, tensors, scalars, xs: functional.softshrink(xs[0], attrs["lambda"]),
    "elu@1": lambda attrs, tensors, scalars, xs: functional.elu(xs[0], attrs["alpha"]),
    "celu@1": lambda attrs, tensors, scalars, xs: functional.celu(xs[0], attrs["alpha"]),
    "selu@1": lambda attrs, tensors, scalars, xs: functional.selu(xs[0]),
    "tanh@1": lambda attrs, tensors, scalars, xs: torch.tanh(xs[0]),
    "tanhshrink@1": lambda attrs, tensors, scalars, xs: functional.tanhshrink(xs[0]),
    "sigmoid@1": lambda attrs, tensors, scalars, xs: torch.sigmoid(xs[0]),
    "logsigmoid@1": lambda attrs, tensors, scalars, xs: functional.logsigmoid(xs[0]),
    "softplus@1": _softplus,
    "softsign@1": lambda attrs, tensors, scalars, xs: functional.softsign(xs[0]),
    "gelu@1": lambda attrs, tensors, scalars, xs: functional.gelu(xs[0], approximate=attrs["approximate"]),
    "silu@1": lambda attrs, tensors, scalars, xs: xs[0] * torch.sigmoid(attrs["beta"] * xs[0]),
    "mish@1": lambda attrs, tensors, scalars, xs: functional.mish(xs[0]),
}
