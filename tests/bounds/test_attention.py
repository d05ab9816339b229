"""Softmax attention: inputs that reach every term of its bound, and why the published formula is not used.

Random weights stay below the bound, since one direction rarely serves values, keys and queries at once. Here each term
is reached by weights made for it, so that a rule that forgets a term, or a factor of one, is caught.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rule import Call, Geometry, Rule
from hf_lipschitz.bounds.rules.attention import SoftmaxAttention
from tests.bounds.row import Example
from tests.bounds.search import claimed_constant, execute, stretch


def _example(query: Array, key: Array, value: Array, tokens: int, heads: int, tau: float, radius: float) -> Example:
    scalars = {"temperature": tau, "radius": radius}
    names = {"query": "query", "key": "key", "value": "value"}
    node = Node("softmax_attention@1", (0,), {"heads": heads}, names, scalars)
    return Example(node, ((tokens, query.shape[1]),), {"query": query, "key": key, "value": value})


def _rows(width: int, *axes: int) -> Array:
    return np.eye(width, dtype=np.float32)[list(axes)]


def _averaging() -> tuple[Example, Array]:
    """Equal scores: all tokens that move alike move their mean, so values alone give 1."""
    zero = np.zeros((2, 2), np.float32)
    return _example(zero, zero, np.eye(2, dtype=np.float32), 3, 1, 1e-3, 2.0), np.full((3, 2), 0.1)


def _one_key_for_all() -> tuple[Example, Array]:
    """All queries read the first key (tau is large), whose value moves: sqrt(N), and c is N p for this p."""
    x = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [1.0, -1.0, 0.0]])
    rows = [np.concatenate([_rows(3, axis), np.zeros((1, 3), np.float32)]) for axis in (0, 1, 2)]
    return _example(*rows, 4, 1, 4.0, 1e-4), x


def _queries_and_keys() -> tuple[Example, Array]:
    """Queries +-e1 and keys +-e2 that turn towards each other, values +-r: 2 tau r, with tau small so that c is 1."""
    radius = 1e5
    query, key = _rows(3, 0, 1), _rows(3, 1, 0)  # x reads (q, k) = (e1, e2); the direction along axis 1 turns both
    value = np.concatenate([_rows(3, 2), np.zeros((1, 3), np.float32)])
    x = np.array([[1.0, 0.0, radius], [-1.0, 0.0, -radius]])
    return _example(query, key, value, 2, 1, 1e-3, radius), x


def _one_key_moves() -> tuple[Example, Array]:
    """One key of 64, with half of each query's weight, moves along all: sqrt(N) tau r / 2, near tau r sqrt(c)."""
    tokens, radius = 64, 100.0
    x = np.tile([1.0, -1.0, -radius], (tokens, 1))
    x[0] = [1.0, 1.0, radius]
    rows = [np.concatenate([_rows(3, axis), np.zeros((1, 3), np.float32)]) for axis in (0, 1, 2)]
    return _example(*rows, tokens, 1, 0.5 * float(np.log(tokens - 1)), radius), x


def _values_of_two_tokens() -> tuple[Example, Array]:
    """Two heads that read different tokens, each of which moves by one: sqrt(2), where |W_v| is 1."""
    query = np.concatenate([_rows(4, 0), np.zeros((1, 4), np.float32)] * 2)
    key = np.concatenate([_rows(4, 1), np.zeros((1, 4), np.float32), -_rows(4, 1), np.zeros((1, 4), np.float32)])
    value = np.concatenate([_rows(4, 2), np.zeros((1, 4), np.float32), _rows(4, 3), np.zeros((1, 4), np.float32)])
    x = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]])
    return _example(query, key, value, 2, 2, 8.0, 1e-7), x


_REACHED: list[tuple[Geometry, Callable[[], tuple[Example, Array]]]] = [
    ("l2", _averaging),
    ("token_max", _averaging),
    ("l2", _one_key_for_all),
    ("l2", _queries_and_keys),
    ("token_max", _queries_and_keys),
    ("token_max", _values_of_two_tokens),
]


def _ratio(example: Example, x: Array, geometry: Geometry) -> float:
    def function(point: torch.Tensor) -> torch.Tensor:
        return execute(example, [point[None]])[0]

    # inside the kinks of the balls: a hair's breadth shorter than the radius
    points = torch.tensor(x)[None] * (1.0 - 1e-9)
    return float(stretch(torch.func.vmap(torch.func.jacrev(function))(points), example.shapes[0], geometry).max())


