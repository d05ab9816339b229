"""The search that every rule has to survive, and what it needs: a rule asked about one node, and ascent on its meaning."""

from __future__ import annotations

import numpy as np
import torch

from hf_lipschitz.bounds import engine
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rule import Call, Geometry, NormTable, Rule
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.evaluation.lower_bounds import lipschitz_lower_estimate
from tests.bounds.cases import Example
from tests.bounds.operations import OPERATIONS, value_of


def ask(example: Example, rule: Rule | None = None, roundoff: float = 0.0) -> tuple[Rule, Call]:
    """The rule and the call that the engine would make for the node of an example."""
    rules = BUILT_IN if rule is None else {**BUILT_IN, rule.op: rule}
    return engine._prepare(7, example.node, example.weights, rules, example.shapes, NormTable(), roundoff)


def execute(example: Example, values: list[torch.Tensor]) -> torch.Tensor:
    """The operation by its independent meaning, in the dtype of the values."""
    dtype = values[0].dtype
    stored = {name: torch.tensor(np.array(value)).to(dtype) for name, value in example.weights.items()}
    tensors = {slot: stored[name] for slot, name in example.node.tensors.items()}
    scalars = {slot: value_of(expression, stored, dtype) for slot, expression in example.node.scalars.items()}
    return OPERATIONS[example.node.op](example.node.attrs, tensors, scalars, values)


def lowest_constant(
    example: Example, geometry: Geometry, *, steps: int = 25, restarts: int = 3, seed: int = 0
) -> float:
    """A ratio that the operation reaches; of two inputs, the second is the first or its negative."""
    start = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, *example.shapes[0])))
    best = 0.0
    for sign in (1.0,) if len(example.shapes) == 1 else (1.0, -1.0):
        values = (lambda x: [x]) if len(example.shapes) == 1 else (lambda x, sign=sign: [x, sign * x])
        found = lipschitz_lower_estimate(
            lambda x, values=values: execute(example, values(x)), start, norm=geometry, steps=steps, restarts=restarts
        )
        best = max(best, found.value)
    return best


def claimed_constant(example: Example, geometry: Geometry, rule: Rule | None = None) -> float:
    """What the rule claims for inputs that are 1-Lipschitz."""
    rule, call = ask(example, rule)
    rule.shape(call)
    return rule.lipschitz(call, geometry, (1.0,) * len(example.shapes))


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
