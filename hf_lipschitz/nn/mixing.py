"""Token mixers that cost nothing in ``l2``: spatial shifts between orthogonal channel maps, and an orthogonal N x N
map.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_lipschitz.nn.module import ProgramBuilder
from hf_lipschitz.nn.products import linear, matmul


class ShiftMixer(nn.Module):
    """``R^T shift(R x)``: four groups of ``moved`` channels of R x move circularly by one cell (down, up, right, left).

    (B, H W, d) -> (B, H W, d). With orthogonal R it is an isometry in ``l2``; its constant is sigma_max(R)^2 at most.
    """

    def __init__(self, width: int, grid: tuple[int, int], moved: int) -> None:
        super().__init__()
        self.grid, self.moved = grid, moved
        self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate, shift, rotate back."""
        return linear(shift(linear(x, self.weight), self.grid, self.moved), self.weight.T)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """linear, shift, transposed linear with the same tensor."""
        rotated = builder.add("linear@1", x, attrs={"transpose": False}, tensors={"weight": self.weight})
        attrs = {"height": self.grid[0], "width": self.grid[1], "moved": self.moved}
        moved = builder.add("shift@1", rotated, attrs=attrs)
        return builder.add("linear@1", moved, attrs={"transpose": True}, tensors={"weight": self.weight})


def shift(x: torch.Tensor, grid: tuple[int, int], moved: int) -> torch.Tensor:
    """Circular shifts of channel groups on a grid: (B, H W, d) -> (B, H W, d), the last d - 4 moved channels
    unmoved.
    """
    x_BHWD = x.unflatten(1, grid)
    parts = [
        torch.roll(x_BHWD[..., i * moved : (i + 1) * moved], step, dim)
        for i, (step, dim) in enumerate(((1, 1), (-1, 1), (1, 2), (-1, 2)))
    ]
    return torch.cat([*parts, x_BHWD[..., 4 * moved :]], dim=-1).flatten(1, 2)


class TokenMixing(nn.Module):
    """``U x`` with a learned N x N matrix U over the tokens: (B, N, d) -> (B, N, d); constant sigma_max(U) in
    ``l2``.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, tokens))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens, channel by channel."""
        return matmul(self.weight, x)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``token_mixing@1``."""
        return builder.add("token_mixing@1", x, tensors={"weight": self.weight})
