"""The kernel against a second checker in exact fractions: never below it, above it by no more than what is stated."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rule import GEOMETRIES, Call, Geometry, Rule, Size
from hf_lipschitz.bounds.rules.affine import Linear
from hf_lipschitz.bounds.rules.attention import SoftmaxAttention
from hf_lipschitz.bounds.rules.structure import Residual
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds import test_random_programs
from tests.bounds.cases import ROWS
from tests.bounds.row import Row
from tests.bounds.search import lowered
from tests.second_checker import agreement_norms, elementary, slopes
from tests.second_checker.agreement import (
    KINDS,
    PRECISIONS,
    Disagreement,
    compare_program,
    compare_rounding,
    compare_rule,
    slack_of,
)
from tests.second_checker.exact import Interval, exactly
from tests.second_checker.norms import complex_norm, fractions_of, spectral_norm
from tests.second_checker.table import FORMULAS

_BY_NAME = {row.name: row for row in ROWS}
_KNOWN = [pytest.param(row, id=row.name) for row in ROWS if row.op in FORMULAS]
# Operations whose bound the second checker does not derive, and why.
_NOT_DERIVED: dict[str, str] = {}


def _agrees(row: Row, kind: str, rule: Rule | None = None) -> None:
    example = row.example(kind)
    for geometry in GEOMETRIES:
        compare_rule(example, geometry, rule, slack_of(kind))
    for dtype in PRECISIONS:
        compare_rounding(example, dtype, rule)


def test_every_operation_has_a_formula() -> None:
    assert set(BUILT_IN) - set(FORMULAS) == set(_NOT_DERIVED)
    assert set(FORMULAS) <= set(BUILT_IN)
    assert all(formula.why for formula in FORMULAS.values() if formula.slack > 1e-9)


@pytest.mark.parametrize("row", _KNOWN)
def test_rule(row: Row) -> None:
    """Constant and sizes in both geometries, rounding in float32 and bfloat16."""
    _agrees(row, "gaussian")


@pytest.mark.slow_ci
@pytest.mark.parametrize("row", _KNOWN)
def test_rule_on_other_matrices(row: Row) -> None:
    for kind in set(row.kinds()) & set(KINDS) - {"gaussian"}:
        _agrees(row, kind)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in {row.op: row for row in ROWS}.values()])
def test_a_lowered_constant_is_seen(row: Row) -> None:
    """2 % are far more than any slack, in every rule, sharp or not."""
    rule = lowered(BUILT_IN[row.op])
    for geometry in GEOMETRIES:
        with pytest.raises(Disagreement, match="below the exact"):
            compare_rule(row.example("gaussian"), geometry, rule)


class _NoBias(Linear):
    """Planted: the bias is forgotten in the rounding."""

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return (
            call.dot(call.shapes[0][-1] + 1)
            * call.norm("weight", "abs", lambda: np.abs(call.tensors["weight"]))
            * (incoming[0].total)
        )


class _NoQueries(SoftmaxAttention):
    """Planted: the queries' term is dropped."""

    def _strengths(self, call: Call) -> tuple[list[float], list[float]]:
        of_query, of_key = super()._strengths(call)
        return [0.0] * len(of_query), of_key


class _NoStray(Residual):
    """Planted: the float weight is taken to be the exact one."""

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        object.__setattr__(call, "deviations", {"weight": 0.0})
        return super().rounding(call, roundoff, incoming)


@pytest.mark.parametrize(
    ("name", "rule"), [("linear", _NoBias()), ("attention", _NoQueries()), ("residual", _NoStray())]
)
def test_a_dropped_term_is_seen(name: str, rule: Rule) -> None:
    _agrees(_BY_NAME[name], "gaussian")
    with pytest.raises(Disagreement, match="below the exact"):
        _agrees(_BY_NAME[name], "gaussian", rule)


@pytest.mark.parametrize("seed", range(10))
def test_random_program(seed: int) -> None:
    program, weights = test_random_programs._program(seed)
    for geometry in GEOMETRIES:
        compare_program(program, weights, geometry)


