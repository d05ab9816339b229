"""Softmax attention with bounded scores, in a convex residual divided by its own bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_lipschitz.nn.linear import LipschitzLinear
from hf_lipschitz.nn.module import ProgramBuilder

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class BoundedAttention(nn.Module):
    """``(1 - a) x + a W_o Att(x) / L``: (B, N, d) -> (B, N, d), at most 1-Lipschitz in ``l2`` when the weights are.

    Every head projects its queries and keys on the unit ball and its values on a ball of learned radius r_h; scores are
    tau_h <q, k>. ``L = max sqrt(c) + max(tau r) + max(tau r sqrt(c))`` with c_h = N / (1 + (N-1) exp(-2 tau_h)) bounds
    Att for weights of norm at most one (hf_lipschitz/bounds/rules/attention.py has the derivation); it is
    differentiable in the learned scalars a = sigmoid(raw), tau = softplus(raw), r = softplus(raw), so training finds
    the trade-off.
    """

    is_causal = False

    def __init__(self, width: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.heads = tokens, heads
        self.query, self.key, self.value, self.output = (LipschitzLinear(width, width, bias=False) for _ in range(4))
        self.temperature = nn.Parameter(torch.full((heads,), 0.5))
        self.radius = nn.Parameter(torch.full((heads,), 0.5))
        self.residual = nn.Parameter(torch.zeros(()))

    def forward(
        self, x: torch.Tensor, attention_function: AttentionFunction | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the mixed tokens and the attention weights (None where the attention function does not give them)."""
        tau, radius, weight = softplus(self.temperature), softplus(self.radius), torch.sigmoid(self.residual)
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        query = project_on_ball(query, 1.0) * tau[:, None, None]
        key, value = project_on_ball(key, 1.0), project_on_ball(value, radius[:, None, None])
        dtype = value.dtype
        mixed, weights = (attention_function or eager_attention)(
            self, query.to(dtype), key.to(dtype), value, None, scaling=1.0, dropout=0.0, **kwargs
        )
        mixed = self.output(mixed.flatten(2)) * (1.0 / self._bound(tau, radius))
        return (1.0 - weight) * x + weight * mixed, weights

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _bound(self, tau: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        column = (self.tokens / (1.0 + (self.tokens - 1) * torch.exp(-2.0 * tau))).sqrt()
        return column.max() + ((tau * radius).max() + (tau * radius * column).max())

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """softmax_attention, output map, division by the expression of L, convex residual."""
        tau = ["softplus", builder.tensor(self.temperature)]
        radius = ["softplus", builder.tensor(self.radius)]
        tensors = {"query": self.query.weight, "key": self.key.weight, "value": self.value.weight}
        scalars = {"temperature": tau, "radius": radius}
        mixed = builder.add("softmax_attention@1", x, attrs={"heads": self.heads}, tensors=tensors, scalars=scalars)
        mixed = builder.apply(self.output, mixed)
        decay = ["exp", ["mul", -2, tau]]
        column = ["sqrt", ["div", self.tokens, ["add", 1, ["mul", self.tokens - 1, decay]]]]
        strength = ["mul", tau, radius]
        bound = ["add", ["max", column], ["add", ["max", strength], ["max", ["mul", strength, column]]]]
        mixed = builder.add("scale@1", mixed, scalars={"factor": ["div", 1, bound]})
        return builder.add("residual@1", x, mixed, scalars={"weight": ["sigmoid", builder.tensor(self.residual)]})


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) without the jump that ``torch.nn.functional.softplus`` has at its threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def project_on_ball(x: torch.Tensor, radius: torch.Tensor | float) -> torch.Tensor:
    """x min(1, r / |x|) on the last axis; 1-Lipschitz (projection on a convex set)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    tiny = torch.finfo(norm.dtype).tiny
    return x * (radius / norm.clamp_min(tiny)).clamp_max(1.0)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in the dtype of the inputs, (B, H, N, d_h) -> (B, N, H, d_h) and the (B, H, N, N) weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1)
    return (weights @ value).transpose(1, 2), weights
