"""A trace shows the kernel's own numbers, in a form that gives them again by hand, also beyond float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hf_lipschitz.bounds.engine import bound_program
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rule import GEOMETRIES, Call, Geometry, Rule, Shape
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.trace import Magnitude, Step, Trace, trace_program
from hf_lipschitz.trace_tree import Again, Block, Item, Leaf
from tests.bounds.cases import ROWS
from tests.bounds.row import Row
from tests.bounds.search import ask
from tests.bounds.test_random_programs import _program

LINEAR = {"transpose": False}


class Builder:
    """A program of (4,) vectors whose matrices are multiples of the identity."""

    def __init__(self) -> None:
        self.nodes = [Node("input@1", (), {"shape": [4], "space": "pixels[0,1]"})]
        self.weights: dict[str, Array] = {}

    def linear(self, name: str, x: int, factor: float) -> int:
        self.weights[f"{name}.weight"] = factor * np.eye(4)
        return self.add("linear@1", x, attrs=LINEAR, tensors={"weight": f"{name}.weight"})

    def add(self, op: str, *inputs: int, **fields: Any) -> int:
        self.nodes.append(Node(op, inputs, **fields))
        return len(self.nodes) - 1

    def trace(self, end: int, rules: dict[str, Rule] | None = None, geometry: Geometry = "l2") -> Trace:
        program = Program(tuple(self.nodes), {"features": end, "logits": end})
        return trace_program(program, self.weights, {**BUILT_IN, **(rules or {})}, geometry=geometry)


class Root(Rule):
    """Both inputs side by side, without ``gains``: the trace has to ask for each input alone."""

    op, source, arity, warning = "root@1", "test", 2, "only for tests"

    def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
        return math.hypot(*incoming)


class Largest(Root):
    op, source = "largest@1", "test"

    def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
        return max(3.0 * incoming[0], 2.0 * incoming[1])


class Odd(Root):
    op, source = "odd@1", "test"

    def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
        return 0.9 * sum(incoming) + 0.05 * max(incoming)


def block(builder: Builder, name: str, x: int, factor: float) -> int:
    """x + fc2(abs(fc1 x)), then abs."""
    inside = builder.linear(f"{name}.fc1", x, factor)
    inside = builder.add("abs@1", inside, attrs={"channels": 4})
    inside = builder.linear(f"{name}.fc2", inside, 2.0)
    met = builder.add("add@1", x, inside)
    return builder.add("abs@1", met, attrs={"channels": 4})


def leaves(items: Iterable[Item]) -> list[Leaf]:
    found: list[Leaf] = []
    for item in items:
        if isinstance(item, Block):
            found += leaves(item.items)
        elif isinstance(item, Leaf):
            found += [item, *(leaf for branch in item.branches for leaf in leaves(branch))]
    return found


def by_hand(step: Step) -> float:
    """What a reader computes from the figures of a node."""
    incoming = [each.value for each in step.incoming]
    products = [each * gain for each, gain in zip(incoming, step.gains, strict=True)]
    known = {"sum": sum(products), "root": math.hypot(*products), "largest": max(products, default=1.0)}
    return known.get(step.formula, max(incoming, default=1.0))


# The kernel's numbers


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(20))
def test_every_node_has_the_kernels_bound_and_can_be_redone(seed: int, geometry: Geometry) -> None:
    program, weights = _program(seed)
    bound = bound_program(program, weights, BUILT_IN, geometry=geometry)
    trace = trace_program(program, weights, BUILT_IN, geometry=geometry)
    assert [step.outgoing.value for step in trace.steps] == [node.lipschitz for node in bound.nodes]
    assert [step.size for step in trace.steps] == [node.size for node in bound.nodes]
    assert trace.bound("features").value == bound.outputs["features"].lipschitz
    for step in trace.steps:
        assert [each.value for each in step.incoming] == [bound.nodes[i].lipschitz for i in step.inputs]
        if step.inputs:
            assert step.formula != "own"
            assert by_hand(step) == pytest.approx(step.outgoing.value, rel=1e-11)
        assert step.outgoing.log10 == pytest.approx(math.log10(step.outgoing.value), abs=1e-12)
    used = {label for step in trace.steps for label, _ in step.norms}
    assert used == set(bound.norms.bounds)
    listed = [leaf.index for leaf in leaves(trace.tree)]
    assert sorted(listed) == list(range(len(program.nodes)))  # each node once
    json.dumps(trace.to_json(), allow_nan=False)


def test_a_wrong_factor_does_not_give_the_bound_by_hand() -> None:
    """The test above can fail."""
    builder = Builder()
    step = builder.trace(builder.linear("a", 0, 3.0)).steps[1]
    assert by_hand(step) == pytest.approx(step.outgoing.value, rel=1e-11)
    assert by_hand(replace(step, gains=(0.98 * step.gains[0],))) != pytest.approx(step.outgoing.value, rel=1e-3)
    assert by_hand(replace(step, formula="largest input")) != pytest.approx(step.outgoing.value, rel=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_every_rule_is_homogeneous(row: Row, geometry: Geometry) -> None:
    """What the trace rests on beyond float64: inputs scaled by a power of two scale the bound by it."""
    rule, call = ask(row.example("gaussian"))
    incoming = tuple(1.0 + 0.5 * place for place in range(len(row.shapes)))
    value = rule.lipschitz(call, geometry, incoming)
    for power in (2.0**40, 2.0**-40):
        scaled = rule.lipschitz(call, geometry, tuple(power * each for each in incoming))
        assert scaled == pytest.approx(power * value, rel=1e-14)


# Formulas


@pytest.mark.parametrize(
    ("rule", "formula", "gains", "value"),
    [
        (Root(), "root", (1.0, 1.0), math.hypot(3.0, 4.0)),
        (Largest(), "largest", (3.0, 2.0), 9.0),
        (Odd(), "own", (0.95, 0.95), 0.9 * 7.0 + 0.05 * 4.0),
    ],
    ids=lambda value: value.op if isinstance(value, Rule) else "",
)
def test_formulas(rule: Rule, formula: str, gains: tuple[float, ...], value: float) -> None:
    builder = Builder()
    end = builder.add(rule.op, builder.linear("a", 0, 3.0), builder.linear("b", 0, 4.0))
    step = builder.trace(end, {rule.op: rule}).steps[end]
    assert step.formula == formula and step.gains == pytest.approx(gains)
    assert step.outgoing.value == pytest.approx(value, rel=1e-9)
    assert [each.value for each in step.incoming] == pytest.approx([3.0, 4.0])


def test_a_convex_combination_is_the_larger_input() -> None:
    builder = Builder()
    a, b = builder.linear("a", 0, 3.0), builder.linear("b", 0, 3.0)
    end = builder.add("residual@1", a, b, scalars={"weight": 0.5})
    step = builder.trace(end).steps[end]
    assert step.scalars == {"weight": (0.5, 0.5)}
    assert step.formula in ("sum", "largest input") and step.outgoing.value == pytest.approx(3.0)


# Beyond float64


@pytest.mark.parametrize(("factor", "layers"), [(10.0, 400), (1e4, 66), (10.0, 3000)])
def test_a_bound_beyond_float64_keeps_its_logarithm(factor: float, layers: int) -> None:
    builder = Builder()
    x = 0
    for layer in range(layers):
        x = builder.linear(f"layers.{layer}", x, factor)
    trace = builder.trace(x)
    exact = layers * math.log10(factor)
    assert trace.bound().log10 == pytest.approx(exact, rel=1e-9)
    assert trace.bound().value == (math.inf if exact > 308 else pytest.approx(10.0**exact))
    assert any("powers of ten" in note for note in trace.notes()) == (exact > 308)
    assert trace.share(0, x) == 1.0
    json.dumps(trace.to_json(), allow_nan=False)


def test_branches_beyond_float64() -> None:
    """10^400 beside 10^400 is twice as much, beside 10^2 nothing more, and what vanishes beside it is no error."""
    for other, expected in ((400, 400.0 + math.log10(2.0)), (2, 400.0), (0, 400.0)):
        builder = Builder()
        ends = []
        for name, layers in (("a", 400), ("b", other)):
            x = 0
            for layer in range(layers):
                x = builder.linear(f"{name}.{layer}", x, 10.0)
            ends.append(x)
        end = builder.add("add@1", *ends)
        trace = builder.trace(end)
        assert trace.bound().log10 == pytest.approx(expected, rel=1e-9)
        assert trace.steps[end].formula == "sum"
        assert not trace.bound().is_infinite and trace.bound().value == math.inf


class Unbounded(Rule):
    op, source = "unbounded@1", "test"

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (math.inf,)


def test_notes_name_what_is_not_bounded() -> None:
    builder = Builder()
    end = builder.linear("a", builder.add("unbounded@1", 0), 2.0)
    trace = builder.trace(end, {"unbounded@1": Unbounded()})
    assert trace.bound().is_infinite and trace.share(0, end) is None
    assert trace.factor(0, end).is_infinite
    said = "\n".join(trace.notes())
    assert "the bound is infinite from node 1 (unbounded@1) on" in said
    assert "size of the values is not bounded from node 1" in said
    builder = Builder()
    builder.nodes[0] = Node("input@1", (), {"shape": [4], "space": "model_input"})
    assert builder.trace(builder.linear("a", 0, 2.0)).notes() == [
        "inputs may be of any size, so the sizes of most values are not bounded"
    ]
    builder = Builder()
    end = builder.add("root@1", builder.linear("a", 0, 1.0), 0)
    assert builder.trace(end, {"root@1": Root()}).notes() == [f"root@1 at node {end}: only for tests"]


def test_a_fallback_norm_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lipschitz.bounds import spectral

    monkeypatch.setattr(spectral, "_near_orthogonal", lambda *_: None)
    monkeypatch.setattr(spectral, "_candidates", lambda *_: iter(()))
    builder = Builder()
    trace = builder.trace(builder.linear("deep.fc", 0, 2.0))
    assert [note for note in trace.notes() if "'deep.fc.weight'" in note and "fallback" in note]
    assert trace.steps[1].norms[0][1].method == "fallback"


def test_a_bound_of_one_has_no_shares() -> None:
    builder = Builder()
    end = builder.add("abs@1", 0, attrs={"channels": 4})
    trace = builder.trace(end)
    assert trace.bound() == Magnitude(1.0, 0.0) and trace.share(0, end) is None


# The tree


def outline(items: Sequence[Item], steps: Sequence[Step]) -> list[Any]:
    """The tree as lists: a block is (path, items), a node its operation or (operation, branches)."""
    found: list[Any] = []
    for item in items:
        if isinstance(item, Block):
            found.append((".".join(item.path), outline(item.items, steps)))
        elif isinstance(item, Again):
            found.append(f"again {item.index}")
        elif item.branches:
            found.append((steps[item.index].op, [outline(branch, steps) for branch in item.branches]))
        else:
            found.append(steps[item.index].op)
    return found


def test_residual_blocks_become_branches_of_their_modules() -> None:
    builder = Builder()
    x = builder.linear("stem", 0, 1.5)
    for number in range(2):
        x = block(builder, f"blocks.{number}", x, 3.0)
    end = builder.linear("head", x, 1.0)
    trace = builder.trace(end)
    inside = ["linear@1", "abs@1", "linear@1"]
    one = [("add@1", [[], inside]), "abs@1"]
    assert outline(trace.tree, trace.steps) == [
        "input@1",
        "linear@1",
        ("blocks", [("blocks.0", one), ("blocks.1", one)]),
        "linear@1",
    ]
    assert trace.bound().value == pytest.approx(1.5 * 7.0 * 7.0)
    blocks = next(item for item in trace.tree if isinstance(item, Block))
    shares = [trace.share(each.before, each.index) for each in blocks.items if isinstance(each, Block)]
    assert shares == pytest.approx([math.log(7.0) / math.log(73.5)] * 2)
    assert sum(trace.share(item.before, item.index) or 0.0 for item in trace.tree) == pytest.approx(1.0)
    assert trace.factor(blocks.before, blocks.index).value == pytest.approx(49.0)


def test_a_value_used_in_two_branches_is_shown_once() -> None:
    builder = Builder()
    shared = builder.linear("net.shared", 0, 2.0)
    left, right = builder.linear("net.left", shared, 3.0), builder.linear("net.right", shared, 5.0)
    inner = builder.add("add@1", left, right)
    end = builder.add("add@1", builder.add("add@1", inner, left), 0)
    trace = builder.trace(end)
    assert len(leaves(trace.tree)) == len(builder.nodes)
    drawn = json.dumps(outline(trace.tree, trace.steps))
    assert drawn.count("again") == 1 and f"again {left}" in drawn
    assert trace.bound().value == pytest.approx(16.0 + 6.0 + 1.0)


def test_the_input_may_stand_in_a_module() -> None:
    """As a token embedding does."""
    builder = Builder()
    x = builder.linear("model.a", 0, 2.0)
    x = builder.linear("model.b", x, 2.0)
    trace = builder.trace(x)
    assert trace.factor(-1, x).value == pytest.approx(4.0) and trace.share(-1, x) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("op", "shape", "attrs", "path"),
    [
        ("abs@1", (6, 4), {"channels": 4}, ("net",)),  # beside what it follows
        ("l2_pool@1", (4,), {"eps": 1e-6}, ("net",)),  # what both neighbours have in common
    ],
)
def test_an_operation_without_tensors_is_counted_with_its_neighbours(
    op: str, shape: Shape, attrs: dict[str, Any], path: tuple[str, ...]
) -> None:
    nodes = (
        Node("input@1", (), {"shape": [6, 4], "space": "model_input"}),
        Node("linear@1", (0,), LINEAR, {"weight": "net.a.weight"}),
        Node(op, (1,), attrs),
        Node("linear@1", (2,), LINEAR, {"weight": "net.b.weight"}),
    )
    weights = {"net.a.weight": np.eye(4), "net.b.weight": np.eye(4)}
    trace = trace_program(Program(nodes, {"features": 3, "logits": 3}), weights, BUILT_IN)
    assert trace.steps[2].path == path and trace.steps[2].shape == shape
    assert trace.steps[1].path == ("net", "a")


def test_features_that_do_not_lead_to_the_logits_are_shown_too() -> None:
    builder = Builder()
    features = builder.linear("features", 0, 2.0)
    logits = builder.linear("logits", 0, 3.0)
    program = Program(tuple(builder.nodes), {"features": features, "logits": logits})
    trace = trace_program(program, builder.weights, BUILT_IN)
    assert sorted(leaf.index for leaf in leaves(trace.tree)) == [0, 1, 2]
