"""Linear layers whose norm a cap keeps at most one, and the map that LipViT is built of."""

from __future__ import annotations

import torch
from torch import nn

from hf_lipschitz.nn.module import ProgramBuilder
from hf_lipschitz.nn.products import linear


class LipschitzLinear(nn.Linear):
    """``x W^T + b`` with W of shape (out, in); Lipschitz constant sigma_max(W) in both geometries.

    The layer does not constrain W: a cap does, after every optimizer step. Initialise with
    ``hf_lipschitz.nn.init.orthogonal_weight``.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """One ``linear@1``."""
        tensors = {"weight": self.weight, "bias": self.bias}
        return builder.add("linear@1", x, attrs={"transpose": False}, tensors=tensors)


class BatchCentering(nn.Module):
    """Subtract the mean of each channel over batch and tokens, then add a learned bias; (..., d) -> (..., d).

    In training the mean is that of the batch (differentiated through), in evaluation a running mean: a bias, so
    1-Lipschitz. A running mean is kept only for evaluation; ``momentum`` is the weight of the newest batch.
    """

    bias: nn.Parameter
    running_mean: torch.Tensor

    def __init__(self, width: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shift every channel by its (batch or running) mean and bias."""
        if not self.training:
            return x - self.running_mean + self.bias
        mean = x.flatten(0, -2).mean(dim=0)
        if not _is_recomputing():
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        return x - mean + self.bias.to(x.dtype)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """Two translations: minus the running mean, plus the bias."""
        centred = builder.add(
            "offset@1", x, attrs={"axis": "channel", "negative": True}, tensors={"offset": self.running_mean}
        )
        return builder.add(
            "offset@1", centred, attrs={"axis": "channel", "negative": False}, tensors={"offset": self.bias}
        )


def _is_recomputing() -> bool:
    """Whether gradient checkpointing runs a forward again inside backward, after statistics have been updated."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1  # -1 outside of backward; torch's own checkpointing asks the same


class LipschitzMap(nn.Module):
    """A linear map, optionally centred over the batch, and its activation: (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int, activation: nn.Module, *, centering: bool = False) -> None:
        super().__init__()
        self.linear = LipschitzLinear(in_features, out_features, bias=not centering)
        self.centering = BatchCentering(out_features) if centering else None
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """activation(centering(x W^T + b))."""
        x = self.linear(x)
        if self.centering is not None:
            x = self.centering(x)
        return self.activation(x)

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """The nodes of its parts, in order."""
        x = builder.apply(self.linear, x)
        if self.centering is not None:
            x = builder.apply(self.centering, x)
        return builder.apply(self.activation, x)
