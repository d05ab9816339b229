"""The last-layer-normalised head: rows of unit norm, so that margins translate to radii class by class."""

from __future__ import annotations

import torch
from torch import nn

from hf_lipschitz.nn.module import ProgramBuilder
from hf_lipschitz.nn.products import linear


class NormalizedLinear(nn.Module):
    """``x W^T + b`` with rows w_i = v_i / max(|v_i|, eps): (B, d) -> (B, K), always in the dtype of the weights.

    Not affected by autocast: margins of bfloat16 logits are too coarse to learn or to certify from.
    """

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.in_features, self.out_features, self.eps = in_features, out_features, eps
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def normalized_weight(self) -> torch.Tensor:
        """The (K, d) matrix of unit rows, differentiable."""
        return self.weight / self.weight.square().sum(dim=1, keepdim=True).sqrt().clamp_min(self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return linear(x.to(self.weight.dtype), self.normalized_weight(), self.bias)
        return linear(x, self.normalized_weight(), self.bias)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``normalized_linear@1``."""
        tensors = {"weight": self.weight, "bias": self.bias}
        return builder.add("normalized_linear@1", x, attrs={"eps": self.eps}, tensors=tensors)