def _tiny_vit() -> tuple[Program, dict[str, Array]]:
    """What a small LipViT computes: patches, two residual blocks (attention; shift and MaxMin), a pool and a head."""
    rng = np.random.default_rng(5)
    names = ("embed", "q", "k", "v", "o", "up", "down")
    weights = {name: rng.standard_normal((4, 4)).astype(np.float32) / 2.0 for name in names}
    weights |= {"tau": np.float32([0.3, -0.2]), "r": np.float32([0.1, 0.4]), "a": np.float32(0.2)}
    weights |= {
        "bias": rng.standard_normal(4).astype(np.float32),
        "head": rng.standard_normal((3, 4)).astype(np.float32),
    }
    weight = {"weight": ["sigmoid", ["tensor", "a"]]}
    scalars = {"temperature": ["softplus", ["tensor", "tau"]], "radius": ["exp", ["tensor", "r"]]}
    plain, axis = {"transpose": False}, {"axis": "channel", "negative": False}
    nodes = (
        Node("input@1", (), {"shape": [1, 4, 4], "space": "pixels[0,1]"}),
        Node("normalize@1", (0,), {"mean": [0.5], "std": [0.25]}),
        Node("patchify@1", (1,), {"patch": 2}),
        Node("linear@1", (2,), plain, {"weight": "embed", "bias": "bias"}),
        Node("softmax_attention@1", (3,), {"heads": 2}, {"query": "q", "key": "k", "value": "v"}, scalars),
        Node("linear@1", (4,), plain, {"weight": "o"}),
        Node("residual@1", (3, 5), {}, {}, weight),
        Node("shift@1", (6,), {"height": 2, "width": 2, "moved": 1}),
        Node("linear@1", (7,), plain, {"weight": "up"}),
        Node("offset@1", (8,), axis, {"offset": "bias"}),
        Node("maxmin@1", (9,)),
        Node("linear@1", (10,), {"transpose": True}, {"weight": "down"}),
        Node("scale@1", (11,), {}, {}, {"factor": ["div", 1, ["exp", ["tensor", "a"]]]}),
        Node("residual@1", (6, 12), {}, {}, weight),
        Node("l2_pool@1", (13,), {"eps": 1e-6}),
        Node("normalized_linear@1", (14,), {"eps": 1e-12}, {"weight": "head"}),
    )
    program = Program(nodes, {"features": 14, "logits": 15})
    return program, {name: np.asarray(weights[name], dtype=np.float32) for name in program.tensor_names()}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_small_vision_transformer(geometry: Geometry) -> None:
    compare_program(*_tiny_vit(), geometry)


def test_a_mistake_in_one_node_of_a_program_is_seen() -> None:
    rules = {**BUILT_IN, "residual@1": lowered(BUILT_IN["residual@1"])}
    with pytest.raises(Disagreement, match=r"node 6 \(residual@1\) in l2"):
        compare_program(*_tiny_vit(), "l2", rules)


def test_norms() -> None:
    agreement_norms.compare_with_exact_norms()
    agreement_norms.compare_with_formula()
    agreement_norms.compare_array_norms()


_POINTS = (0.3, -2.5, 40.0, -100.0, 1e-9, 3.0)
_FUNCTIONS = {
    "exp": mpmath.exp,
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "erf": mpmath.erf,
    "log": mpmath.log,
}


def _holds(interval: Interval, value: mpmath.mpf, width: float) -> None:
    low, high = (mpmath.mpf(end.numerator) / end.denominator for end in (interval.low, interval.high))
    noise = abs(value) * mpmath.mpf(10) ** -75
    assert low - noise <= value <= high + noise
    assert high - low <= width * abs(value)


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_elementary_functions(name: str) -> None:
    """Enclosures hold what mpmath says, and are narrow."""
    with mpmath.workdps(80):
        for point in _POINTS:
            if (name == "log" and point <= 0.0) or (name == "erf" and abs(point) > 5.0):
                continue
            value = _FUNCTIONS[name](mpmath.mpf(point))
            _holds(getattr(elementary, name)(exactly(point)), value, 1e-30)
        _holds(elementary.pi(), mpmath.pi(), 1e-40)


@pytest.mark.parametrize(
    ("function", "value"),
    [(slopes.silu, "1.09983932012887"), (slopes.mish, "1.08849816125128"), (slopes.gelu_tanh, "1.12899306865879")],
)
def test_steepest_slopes(function: object, value: str) -> None:
    found = slopes.steepest(function)  # type: ignore[arg-type]
    assert found.low - Fraction(1, 10**12) <= Fraction(value) <= found.high + Fraction(1, 10**12)


def test_exact_norms() -> None:
    """Known norms: of a diagonal, a rank-one, a rotation, a complex matrix; and an interval is never empty."""
    known = {
        2.0: [[2.0, 0.0], [0.0, -1.0]],
        25.0: [[9.0, 12.0], [12.0, 16.0]],
        5.0: [[3.0, -4.0], [4.0, 3.0]],
        1e-300: [[1e-300]],
    }
    for norm, matrix in known.items():
        found = spectral_norm(fractions_of(matrix))
        assert found.low <= Fraction(norm) <= found.high <= found.low * (1 + Fraction(1, 10**13))
    found = complex_norm(fractions_of([[3.0]]), fractions_of([[4.0]]))
    assert found.low <= 5 <= found.high
