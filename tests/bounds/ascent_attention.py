"""Ascent over weights, inputs and directions together, in float64, for forms of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.bounds.rule import Geometry, Rule, Size
from tests.bounds.operations import OPERATIONS
from tests.bounds.row import Example
from tests.bounds.search import ask

_NOISE = 1e-11


@dataclass(frozen=True)
class Form:
    """A form of attention with unit-norm weights, and how it is scaled."""

    op: str
    tokens: int
    width: int
    heads: int
    shared: int
    tau: float
    radius: float = 1.0
    attrs: Mapping[str, Any] = field(default_factory=dict)
    reach: float = math.inf
    others: int = 0  # tokens of the second input

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Heads two entries wide (three for values)."""
        d = self.width
        return {"query": (2 * self.heads, d), "key": (2 * self.shared, d), "value": (3 * self.shared, d)}

    def scalars(self) -> dict[str, float]:
        """Constants."""
        names = ("scale",) if self.op.startswith("open") else ("temperature", "radius")
        return dict(zip(names, (self.tau, self.radius), strict=False))


def along(function: Callable[..., Tensor], xs: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> Tensor:
    """The derivative (N, d) of a function of token sequences (M, e), in the directions of all of them together."""
    jacobians = torch.func.jacrev(function, argnums=tuple(range(len(xs))))(*xs)
    parts = [torch.einsum("ndme,me->nd", jacobian, v) for jacobian, v in zip(jacobians, vs, strict=True)]
    return torch.stack(parts).sum(dim=0)


def climb(form: Form, geometry: Geometry, *, restarts: int = 24, steps: int = 250, seed: int = 0) -> float:
    """The largest share of the rule's bound that was reached; above 1 the rule is refuted."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn((restarts, *shape), generator=generator, dtype=torch.float64)

    shapes = [(form.tokens, form.width)] + ([(form.others, form.width)] if form.others else [])
    weights = {slot: draw(*shape).requires_grad_() for slot, shape in form.slots().items()}
    points = [(draw(*shape) * 10.0 ** (draw(1, 1) / 2.0)).requires_grad_() for shape in shapes]
    steps_at = [draw(*shape).requires_grad_() for shape in shapes]
    scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in form.scalars().items()}
    optimizer = torch.optim.Adam([*weights.values(), *points, *steps_at], lr=0.05)
    best = torch.zeros(restarts, dtype=torch.float64)
    kept = {slot: weight.detach().clone() for slot, weight in weights.items()}

    def one(tensors: dict[str, Tensor], xs: list[Tensor], vs: list[Tensor]) -> Tensor:
        def function(*values: Tensor) -> Tensor:
            return OPERATIONS[form.op](form.attrs, tensors, scalars, [value[None] for value in values])[0]

        moved = along(function, tuple(xs), tuple(vs))
        return moved.norm() if geometry == "l2" else moved.norm(dim=-1).amax()

    for _ in range(steps):
        scaled = {slot: weight / torch.linalg.matrix_norm(weight, 2, keepdim=True) for slot, weight in weights.items()}
        short = [x * (form.reach / x.norm(dim=-1, keepdim=True)).clamp_max(1.0) for x in points]
        ratios = torch.func.vmap(one)(scaled, short, _directions(steps_at, geometry))
        better = ratios.detach() > best
        best = torch.where(better, ratios.detach(), best)
        for slot in kept:
            kept[slot][better] = scaled[slot].detach()[better]
        optimizer.zero_grad()
        (-(ratios + 1e-12).log().sum()).backward()
        for parameter in (*weights.values(), *points, *steps_at):
            assert parameter.grad is not None
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # of a norm of zero
        optimizer.step()
    return max(float(best[i]) * (1.0 - _NOISE) / _claimed(form, geometry, kept, i) for i in range(restarts))


def _directions(steps: list[Tensor], geometry: Geometry) -> list[Tensor]:
    """Directions of norm 1; of two inputs, together in l2 (the claim is then the root of the sum of squares)."""
    if geometry == "token_max":
        return [step / step.norm(dim=-1, keepdim=True) for step in steps]
    total = sum(step.square().sum(dim=(1, 2), keepdim=True) for step in steps)
    assert isinstance(total, Tensor)
    return [step / total.sqrt() for step in steps]


def _claimed(form: Form, geometry: Geometry, weights: Mapping[str, Tensor], index: int) -> float:
    names = {slot: slot for slot in form.slots()}
    shapes = ((form.tokens, form.width),) + (((form.others, form.width),) if form.others else ())
    node = Node(form.op, tuple(range(len(shapes))), dict(form.attrs), names, form.scalars())
    stored = {slot: weight[index].numpy() for slot, weight in weights.items()}
    return claimed(Example(node, shapes, stored), geometry, form.reach)


def claimed(example: Example, geometry: Geometry, reach: float = math.inf, rule: Rule | None = None) -> float:
    """What the rule claims for inputs whose tokens are no longer than ``reach``; of two inputs, moved together."""
    rule, call = ask(example, rule)
    rule.shape(call)
    gains = rule.gains(replace(call, sizes=(Size(reach, math.inf),) * len(example.shapes)), geometry)
    return math.hypot(*gains) if geometry == "l2" else sum(gains)
