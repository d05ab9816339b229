"""The meaning of embeddings, reshapes, branches, rotations and balls in torch (see operations.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.bounds.meaning import Operation, Tensors


def _slice(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    return xs[0].narrow(attrs["axis"] + 1, attrs["start"], attrs["stop"] - attrs["start"])


def _permute(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    return torch.permute(xs[0], (0, *(axis + 1 for axis in attrs["axes"])))


def _pad(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    (top, left), (bottom, right) = attrs["before"], attrs["after"]
    mode = "constant" if attrs["mode"] == "zeros" else attrs["mode"]
    return functional.pad(xs[0], (left, right, top, bottom), mode=mode)


def _rotation(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    """Head by head and pair by pair, with a frequency computed as a reciprocal power."""
    (_, n, d), heads, dtype = xs[0].shape, attrs["heads"], xs[0].dtype
    width = d // heads
    columns: list[Tensor] = list(xs[0].unbind(dim=-1))
    for h in range(heads):
        for i in range(width // 2):
            pair = (i, i + width // 2) if attrs["layout"] == "half" else (2 * i, 2 * i + 1)
            first, second = (h * width + p for p in pair)
            exponent = torch.tensor(2 * i, dtype=dtype) / width
            angle = torch.arange(n, dtype=dtype) * (1.0 / torch.tensor(attrs["base"], dtype=dtype) ** exponent)
            a, b = columns[first], columns[second]
            columns[first] = a * angle.cos() - b * angle.sin()
            columns[second] = a * angle.sin() + b * angle.cos()
    return torch.stack(columns, dim=-1)


def _ball(attrs: Mapping[str, Any], tensors: Tensors, scalars: Tensors, xs: list[Tensor]) -> Tensor:
    radii, projected = scalars["radius"].expand(attrs["heads"]), []
    for head, radius in zip(xs[0].chunk(attrs["heads"], dim=-1), radii, strict=True):
        norm = torch.linalg.vector_norm(head, dim=-1, keepdim=True)
        projected.append(head * (radius / norm.clamp_min(torch.finfo(head.dtype).tiny)).clamp_max(1.0))
    return torch.cat(projected, dim=-1)


OPERATIONS: dict[str, Operation] = {
    "embedding@1": lambda attrs, tensors, scalars, xs: xs[0],
    "pixel_unshuffle@1": lambda attrs, tensors, scalars, xs: functional.pixel_unshuffle(xs[0], attrs["factor"]),
    "pixel_shuffle@1": lambda attrs, tensors, scalars, xs: functional.pixel_shuffle(xs[0], attrs["factor"]),
    "reshape@1": lambda attrs, tensors, scalars, xs: torch.reshape(xs[0], (-1, *attrs["shape"])),
    "flatten@1": lambda attrs, tensors, scalars, xs: torch.flatten(xs[0], start_dim=1),
    "permute@1": _permute,
    "slice@1": _slice,
    "pad@1": _pad,
    "add@1": lambda attrs, tensors, scalars, xs: torch.add(xs[0], xs[1]),
    "concatenate@1": lambda attrs, tensors, scalars, xs: torch.cat(xs, dim=attrs["axis"] + 1),
    "rotation@1": _rotation,
    "ball@1": _ball,
}
