"""Pooling over tokens, (B, N, d) -> (B, d), 1-Lipschitz in ``l2``."""

from __future__ import annotations

import math

import torch
from torch import nn

from hf_lipschitz.nn.module import ProgramBuilder


class L2Pool(nn.Module):
    """y_c = sqrt(sum_n x_nc^2 + eps). eps keeps the gradient finite at zero and costs nothing in the bound."""

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of each channel over tokens."""
        return (x.square().sum(dim=1) + self.eps).sqrt()

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``l2_pool@1``."""
        return builder.add("l2_pool@1", x, attrs={"eps": self.eps})


class SumPool(nn.Module):
    """y_c = sum_n x_nc / sqrt(N)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scaled sum of each channel over tokens."""
        return x.sum(dim=1) / math.sqrt(x.shape[1])

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``sum_pool@1``."""
        return builder.add("sum_pool@1", x)
