"""Gradient-norm-preserving activations: they sort or reflect channels, so nothing is lost to the bound.

``slope_class`` says which quadratic constraints hold ("perm" for sorting, "pm1" for slopes +-1): layers that need
slopes in [0, 1] must refuse these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_lipschitz.nn.module import ProgramBuilder


class _SortPairs(torch.autograd.Function):
    """max and min of two halves with a backward of two selections.

    The backward of torch.maximum and torch.minimum splits the gradient of ties, which costs several more passes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x.chunk(2, dim=-1)
        ordered = torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=-1)
        return ordered, first >= second

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (in_order,) = ctx.saved_tensors
        first, second = gradients[0].chunk(2, dim=-1)
        return torch.cat([torch.where(in_order, first, second), torch.where(in_order, second, first)], dim=-1)


class MaxMin(nn.Module):
    """(a, b) -> (max(a, b), min(a, b)) for the two halves a, b of an even number of channels; 1-Lipschitz."""

    slope_class = "perm"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d)."""
        return _SortPairs.apply(x)[0]

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``maxmin@1``."""
        return builder.add("maxmin@1", x)


class GroupSort(nn.Module):
    """Ascending sort inside consecutive groups of ``group`` channels; 1-Lipschitz."""

    slope_class = "perm"

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d), d divisible by the group size."""
        return x.unflatten(-1, (-1, self.group)).sort(dim=-1).values.flatten(-2)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``group_sort@1``."""
        return builder.add("group_sort@1", x, attrs={"group": self.group})


class PartialAbs(nn.Module):
    """|x| on the first ``channels`` channels, the identity on the rest; 1-Lipschitz."""

    slope_class = "pm1"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d)."""
        return torch.cat([x[..., : self.channels].abs(), x[..., self.channels :]], dim=-1)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``abs@1``."""
        return builder.add("abs@1", x, attrs={"channels": self.channels})
