"""Sinkhorn attention: weights whose rows *and* columns sum to one, in a convex residual divided by its own bound.

Every key is read as much as every other, so no token can pull all queries at once: the factor sqrt(c) that softmax
attention pays in ``l2`` is gone (hf_lipschitz/bounds/rules/attention_sinkhorn.py has the derivation).
"""

from __future__ import annotations

from typing import Any

import torch

from hf_lipschitz.nn.attention import AttentionFunction, BoundedAttention, project_on_ball, softplus
from hf_lipschitz.nn.module import ProgramBuilder

TRAINING_ITERATIONS = 8
EVALUATION_ITERATIONS = 64
_SPREAD = 40.0  # scores farther below their row's largest are raised to that: no product of scalings leaves float32
_CLOSE = 32.0  # times the machine epsilon: column sums this near to 1 end the iteration in evaluation mode
_TINY = 1e-12  # under the root, so that no enclosure of it reaches below zero


class SinkhornAttention(BoundedAttention):
    """``(1 - a) x + a W_o Att(x) / L``: (B, N, d) -> (B, N, d), at most 1-Lipschitz in ``l2`` when the weights are.

    As BoundedAttention, with attention weights ``diag(a) e^s diag(b)`` scaled until all rows and columns sum to one
    (Sinkhorn and Knopp 1967). With t = tanh(max tau) and B = 2 max(tau r), ``L = t + sqrt((1 - t)^2 + B^2)`` bounds Att
    for weights of norm at most one: it is at least the Psi(t, B) of the kernel's rule. (Where B t > 1 - t^2, Psi is
    t + B. Elsewhere Psi^2 = 1 + B^2 / (1 - t^2), and L^2 - 1 = B^2 (1 + 2 t / (S + 1 - t)) with S the root is as large
    since S + 1 - t <= 2 (1 - t^2) / t there.)

    The certificate speaks of the converged scaling. In evaluation mode the iteration ends when every column sum lies
    within 32 machine epsilons of 1, or after 64 rounds; in training mode, and in compiled graphs or under torch.func,
    the number of rounds is fixed (8 and 64). Inputs are never masked: padding has to be taken out of the sequence.
    """

    def forward(
        self, x: torch.Tensor, attention_function: AttentionFunction | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mixed tokens and the weights (B, H, N, N); a softmax ``attention_function`` is of no use here."""
        tau, radius, weight = softplus(self.temperature), softplus(self.radius), torch.sigmoid(self.residual)
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        query = project_on_ball(query, 1.0) * tau[:, None, None]
        key, value = project_on_ball(key, 1.0), project_on_ball(value, radius[:, None, None])
        scores = query @ key.transpose(2, 3).to(query.dtype)
        weights = sinkhorn(scores, *self._rounds()).to(value.dtype)
        mixed = self.output((weights @ value).transpose(1, 2).flatten(2)) * (1.0 / self._bound(tau, radius))
        return (1.0 - weight) * x + weight * mixed, weights

    def _rounds(self) -> tuple[int, bool]:
        return (TRAINING_ITERATIONS, False) if self.training else (EVALUATION_ITERATIONS, True)

    def _bound(self, tau: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        hottest, strength = tau.max(), 2.0 * (tau * radius).max()
        contraction, rest = 2.0 * torch.sigmoid(2.0 * hottest) - 1.0, 2.0 * torch.sigmoid(-2.0 * hottest)
        return contraction + (rest * rest + (strength * strength + _TINY)).sqrt()

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """sinkhorn_attention, output map, division by the expression of L, convex residual."""
        tau = ["softplus", builder.tensor(self.temperature)]
        radius = ["softplus", builder.tensor(self.radius)]
        tensors = {"query": self.query.weight, "key": self.key.weight, "value": self.value.weight}
        scalars = {"temperature": tau, "radius": radius}
        attrs = {"heads": self.heads, "iterations": EVALUATION_ITERATIONS}
        mixed = builder.add("sinkhorn_attention@1", x, attrs=attrs, tensors=tensors, scalars=scalars)
        mixed = builder.apply(self.output, mixed)
        hottest, strength = ["max", tau], ["mul", 2, ["max", ["mul", tau, radius]]]
        contraction = ["sub", ["mul", 2, ["sigmoid", ["mul", 2, hottest]]], 1]
        rest = ["mul", 2, ["sigmoid", ["mul", -2, hottest]]]
        root = ["sqrt", ["add", ["mul", rest, rest], ["add", ["mul", strength, strength], _TINY]]]
        mixed = builder.add("scale@1", mixed, scalars={"factor": ["div", 1, ["add", contraction, root]]})
        return builder.add("residual@1", x, mixed, scalars={"weight": ["sigmoid", builder.tensor(self.residual)]})


def sinkhorn(scores: torch.Tensor, iterations: int, until_close: bool = False) -> torch.Tensor:
    """Scale ``exp(scores)`` (..., N, N) to rows and columns that sum to one; the last step is of the rows.

    Args:
        scores: any floating-point dtype; computed in float32 at least.
        iterations: rounds of one row and one column step, at least 1.
        until_close: end as soon as all column sums are 1 up to rounding (not in a compiled graph or under torch.func).

    Returns:
        Weights like ``scores``; every row sums to one, columns do as far as the iteration got.
    """
    check = until_close and not torch.compiler.is_compiling() and not _is_transformed()
    with torch.autocast(scores.device.type, enabled=False):
        wide = scores if scores.dtype == torch.float64 else scores.float()
        kernel = (wide - wide.detach().amax(dim=-1, keepdim=True)).clamp_min(-_SPREAD).exp()
        transposed = kernel.transpose(-2, -1)
        columns = torch.ones_like(kernel[..., :1])
        for _ in range(iterations):
            rows = 1.0 / (kernel @ columns)
            mass = transposed @ rows
            if check and bool(((columns * mass).detach() - 1.0).abs().max() <= _CLOSE * torch.finfo(kernel.dtype).eps):
                return rows * kernel * columns.transpose(-2, -1)
            columns = 1.0 / mass
        return (kernel * columns.transpose(-2, -1)) / (kernel @ columns)


def _is_transformed() -> bool:
    """Whether torch.func runs this forward: values of a batch under vmap cannot be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