@pytest.mark.parametrize(("geometry", "make"), _REACHED, ids=lambda value: getattr(value, "__name__", value))
def test_the_bound_is_reached(geometry: Geometry, make: Callable[[], tuple[Example, Array]]) -> None:
    example, x = make()
    bound = claimed_constant(example, geometry)
    assert 0.98 * bound < _ratio(example, x, geometry) <= bound


class _WithoutQueries(SoftmaxAttention):
    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (super().gains(call, geometry)[0] - self._norm(call, "query", "tr", self._strength(call)),)


class _WithoutColumns(SoftmaxAttention):
    def _column_root(self, call: Call) -> list[float]:
        return [1.0] * call.attrs["heads"]


class _WithoutColumnsOfKeys(SoftmaxAttention):
    def _norm(self, call: Call, slot: str, form: str, scale: list[float]) -> float:
        return super()._norm(call, slot, form, self._strength(call) if slot == "key" else scale)


class _WithoutKeys(SoftmaxAttention):
    def _norm(self, call: Call, slot: str, form: str, scale: list[float]) -> float:
        return 0.0 if slot == "key" else super()._norm(call, slot, form, scale)

    def _head_norm(self, call: Call, slot: str, head: int) -> float:
        return 0.0 if slot == "key" else super()._head_norm(call, slot, head)


class _WithoutValues(SoftmaxAttention):
    def _norm(self, call: Call, slot: str, form: str, scale: list[float]) -> float:
        return 0.0 if slot == "value" else super()._norm(call, slot, form, scale)

    def _head_norm(self, call: Call, slot: str, head: int) -> float:
        return 0.0 if slot == "value" else super()._head_norm(call, slot, head)


class _WithOneMatrixForAllHeads(SoftmaxAttention):
    def _head_norm(self, call: Call, slot: str, head: int) -> float:
        norm = call.norm(slot)
        return norm / float(np.sqrt(call.attrs["heads"]))


def test_the_example_of_one_key_is_close() -> None:
    example, x = _one_key_moves()
    assert 0.5 < _ratio(example, x, "l2") / claimed_constant(example, "l2") <= 1.0


@pytest.mark.parametrize(
    "mistake",
    [
        _WithoutQueries,
        _WithoutColumns,
        _WithoutColumnsOfKeys,
        _WithoutKeys,
        _WithoutValues,
        _WithOneMatrixForAllHeads,
    ],
)
def test_a_forgotten_term_is_found(mistake: type[Rule]) -> None:
    caught = [
        geometry
        for geometry, make in [*_REACHED, ("l2", _one_key_moves)]
        for example, x in [make()]
        if _ratio(example, x, geometry) > claimed_constant(example, geometry, mistake())
    ]
    assert caught


def test_the_published_formula_is_exceeded() -> None:
    """(1/3) w (v + 2 v a^2 q k), in RMS norms, says 1 for orthogonal maps and unit RMS tokens: 1.37 is reached.

    A head may hold all of a token's norm, which the formula spreads over the heads (here four).
    """
    width, heads = 32, 4
    per_head = width // heads
    turn = torch.eye(width, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])

    def attention(x_ND: torch.Tensor) -> torch.Tensor:
        query = x_ND @ turn.T
        outputs = []
        for h in range(heads):
            cut = slice(h * per_head, (h + 1) * per_head)
            scores = query[:, cut] @ x_ND[:, cut].T / per_head
            scores = scores.masked_fill(torch.triu(torch.ones(2, 2, dtype=torch.bool), 1), -torch.inf)
            outputs.append(torch.softmax(scores, dim=-1) @ x_ND[:, cut])
        return torch.cat(outputs, dim=-1) / 3.0

    x = torch.zeros(2, width, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, -1.0]) * width**0.5
    step = torch.zeros_like(x)
    step[:, 1] = width**0.5
    moved = torch.einsum("ndme,me->nd", torch.func.jacrev(attention)(x), step)
    ratio = float(moved.norm(dim=1).amax() / step.norm(dim=1).amax())
    formula = (1.0 / 3.0) * (1.0 + 2.0)
    assert ratio > 1.3 * formula
