"""The engine fails closed: what program and weights do not say about each other is refused, with the place named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hf_lipschitz.bounds import engine
from hf_lipschitz.bounds.check import derive
from hf_lipschitz.bounds.engine import bound_program, evaluate_program, rounding_error
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rule import Call, Rule
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.trust_base import extended

Weights = dict[str, Array]


def _input(*shape: int, space: str = "pixels[0,1]") -> Node:
    return Node("input@1", (), {"shape": list(shape), "space": space})


def _linear(source: int, weight: str, bias: str | None = None) -> Node:
    tensors = {"weight": weight} | ({"bias": bias} if bias else {})
    return Node("linear@1", (source,), {"transpose": False}, tensors)


def _chain(*nodes: Node, features: int = -1) -> Program:
    last = len(nodes) - 1
    return Program(nodes, {"features": last if features < 0 else features, "logits": last})


def _program() -> Program:
    head = Node("normalized_linear@1", (2,), {"eps": 1e-12}, {"weight": "head"})
    return _chain(_input(4), _linear(0, "w", "b"), Node("maxmin@1", (1,)), head, features=2)


def _weights() -> Weights:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4), "b": (4,), "head": (3, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _bound(program: Program, weights: Weights, geometry: Any = "l2") -> float:
    return bound_program(program, weights, BUILT_IN, geometry=geometry).outputs["logits"].lipschitz


def test_the_good_program() -> None:
    program, weights = _program(), _weights()
    bound = bound_program(program, weights, BUILT_IN)
    sigma = [float(np.linalg.norm(m, 2)) for m in (weights["w"], _unit_rows(weights["head"]))]
    assert bound.outputs["features"].lipschitz == pytest.approx(sigma[0], rel=1e-6)
    assert bound.outputs["logits"].lipschitz == pytest.approx(sigma[0] * sigma[1], rel=1e-6)
    assert bound.shapes == ((4,), (4,), (4,), (3,))
    executed = evaluate_program(program, weights, BUILT_IN, np.random.default_rng(1).random((5, 4)))
    assert executed["features"].shape == (5, 4) and executed["logits"].shape == (5, 3)


def _unit_rows(matrix: Array) -> Array:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def _without(name: str) -> Weights:
    return {key: value for key, value in _weights().items() if key != name}


def _with(**changed: Any) -> Weights:
    return _weights() | {name: np.asarray(value) for name, value in changed.items()}


def _nan(name: str, value: float) -> Weights:
    weights = _weights()
    weights[name] = weights[name].copy()
    weights[name].flat[1] = value
    return weights


_BAD_WEIGHTS = [
    ("missing", _without("b"), "tensor 'b' is read by the program but missing"),
    ("uncovered", _with(extra=np.zeros(3, np.float32)), "tensor 'extra' is stored but not covered"),
    ("uncovered counter of another name", _with(num_batches=np.zeros(1)), "'num_batches' is stored but not covered"),
    ("NaN", _nan("w", np.nan), r"node 1 \(linear@1\): tensor 'w' contains NaN or infinite"),
    ("infinite", _nan("b", -np.inf), r"node 1 \(linear@1\): tensor 'b' contains NaN or infinite"),
    ("NaN in the head", _nan("head", np.nan), r"node 3 \(normalized_linear@1\): tensor 'head' contains NaN"),
    ("wrong width", _with(w=np.ones((4, 5), np.float32)), r"node 1 \(linear@1\): tensor 'w' takes 5 channels, .* 4"),
    ("wrong bias", _with(b=np.ones(3, np.float32)), r"node 1 \(linear@1\): tensor 'b' needs 4 entries"),
    ("wrong head", _with(head=np.ones((3, 5), np.float32)), r"tensor 'head' takes \(5,\)"),
    (
        "wrong dimensions",
        _with(w=np.ones(4, np.float32)),
        r"node 1 \(linear@1\): tensor 'w' is float32 of shape \(4,\)",
    ),
    ("integers", _with(w=np.ones((4, 4), np.int64)), r"tensor 'w' is int64 of shape"),
    ("empty", _with(w=np.ones((0, 4), np.float32)), r"tensor 'w' is float32 of shape \(0, 4\)"),
]


@pytest.mark.parametrize(
    ("weights", "message"), [row[1:] for row in _BAD_WEIGHTS], ids=[row[0] for row in _BAD_WEIGHTS]
)
def test_weights_that_are_refused(weights: Weights, message: str) -> None:
    for read in (lambda: bound_program(_program(), weights, BUILT_IN), lambda: _execute(_program(), weights)):
        with pytest.raises(KernelError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)


def _execute(program: Program, weights: Weights) -> Any:
    return evaluate_program(program, weights, BUILT_IN, np.zeros((1, *program.nodes[0].attrs["shape"])))


def test_a_counter_is_not_read() -> None:
    assert _bound(_program(), _with(**{"norm.num_batches_tracked": np.array(7)})) == _bound(_program(), _weights())


_NODE = {"op": "linear@1", "inputs": (0,), "attrs": {"transpose": False}, "tensors": {"weight": "w", "bias": "b"}}
_BAD_NODES: list[tuple[str, dict[str, Any], str]] = [
    ("unknown operation", {"op": "softmax@1"}, "no rule named 'softmax@1'; known: abs@1"),
    ("another version", {"op": "linear@2"}, "no rule named 'linear@2'"),
    ("unknown attribute", {"attrs": {"transpose": False, "bias": True}}, "unknown attribute 'bias'; known: transpose"),
    ("missing attribute", {"attrs": {}}, "the attribute 'transpose' is missing"),
    ("attribute of another type", {"attrs": {"transpose": 0}}, "attribute 'transpose' has the inadmissible value 0"),
    ("null attribute", {"attrs": {"transpose": None}}, "attribute 'transpose' has the inadmissible value None"),
    ("unknown slot", {"tensors": {"weight": "w", "bias": "b", "gain": "b"}}, "unknown tensor slot 'gain'"),
    ("missing slot", {"tensors": {"bias": "b"}}, "the tensor slot 'weight' is missing"),
    ("unknown scalar", {"scalars": {"factor": 1.0}}, "unknown scalar 'factor'; known: none"),
    ("no input", {"inputs": ()}, "takes 1 inputs, got 0"),
    ("two inputs", {"inputs": (0, 0)}, "takes 1 inputs, got 2"),
    ("missing scalar", {"op": "scale@1", "attrs": {}, "tensors": {}}, "the scalar 'factor' is missing"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in _BAD_NODES], ids=[row[0] for row in _BAD_NODES])
def test_nodes_that_are_refused(change: dict[str, Any], message: str) -> None:
    node = Node(**{**_NODE, **change})
    program = _chain(_input(4), node)
    weights = {name: value for name, value in _weights().items() if name in program.tensor_names()}
    with pytest.raises(KernelError, match=rf"node 1 \({node.op}\): {message}"):
        bound_program(program, weights, BUILT_IN)


_BAD_ATTRIBUTES: list[tuple[Node, tuple[int, ...]]] = [
    *((Node("patchify@1", (0,), {"patch": patch}), (1, 4, 4)) for patch in (0, -1, 3, 2.0, True, "2", 4097)),
    *(
        (Node("patch_merge@1", (0,), {"height": h, "width": w, "factor": f}), (4, 2))
        for h, w, f in ((2, 3, 1), (1, 4, 2))
    ),
    *((Node("shift@1", (0,), {"height": 2, "width": 2, "moved": m}), (4, 8)) for m in (0, 3, -1)),
    (Node("shift@1", (0,), {"height": 3, "width": 2, "moved": 1}), (4, 8)),
    *((Node("group_sort@1", (0,), {"group": g}), (2, 6)) for g in (1, 0, 4, 12)),
    *((Node("abs@1", (0,), {"channels": c}), (2, 6)) for c in (0, 7)),
    *(
        (Node("l2_pool@1", (0,), {"eps": e}), (2, 6))
        for e in (0.0, -1e-3, 1e-13, 2.0, math.inf, math.nan, 10**400, "1")
    ),
    *(
        (Node("normalize@1", (0,), {"mean": m, "std": s}), (1, 2, 2))
        for m, s in (([0.0], [0.0]), ([0.0], [-1.0]), ([], []))
    ),
    *(
        (Node("normalize@1", (0,), {"mean": m, "std": s}), (1, 2, 2))
        for m, s in (([0.0] * 2, [1.0]), ([10**400], [1.0]))
    ),
    (Node("normalize@1", (0,), {"mean": [0.0], "std": [1.0]}), (4, 4)),
    (Node("maxmin@1", (0,)), (2, 5)),
    (Node("maxmin@1", (0,)), (2, 4, 4)),
    (Node("group_sort@1", (0,), {"group": 2}), (2, 4, 4)),
    (Node("abs@1", (0,), {"channels": 2}), (2, 4, 4)),
    (Node("sum_pool@1", (0,)), (4,)),
    (Node("sum_pool@1", (0,)), (1, 4, 4)),
    (Node("patchify@1", (0,), {"patch": 1}), (4, 4)),
    (Node("scale@1", (0,), scalars={"factor": ["div", 1, 0]}), (4,)),
    (Node("scale@1", (0,), scalars={"factor": ["sqrt", -1]}), (4,)),
    (Node("scale@1", (0,), scalars={"factor": ["exp", 1e6]}), (4,)),
    (Node("residual@1", (0, 0), scalars={"weight": ["sub", ["exp", 1e6], ["exp", 1e6]]}), (4,)),
]


@pytest.mark.parametrize(
    ("node", "shape"), _BAD_ATTRIBUTES, ids=[f"{i} {row[0].op}" for i, row in enumerate(_BAD_ATTRIBUTES)]
)
def test_attributes_and_shapes_that_are_refused(node: Node, shape: tuple[int, ...]) -> None:
    """No bound at all, or an infinite one: never a finite bound for what is not covered."""
    try:
        bound = _bound(_chain(_input(*shape), node), {})
    except KernelError as error:
        assert f"node 1 ({node.op})" in str(error)
    else:
        assert bound == math.inf


@pytest.mark.parametrize("axis", ["channel", "token", "entry"])
@pytest.mark.parametrize(("shape", "entries"), [((4,), 4), ((4,), 1), ((2, 4), 3), ((2, 4, 4), 4), ((2, 4, 4), 2)])
def test_offsets_that_do_not_fit_are_refused(axis: str, shape: tuple[int, ...], entries: int) -> None:
    fits = {"channel": shape[0] if len(shape) == 3 else shape[-1], "token": -1, "entry": 4 if shape == (4,) else -1}
    if fits[axis] == entries:
        return
    node = Node("offset@1", (0,), {"axis": axis, "negative": False}, {"offset": "o"})
    with pytest.raises(KernelError, match=r"node 1 \(offset@1\)"):
        _bound(_chain(_input(*shape), node), {"o": np.ones(entries, np.float32)})


def test_a_program_has_one_input() -> None:
    two = Program(
        (_input(4), _input(4), Node("residual@1", (0, 1), scalars={"weight": 0.5})), {"features": 2, "logits": 2}
    )
    with pytest.raises(KernelError, match="exactly one input node, this one has 2"):
        _bound(two, {})
    with pytest.raises(KernelError, match="exactly one input node, this one has 0"):
        _bound(Program((Node("maxmin@1", ()),), {"features": 0, "logits": 0}), {})


def test_an_unknown_geometry_is_refused() -> None:
    with pytest.raises(KernelError, match="unknown geometry 'linf'"):
        _bound(_program(), _weights(), "linf")


# What follows was once wrong: a finite bound that some input exceeds.


def test_a_tensor_cannot_pass_for_a_norm_derived_from_another() -> None:
    """Norms are kept by label; a stored tensor named like a derived norm would have lent its own, small, one."""
    for name in ("head|rows@2", "head|rows", "head|abs", "|", "w|"):
        program = _chain(
            _input(4), _linear(0, name), Node("normalized_linear@1", (1,), {"eps": 1e-12}, {"weight": "head"})
        )
        weights = {name: 1e-6 * np.eye(4, dtype=np.float32), "head": np.ones((9, 4), np.float32)}
        with pytest.raises(KernelError, match=r"a name with '\|'"):
            _bound(program, weights)


def test_nodes_that_share_a_tensor_do_not_share_what_depends_on_the_node() -> None:
    """The second attention of the same weights is hot, the first was cold: each has its own bound."""

    def attention(source: int, temperature: float) -> Node:
        slots = dict.fromkeys(("query", "key", "value"), "w")
        scalars = {"temperature": temperature, "radius": 1.0}
        return Node("softmax_attention@1", (source,), {"heads": 1}, slots, scalars)

    weights: Weights = {"w": np.eye(4, dtype=np.float32)}
    cold_first = _bound(_chain(_input(3, 4), attention(0, 1e-6), attention(1, 20.0)), weights)
    hot_first = _bound(_chain(_input(3, 4), attention(0, 20.0), attention(1, 1e-6)), weights)
    alone = _bound(_chain(_input(3, 4), attention(0, 20.0)), weights)
    assert cold_first == pytest.approx(hot_first, rel=1e-12)
    assert cold_first >= alone > 50.0


def test_heads_that_share_a_tensor_do_not_share_their_rows() -> None:
    """eps decides what the rows are: long rows for the first head, unit rows for the second."""
    nodes = [Node("normalized_linear@1", (i,), {"eps": eps}, {"weight": "w"}) for i, eps in enumerate((1.0, 1e-12))]
    weights: Weights = {"w": 1e-3 * np.eye(3, dtype=np.float32)}
    bounds = bound_program(_chain(_input(3), *nodes), weights, BUILT_IN).nodes
    assert bounds[1].lipschitz == pytest.approx(1e-3)
    assert bounds[2].lipschitz == pytest.approx(1e-3)


@pytest.mark.parametrize("size", [1e200, 1e300, 1e154, 1e-200, 1e-320])
def test_rows_of_any_length_are_unit_rows(size: float) -> None:
    """The square of a long row overflows: it was read as a row of zeros."""
    node = Node("normalized_linear@1", (0,), {"eps": 1e-12}, {"weight": "w"})
    program = _chain(_input(2), node)
    weights: Weights = {"w": np.array([[size, 0.0], [1.0, 0.0], [3.0, 4.0]])}
    norm = float(np.linalg.norm(np.array([[min(1.0, size / 1e-12), 0.0], [1.0, 0.0], [0.6, 0.8]]), 2))
    assert _bound(program, weights) == pytest.approx(norm, rel=1e-12)
    logits = _execute_at(program, weights, np.array([[1.0, 0.5]]))
    assert logits[0] == pytest.approx([min(1.0, size / 1e-12), 1.0, 1.0])


def _execute_at(program: Program, weights: Weights, x: Array) -> Array:
    return evaluate_program(program, weights, BUILT_IN, x)["logits"]


def test_small_float64_weights_are_not_lost() -> None:
    weights: Weights = {"w": np.array([[2.0**-1074, 0.0], [0.0, 2.0**-1074]])}
    assert 2.0**-1074 <= _bound(_chain(_input(2), _linear(0, "w")), weights) <= 2.0**-1072


def _rounding(program: Program, weights: Weights, dtype: str) -> float:
    bound = bound_program(program, weights, BUILT_IN)
    return rounding_error(program, weights, BUILT_IN, dtype, bound).logits_error


@pytest.mark.parametrize(
    ("dtype", "value", "holds"),
    [
        ("float32", np.float64(0.1), False),
        ("float32", np.float64(0.5), True),
        ("float32", np.float32(0.1), True),
        ("float32", np.float16(0.1), True),
        ("float32", np.float64(2.0**-149), True),
        ("float32", np.float64(2.0**-150), False),
        ("float32", np.float64(1e300), False),
        ("float64", np.float64(0.1), True),
        ("bfloat16", np.float32(0.1), False),
        ("bfloat16", np.float32(0.5), True),
        ("bfloat16", np.float16(0.1), False),
        ("bfloat16", np.float64(1.0 + 2.0**-20), False),
    ],
)
def test_no_rounding_claim_for_weights_that_the_dtype_does_not_hold(dtype: str, value: Any, holds: bool) -> None:
    """A float64 checkpoint deployed in float32 is another network: its weights are rounded too."""
    node = Node("offset@1", (0,), {"axis": "channel", "negative": False}, {"offset": "o"})
    error = _rounding(_chain(_input(1), node), {"o": np.array([value])}, dtype)
    assert math.isfinite(error) == holds


def test_no_rounding_claim_where_something_may_overflow() -> None:
    """1e60 is no float32, whatever the next layers make of it; nor are squares of 1e20."""
    small, large = np.full((1, 1), 2.0**-50, np.float32), np.full((1, 1), 2.0**50, np.float32)
    nodes = [_linear(i, name) for i, name in enumerate(("large", "large", "large", "small", "small", "small"))]
    program = _chain(_input(1), *nodes)
    weights: Weights = {"large": large, "small": small}
    assert _bound(program, weights) == pytest.approx(1.0, rel=1e-6)
    assert _rounding(program, weights, "float32") == math.inf
    assert _rounding(program, weights, "float64") < 1e-12
    assert math.isfinite(_rounding(_chain(_input(1), _linear(0, "large"), _linear(1, "small")), weights, "float32"))
    pooled = _chain(_input(1, 1), _linear(0, "w"), Node("l2_pool@1", (1,), {"eps": 1e-12}))
    assert _rounding(pooled, {"w": np.full((1, 1), 1e20, np.float32)}, "float32") == math.inf
    scaled = _chain(_input(1), Node("scale@1", (0,), scalars={"factor": ["div", ["exp", 200], ["exp", 200]]}))
    assert _rounding(scaled, {}, "float32") == math.inf
    assert _rounding(scaled, {}, "float64") < 1e-12


def test_derive_states_what_it_may() -> None:
    """token_max has no rounding claim, l2 has one for each dtype, infinite where weights are not exact in it."""
    rounding = derive(_program(), _weights(), BUILT_IN).rounding
    assert set(rounding) == {"float64", "float32", "bfloat16"}
    assert math.isfinite(rounding["float32"].logits_error) and rounding["bfloat16"].logits_error == math.inf
    assert derive(_program(), _weights(), BUILT_IN, geometry="token_max").rounding == {}


class _Half(Rule):
    """A third-party rule: x / 2."""

    op = "acme::half@1"
    source = "|x / 2| = |x| / 2"

    def apply(self, call: Call, *values: Array) -> Array:
        return values[0] / 2.0

    def gains(self, call: Call, geometry: Any) -> tuple[float, ...]:
        return (0.5,)


def test_third_party_rules() -> None:
    program = _chain(_input(4), Node("acme::half@1", (0,)))
    with pytest.raises(KernelError, match="no rule named 'acme::half@1'"):
        bound_program(program, {}, BUILT_IN)
    rules = extended(BUILT_IN, (_Half(),))
    bound = bound_program(program, {}, rules)
    assert bound.outputs["logits"].lipschitz == 0.5
    with pytest.raises(KernelError, match="no rounding bound"):
        rounding_error(program, {}, rules, "float32", bound)
    with pytest.raises(KernelError, match="already defined"):
        extended(rules, (_Half(),))


@pytest.mark.parametrize("name", ["half@1", "linear@1", "acme::half", "half"])
def test_third_party_rules_of_another_name_are_refused(name: str) -> None:
    rule = type("_Named", (_Half,), {"op": name})()
    with pytest.raises(KernelError, match="a third-party rule is named"):
        extended(BUILT_IN, (rule,))


def test_a_rule_without_bound_or_with_nan_gives_none() -> None:
    class Nothing(_Half):
        def gains(self, call: Call, geometry: Any) -> tuple[float, ...]:
            return (math.nan,)

    program = _chain(_input(4), Node("acme::half@1", (0,)))
    with pytest.raises(KernelError, match=r"node 1 \(acme::half@1\): the bound is not a number"):
        bound_program(program, {}, extended(BUILT_IN, (Nothing(),)))
    with pytest.raises(KernelError, match="has no bound"):
        bound_program(program, {}, extended(BUILT_IN, (type("_Bare", (Rule,), {"op": "acme::half@1"})(),)))


def _many(count: int, node: Node, *shape: int) -> Program:
    """A chain of the same node, many times."""
    nodes = [Node(node.op, (i,), node.attrs, node.tensors, node.scalars) for i in range(count)]
    return _chain(_input(*shape), *nodes)


_COSTLY = [
    (_many(1, Node("patchify@1", attrs={"patch": 1}), 3, 65536, 4096), {}, "more entries than are allowed"),
    (
        _many(200, Node("scale@1", scalars={"factor": ["max", ["exp", ["tensor", "w"]]]}), 1),
        {"w": np.zeros(65536, np.float32)},
        "scalar expressions cost more",
    ),
    (
        _many(
            3,
            Node(
                "softmax_attention@1",
                attrs={"heads": 1},
                tensors=dict.fromkeys(("query", "key", "value"), "w"),
                scalars={"temperature": 1, "radius": 1},
            ),
            2,
            64,
        ),
        {"w": np.ones((64, 64), np.float32)},
        "cost more than its tensors justify",
    ),
]


@pytest.mark.parametrize(("program", "weights", "message"), _COSTLY, ids=[row[2] for row in _COSTLY])
def test_a_program_that_costs_too_much_is_refused(
    program: Program, weights: Weights, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work is done: what a verifier spends is bounded by what the weights justify."""
    monkeypatch.setattr(engine, "MAX_WORK", 2.0**18)
    monkeypatch.setattr(engine, "WORK_RATIO", 1.0)
    with pytest.raises(KernelError, match=message):
        _bound(program, weights)


def test_bounds_are_proportional_to_the_unit() -> None:
    """So a bound beyond float64 can be read in units of a small one."""
    program, weights = _program(), _weights()
    bound = bound_program(program, weights, BUILT_IN).outputs["logits"].lipschitz
    small = bound_program(program, weights, BUILT_IN, unit=2.0**-600).outputs["logits"].lipschitz
    assert small * 2.0**600 == pytest.approx(bound, rel=1e-12) and small * 2.0**600 >= bound * (1 - 1e-15)
    huge = _many(4, Node("scale@1", scalars={"factor": 1e100}), 1)
    assert _bound(huge, {}) == math.inf
    assert bound_program(huge, {}, BUILT_IN, unit=2.0**-1000).outputs["logits"].lipschitz / 1e100 >= 2.0**-1000 * 1e300
