"""The meaning of every built-in operation a second time, in torch: an independent truth that can be differentiated.

Each function takes the node's attributes, its tensors by slot, its scalars by slot and the input values (batch first),
all in one floating-point dtype, and computes as a deployed forward pass in that dtype would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.bounds import (
    operations_activation,
    operations_attention,
    operations_convolution,
    operations_normalization,
    operations_pooling,
    operations_shape,
)
from tests.bounds.meaning import Operation, Tensors


def value_of(expression: Any, tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """A scalar expression evaluated in the given dtype."""
    if not isinstance(expression, list):
        return torch.tensor(float(expression), dtype=dtype)
    head, *arguments = expression
    if head == "tensor":
        return tensors[arguments[0]].to(dtype)
    values = [value_of(argument, tensors, dtype) for argument in arguments]
    return _SCALAR[head](*values)


_SCALAR: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "sigmoid": torch.sigmoid,
    "max": torch.amax,
}


def _normalize(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    mean, std = (torch.tensor(attrs[key], dtype=xs[0].dtype).view(-1, 1, 1) for key in ("mean", "std"))
    return (xs[0] - mean) / std


def _patchify(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    p = attrs["patch"]
    return torch.nn.functional.unfold(xs[0], kernel_size=p, stride=p).transpose(1, 2)


def _patch_merge(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    h, w, f = attrs["height"], attrs["width"], attrs["factor"]
    rows = []
    for i in range(0, h, f):
        for j in range(0, w, f):
            near = [xs[0][:, (i + a) * w + j + b] for a in range(f) for b in range(f)]
            rows.append(torch.cat(near, dim=-1))
    return torch.stack(rows, dim=1)


def _shift(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    h, w, m = attrs["height"], attrs["width"], attrs["moved"]
    rows = []
    for i in range(h):
        for j in range(w):
            sources = [((i - 1) % h, j), ((i + 1) % h, j), (i, (j - 1) % w), (i, (j + 1) % w)]
            parts = [xs[0][:, a * w + b, k * m : (k + 1) * m] for k, (a, b) in enumerate(sources)]
            rows.append(torch.cat([*parts, xs[0][:, i * w + j, 4 * m :]], dim=-1))
    return torch.stack(rows, dim=1)


def _offset(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    offset = tensors["offset"].reshape(xs[0].shape[1:]) if attrs["axis"] == "entry" else tensors["offset"].flatten()
    if attrs["axis"] == "token":
        offset = offset[:, None]
    elif attrs["axis"] == "channel" and xs[0].ndim == 4:
        offset = offset[:, None, None]
    return xs[0] - offset if attrs["negative"] else xs[0] + offset


def _residual(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    a = scalars["weight"]
    return (1.0 - a) * xs[0] + a * xs[1]


def _linear(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    weight = tensors["weight"] if attrs["transpose"] else tensors["weight"].T
    result = xs[0] @ weight
    return result + tensors["bias"] if "bias" in tensors else result


def _normalized_linear(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    v = tensors["weight"]
    rows = v / v.square().sum(dim=1, keepdim=True).sqrt().clamp_min(attrs["eps"])
    return torch.nn.functional.linear(xs[0], rows, tensors.get("bias"))


def _maxmin(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    a, b = xs[0].chunk(2, dim=-1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=-1)


def _group_sort(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    groups = xs[0].split(attrs["group"], dim=-1)
    return torch.cat([group.sort(dim=-1).values for group in groups], dim=-1)


def _abs(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    return torch.cat([xs[0][..., : attrs["channels"]].abs(), xs[0][..., attrs["channels"] :]], dim=-1)


def _l2_pool(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    return (xs[0].square().sum(dim=1) + attrs["eps"]).sqrt()


def _sum_pool(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    return xs[0].sum(dim=1) / math.sqrt(xs[0].shape[1])


def _attention(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    """Head by head: the concatenation of softmax(tau <P_1 q, P_1 k>) P_r v."""
    heads, outputs = attrs["heads"], []
    tau, radius = (scalars[slot].broadcast_to(heads) for slot in ("temperature", "radius"))
    for h in range(heads):
        q, k, v = (xs[0] @ tensors[slot].chunk(heads, dim=0)[h].T for slot in ("query", "key", "value"))
        scores = (_ball(q, 1.0) * tau[h]) @ _ball(k, 1.0).transpose(1, 2)
        outputs.append(torch.softmax(scores, dim=-1) @ _ball(v, radius[h]))
    return torch.cat(outputs, dim=-1)


def _ball(x: Tensor, radius: Tensor | float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (radius / norm.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)


OPERATIONS: dict[str, Operation] = {
    "input@1": lambda attrs, tensors, scalars, xs: xs[0],
    "normalize@1": _normalize,
    "patchify@1": _patchify,
    "patch_merge@1": _patch_merge,
    "shift@1": _shift,
    "token_mixing@1": lambda attrs, tensors, scalars, xs: tensors["weight"] @ xs[0],
    "offset@1": _offset,
    "scale@1": lambda attrs, tensors, scalars, xs: xs[0] * scalars["factor"],
    "residual@1": _residual,
    "linear@1": _linear,
    "normalized_linear@1": _normalized_linear,
    "maxmin@1": _maxmin,
    "group_sort@1": _group_sort,
    "abs@1": _abs,
    "l2_pool@1": _l2_pool,
    "sum_pool@1": _sum_pool,
    "softmax_attention@1": _attention,
    **operations_shape.OPERATIONS,
    **operations_activation.OPERATIONS,
    **operations_normalization.OPERATIONS,
    **operations_convolution.OPERATIONS,
    **operations_pooling.OPERATIONS,
    **operations_attention.OPERATIONS,
}
