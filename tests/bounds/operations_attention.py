"""The meaning of forms of attention in torch (see operations.py): head by head, with masks written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.bounds.meaning import Operation, Tensors

_Attrs = Mapping[str, Any]
_Weights = Callable[[Tensor, Tensor], Tensor]


def _scalar(value: Tensor, count: int) -> Tensor:
    return value.reshape(-1).expand(count) if value.numel() == 1 else value


def _ball(x: Tensor, radius: Tensor | float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (radius / norm.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)


def _turned(x: Tensor, base: float) -> Tensor:
    """Rotary embedding by complex multiplication: entries i and i + d/2 are one complex number."""
    if base == 0:
        return x
    tokens, half = x.shape[-2], x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(tokens, dtype=x.dtype)[:, None] * rates
    a, b, c, s = x[..., :half], x[..., half:], angles.cos(), angles.sin()
    real, imaginary = a * c - b * s, a * s + b * c
    return torch.cat([real, imaginary], dim=-1)


def _softmax(scores: Tensor, tau: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


def _kernel(scores: Tensor, tau: Tensor) -> Tensor:
    return torch.exp(scores - tau) / scores.shape[-1]


def _sinkhorn(scores: Tensor, tau: Tensor) -> Tensor:
    """Columns first, as often as contraction by tanh^2(tau) needs for 16 digits: another way than the kernel's."""
    weights, round_gains = torch.softmax(scores, dim=-2), math.tanh(float(tau)) ** 2
    for _ in range(min(250, 2 + int(36.0 / -math.log(round_gains + 1e-16)))):
        weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights / weights.sum(dim=-2, keepdim=True)
    return weights / weights.sum(dim=-1, keepdim=True)


def _balls(weights_of: _Weights) -> Operation:
    """Attention with ball projections; what is done with the scores is an argument."""

    def operation(attrs: _Attrs, tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
        heads, shared = attrs["heads"], attrs.get("kv_heads", attrs["heads"])
        tau, radius = _scalar(scalars["temperature"], heads), _scalar(scalars["radius"], shared)
        queries = (xs[0] @ tensors["query"].T).chunk(heads, dim=-1)
        keys, values = ((xs[-1] @ tensors[slot].T).chunk(shared, dim=-1) for slot in ("key", "value"))
        outputs: list[Tensor] = []
        for h in range(heads):
            g = h * shared // heads
            q, k = (_turned(_ball(each, 1.0), attrs.get("rotary", 0)) for each in (queries[h], keys[g]))
            scores = _masked(attrs, tensors, tau[h] * (q @ k.mT), h)
            outputs.append(weights_of(scores, tau[h]) @ _ball(values[g], radius[g]))
        return torch.cat(outputs, dim=-1)

    return operation


def _masked(attrs: _Attrs, tensors: Tensors, scores: Tensor, head: int) -> Tensor:
    if "bias" in tensors:
        scores = scores + tensors["bias"][head]
    if attrs.get("causal"):
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _open(attrs: _Attrs, tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    heads, shared = attrs["heads"], attrs["kv_heads"]
    scale = _scalar(scalars["scale"], heads)
    linear = torch.nn.functional.linear
    queries = linear(xs[0], tensors["query"], tensors.get("query_bias")).chunk(heads, dim=-1)
    keys, values = (
        linear(xs[0], tensors[slot], tensors.get(f"{slot}_bias")).chunk(shared, dim=-1) for slot in ("key", "value")
    )
    outputs: list[Tensor] = []
    for h in range(heads):
        g = h * shared // heads
        scores = _masked(attrs, tensors, scale[h] * (queries[h] @ keys[g].mT), h)
        outputs.append(torch.softmax(scores, dim=-1) @ values[g])
    return torch.cat(outputs, dim=-1)


def _memory(attrs: _Attrs, tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    heads = attrs["heads"]
    tau = _scalar(scalars["temperature"], heads)
    queries = (xs[0] @ tensors["query"].T).chunk(heads, dim=-1)
    keys, values = (tensors[slot].chunk(heads, dim=-1) for slot in ("key", "value"))
    outputs: list[Tensor] = []
    for h in range(heads):
        scores = tau[h] * (queries[h] @ keys[h].T)
        if "bias" in tensors:
            scores = scores + tensors["bias"][h]
        outputs.append(torch.softmax(scores, dim=-1) @ values[h])
    return torch.cat(outputs, dim=-1)


OPERATIONS: dict[str, Operation] = {
    "ball_attention@1": _balls(_softmax),
    "cross_attention@1": _balls(_softmax),
    "kernel_attention@1": _balls(_kernel),
    "sinkhorn_attention@1": _balls(_sinkhorn),
    "open_attention@1": _open,
    "memory_attention@1": _memory,
}
