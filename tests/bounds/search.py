"""The search that every rule has to survive: a rule asked about one node, and ascent on what the node means.

At many points the whole Jacobian of the operation is taken (the shapes are tiny), the direction that it stretches most
is found, and the best points are perturbed and tried again. What is found is reached by some input and direction (up to
float64 rounding, which is taken off), so a rule that claims less is wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_lipschitz.bounds import engine
from hf_lipschitz.bounds.rounding import ARITHMETIC, Array
from hf_lipschitz.bounds.rule import Call, Geometry, NormTable, Rule, Size
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds.operations import OPERATIONS, value_of
from tests.bounds.row import Example

_NOISE = 1e-12  # relative, of a Jacobian and its norm in float64


def ask(example: Example, rule: Rule | None = None, roundoff: float = 0.0) -> tuple[Rule, Call]:
    """The rule and the call that the engine would make for the node of an example."""
    rules = BUILT_IN if rule is None else {**BUILT_IN, rule.op: rule}
    arithmetic = next((each for each in ARITHMETIC.values() if each.roundoff == roundoff), None)
    return engine._prepare(7, example.node, example.weights, rules, example.shapes, NormTable(), arithmetic)


def execute(example: Example, values: list[Tensor]) -> Tensor:
    """The operation by its independent meaning, in the dtype of the values."""
    dtype = values[0].dtype
    stored = {name: torch.tensor(np.array(value)).to(dtype) for name, value in example.weights.items()}
    tensors = {slot: stored[name] for slot, name in example.node.tensors.items()}
    scalars = {slot: value_of(expression, stored, dtype) for slot, expression in example.node.scalars.items()}
    return OPERATIONS[example.node.op](example.node.attrs, tensors, scalars, values)


def claimed_constant(example: Example, geometry: Geometry, rule: Rule | None = None) -> float:
    """What the rule claims for inputs that are 1-Lipschitz."""
    rule, call = ask(example, rule)
    rule.shape(call)
    call = replace(call, sizes=(Size(example.reach, math.inf),) * len(example.shapes))
    return rule.lipschitz(call, geometry, (1.0,) * len(example.shapes))


def reached_constant(
    example: Example, geometry: Geometry, *, points: int = 24, rounds: int = 3, seed: int = 0
) -> float:
    """A ratio that the operation reaches; of two inputs, the second is the first or its negative."""
    best = 0.0
    for sign in (1.0,) if len(example.shapes) == 1 else (1.0, -1.0):

        def function(x: Tensor, sign: float = sign) -> Tensor:
            values = [x[None]] if len(example.shapes) == 1 else [x[None], sign * x[None]]
            return execute(example, values)[0]

        generator = torch.Generator().manual_seed(seed)
        scales = 10.0 ** torch.linspace(-2.0, 1.5, points, dtype=torch.float64)
        noise = torch.randn((points, *example.shapes[0]), generator=generator, dtype=torch.float64)
        candidates = noise * scales.view(-1, *[1] * len(example.shapes[0]))
        for _ in range(rounds):
            candidates = _within(candidates, example.reach)
            ratios = stretch(torch.func.vmap(torch.func.jacrev(function))(candidates), example.shapes[0], geometry)
            best = max(best, float(ratios.max()))
            kept = candidates[ratios.topk(min(4, points)).indices].repeat(points // 4, *[1] * len(example.shapes[0]))
            noise = torch.randn(kept.shape, generator=generator, dtype=torch.float64)
            candidates = kept + 0.2 * kept.abs().mean() * noise
    return best * (1.0 - _NOISE)


def _within(x_BNd: Tensor, reach: float) -> Tensor:
    """Tokens shortened to at most ``reach``."""
    return x_BNd if math.isinf(reach) else x_BNd * (reach / x_BNd.norm(dim=-1, keepdim=True)).clamp_max(1.0)


def stretch(jacobians: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """How far each Jacobian (B, *output, *input) stretches a direction: the most in l2, one found in token_max."""
    outputs, inputs = jacobians.shape[1 : jacobians.ndim - len(shape)], shape
    if geometry == "l2":
        flat = jacobians.reshape(len(jacobians), max(1, outputs.numel()), -1)
        return torch.linalg.matrix_norm(flat, 2)
    j_BNdMe = _token_axes(jacobians, len(outputs), len(inputs))
    v_BNMe = torch.ones(j_BNdMe[:, :, 0].shape, dtype=jacobians.dtype)
    v_BNMe[..., ::2] *= -1.0
    reached = torch.zeros(len(jacobians), dtype=jacobians.dtype)
    for _ in range(12):
        v_BNMe = v_BNMe / v_BNMe.abs().amax(dim=-1, keepdim=True).clamp_min(1e-300)  # squares must not underflow
        v_BNMe = v_BNMe / v_BNMe.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        y_BNd = torch.einsum("bndme,bnme->bnd", j_BNdMe, v_BNMe)
        reached = torch.maximum(reached, y_BNd.norm(dim=-1).amax(dim=1))
        v_BNMe = torch.einsum("bndme,bnd->bnme", j_BNdMe, y_BNd)
    return reached


def _token_axes(jacobians: Tensor, out: int, into: int) -> Tensor:
    """(B, *output, *input) -> (B, output tokens, output width, input tokens, input width)."""
    b, shape = len(jacobians), jacobians.shape[1:]
    left = _tokens_last(jacobians.reshape(b, *shape[:out], -1), out)
    right = left.flatten(1, 2).reshape(b, left.shape[1] * left.shape[2], *shape[out:])
    moved = right.permute(0, 1, 3, 4, 2).flatten(2, 3) if into == 3 else right if into == 2 else right[:, :, None]
    return moved.reshape(b, left.shape[1], left.shape[2], moved.shape[2], moved.shape[3])


def _tokens_last(value: Tensor, dimensions: int) -> Tensor:
    """(B, *output, M) -> (B, tokens, width, M)."""
    if dimensions == 3:
        return value.permute(0, 2, 3, 1, 4).flatten(1, 2)
    return value if dimensions == 2 else value[:, None]


def lowered(rule: Rule, factor: float = 0.98) -> Rule:
    """The rule with its constant lowered: the planted mistake that the search has to find."""

    class Lowered(type(rule)):  # type: ignore[misc]
        def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
            return factor * super().lipschitz(call, geometry, incoming)

    return Lowered()


def token_norms(value: Array) -> Array:
    """(B, N): the Euclidean norm of every token of a batch."""
    if value.ndim == 4:
        return np.sqrt(np.sum(value * value, axis=1)).reshape(len(value), -1)
    return np.sqrt(np.sum(value * value, axis=-1)).reshape(len(value), -1)
