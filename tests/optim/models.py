"""A small model with every kind of parameter, and its constraints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONSTRAINTS: list[dict[str, Any]] = [
    {"pattern": r"blocks\.\d+\.weight", "cap": "stiefel", "norm": "spectral", "value": 1.0},
    {"pattern": r"attention\.weight", "cap": "spectral_normalize", "norm": "per_head", "value": 0.5, "heads": 2},
    {"pattern": r"head\.weight", "cap": "row_normalize", "norm": "row", "value": 1.0},
]


class SmallNet(nn.Module):
    """(B, 6) to (B, 4): two equal blocks, a wide layer with two heads, a head, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.attention = nn.Linear(6, 8, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).abs()
        return self.head(self.attention(x)) * self.scale


def small_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet().to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Steps on random data."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator).to(dtype)
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
