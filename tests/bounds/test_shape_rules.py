"""Shape rules: token gains against a count of entries one by one, embeddings as origin, tiny balls, and refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from hf_lipschitz.bounds.engine import bound_program, evaluate_program, rounding_error
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import UNIT_ROUNDOFF
from hf_lipschitz.bounds.rule import Call, Rule, Size, tokens_of
from hf_lipschitz.bounds.rules.shape import gathered
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds.cases_shape import ROWS
from tests.bounds.row import Example, Row, Shape
from tests.bounds.search import ask

_MOVES = ("pixel_unshuffle@1", "pixel_shuffle@1", "reshape@1", "flatten@1", "permute@1", "slice@1", "pad@1")


def _prepared(op: str, attrs: Mapping[str, Any], *shapes: Shape, radius: Any = None) -> tuple[Rule, Call]:
    node = Node(op, tuple(range(len(shapes))), dict(attrs), {}, {} if radius is None else {"radius": radius})
    return ask(Example(node, shapes, {}))


def _token_numbers(shape: Shape) -> NDArray[np.int64]:
    """For every entry of a sample, the number of its token, counted from 1."""
    tokens = np.arange(1, tokens_of(shape) + 1)
    wide = {3: (1, *shape[1:]), 2: (-1, 1), 1: (1,)}[len(shape)]
    return np.broadcast_to(tokens.reshape(wide), shape)


def _most_sources(moved: NDArray[np.int64]) -> int:
    """The most distinct numbers in one token of a result; 0 is padding."""
    rows = moved.reshape(len(moved), -1).T if moved.ndim == 3 else np.atleast_2d(moved)
    return max(len(set(row.tolist()) - {0}) for row in rows)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.op in _MOVES])
def test_gains_of_movements_are_counts(row: Row) -> None:
    rule, call = ask(row.example("gaussian"))
    shape = row.shapes[0]
    times = np.bincount(rule.apply(call, np.arange(1, math.prod(shape) + 1).reshape(1, *shape)).ravel())[1:].max()
    tokens = _most_sources(rule.apply(call, _token_numbers(shape)[None])[0])
    assert rule.gains(call, "l2")[0] == pytest.approx(math.sqrt(times), rel=1e-15)
    claimed = rule.gains(call, "token_max")[0]
    assert claimed >= math.sqrt(tokens) * (1.0 - 1e-15)
    assert "token_max" not in row.sharp or claimed == pytest.approx(math.sqrt(tokens), rel=1e-15)


def _shapes_of(entries: int) -> list[Shape]:
    divisors = [n for n in range(1, entries + 1) if entries % n == 0]
    flat = [(entries,), *((n, entries // n) for n in divisors)]
    return [*flat, *((a, b, entries // a // b) for a in divisors for b in divisors if entries // a % b == 0)]


@pytest.mark.parametrize("entries", [1, 7, 12, 16, 24, 36, 60])
def test_every_reshape_of_a_few_entries(entries: int) -> None:
    """Never less than a count; equal to it from images, and between tokens of which one width divides the other."""
    for source, result in itertools.product(_shapes_of(entries), repeat=2):
        claimed, counted = gathered(source, result), _most_sources(_token_numbers(source).reshape(result))
        assert claimed >= counted, (source, result)
        divides = len(source) == len(result) == 2 and (source[1] % result[1] == 0 or result[1] % source[1] == 0)
        if len(source) != 2 or len(result) == 1 or divides:
            assert claimed == counted, (source, result)


def test_gains_of_large_values_cost_nothing() -> None:
    """A hostile program must not make the kernel allocate what its shapes describe."""
    huge = (65536, 65536, 65536)
    for op, attrs in (
        ("flatten@1", {}),
        ("reshape@1", {"shape": [2**31, 2**17]}),
        ("permute@1", {"axes": [2, 0, 1]}),
        ("slice@1", {"axis": 1, "start": 5, "stop": 7}),
        ("pixel_unshuffle@1", {"factor": 4096}),
        ("pad@1", {"before": [65536, 65536], "after": [65536, 65536], "mode": "circular"}),
    ):
        rule, call = _prepared(op, attrs, huge)
        assert rule.shape(call)
        assert all(gain >= 1.0 for gain in (*rule.gains(call, "l2"), *rule.gains(call, "token_max")))


def _embedded(weight: Any, **attrs: Any) -> tuple[Program, dict[str, Any]]:
    given = {"length": 3, "slack": 0.5, "space": "embeddings"} | attrs
    program = Program(
        (Node("embedding@1", (), given, {"weight": "e"}), Node("tanh@1", (0,))), {"features": 1, "logits": 1}
    )
    return program, {"e": np.asarray(weight)}


def test_an_embedding_is_an_origin() -> None:
    """Its size is the longest row plus the slack; the lookup adds no constant and no rounding."""
    program, weights = _embedded(np.array([[3.0, 4.0], [1.0, -1.0], [0.0, 0.0], [2.0, 2.0]], dtype=np.float32))
    bound = bound_program(program, weights, BUILT_IN)
    assert bound.shapes[0] == (3, 2)
    assert bound.nodes[0].lipschitz == 1.0
    assert 5.5 <= bound.nodes[0].size.token <= 5.5 * (1.0 + 1e-12)
    assert 5.5 * math.sqrt(3.0) <= bound.nodes[0].size.total <= 5.5 * math.sqrt(3.0) * (1.0 + 1e-12)
    x = np.random.default_rng(0).standard_normal((2, 3, 2))
    assert np.array_equal(evaluate_program(program, weights, BUILT_IN, x)["features"], np.tanh(x))
    assert rounding_error(program, weights, BUILT_IN, "float64", bound).features_error < 1e-14
    with pytest.raises(KernelError, match="sample shape"):
        evaluate_program(program, weights, BUILT_IN, x[:, :2])


@pytest.mark.parametrize("scale", [1e-170, 1e-40, 1.0, 1e30, 1e170])
def test_the_longest_row_is_bounded_at_any_scale(scale: float) -> None:
    weight = scale * np.random.default_rng(1).standard_normal((50, 7))
    program, weights = _embedded(weight, slack=0)
    with mpmath.workdps(60):
        longest = max(mpmath.sqrt(mpmath.fsum(mpmath.mpf(v) ** 2 for v in row)) for row in weight.tolist())
        token = bound_program(program, weights, BUILT_IN).nodes[0].size.token
        assert longest <= token
        assert scale in (1e-170, 1e170) or token <= longest * (1 + mpmath.mpf("1e-12"))


def test_no_rounded_sum_is_trusted() -> None:
    """A row whose squares are lost one by one beside a large one, as they may be in any order of summation."""
    row = np.full((1, 40_001), 1e-8)
    row[0, ::1000] = 1.0
    program, weights = _embedded(row, slack=0)
    with mpmath.workdps(40):
        exact = mpmath.sqrt(mpmath.fsum(mpmath.mpf(v) ** 2 for v in row[0].tolist()))
        computed = math.sqrt(float(np.max(np.cumsum(row[0] * row[0]))))
        assert computed * (1.0 + 1e-14) < exact <= bound_program(program, weights, BUILT_IN).nodes[0].size.token


@pytest.mark.parametrize(
    "attrs", [{"length": 0}, {"slack": -1e-9}, {"slack": math.nan}, {"slack": math.inf}, {"space": "pixels[0,1]"}]
)
def test_embeddings_that_are_refused(attrs: dict[str, Any]) -> None:
    program, weights = _embedded(np.ones((2, 2), dtype=np.float32), **attrs)
    with pytest.raises(KernelError, match=r"node 0 \(embedding@1\)"):
        bound_program(program, weights, BUILT_IN)


def test_no_slack_is_missed() -> None:
    """Tokens may leave the table by the slack: without it the size would be exceeded."""
    program, weights = _embedded(np.array([[3.0, 4.0]], dtype=np.float32), slack=2)
    assert bound_program(program, weights, BUILT_IN).nodes[0].size.token >= 7.0


def test_angles_of_a_rotation() -> None:
    """Every pair turns by n base^(-2i/d_h), in both layouts, and the rounding covers what float32 makes of it."""
    for layout in ("half", "interleaved"):
        rule, call = _prepared("rotation@1", {"heads": 2, "base": 10000, "layout": layout}, (512, 16))
        x = np.random.default_rng(2).standard_normal((1, 512, 16))
        exact, single = rule.apply(call, x)[0], rule.apply(call, x.astype(np.float32))[0]
        for n, h, i in ((0, 0, 0), (511, 0, 0), (300, 1, 2), (17, 1, 3)):
            first, second = (h * 8 + p for p in ((i, i + 4) if layout == "half" else (2 * i, 2 * i + 1)))
            with mpmath.workdps(40):
                angle = n * mpmath.power(10000, mpmath.mpf(-2 * i) / 8)
                turned = mpmath.mpc(x[0, n, first], x[0, n, second]) * mpmath.expjpi(angle / mpmath.pi)
            assert exact[n, first] == pytest.approx(float(turned.real), abs=1e-12)
            assert exact[n, second] == pytest.approx(float(turned.imag), abs=1e-12)
        norm = float(np.linalg.norm(x))
        bound = rule.rounding(call, UNIT_ROUNDOFF["float32"], (Size(norm, norm),))
        assert bound / 3000 < float(np.linalg.norm(single - exact)) <= bound


def test_angles_stray_with_positions() -> None:
    """Frequencies near one, rounded, times large positions: most of the error, and covered."""
    rule, call = _prepared("rotation@1", {"heads": 1, "base": 2, "layout": "half"}, (512, 8))
    x = np.random.default_rng(5).standard_normal((1, 512, 8))
    error = float(np.linalg.norm(rule.apply(call, x.astype(np.float32)) - rule.apply(call, x)))
    norm = float(np.linalg.norm(x))
    assert 24.0 * 2.0**-24 * norm < error <= rule.rounding(call, UNIT_ROUNDOFF["float32"], (Size(norm, norm),))


def test_a_bfloat16_rotation_has_angles_in_float32() -> None:
    rule, call = _prepared("rotation@1", {"heads": 1, "base": 10000.0, "layout": "half"}, (256, 4))
    bound = rule.rounding(call, UNIT_ROUNDOFF["bfloat16"], (Size(1.0, 1.0),))
    assert 24.0 / 256.0 <= bound <= 24.0 / 256.0 + 1e-3
    assert rule.rounding(call, UNIT_ROUNDOFF["float64"], (Size(1.0, 1.0),)) < 1e-12


def test_tiny_balls_and_tiny_tokens() -> None:
    """Squares that underflow in float32: the projection strays by no more than the stated share."""
    for radius in (1e-25, 1e-21, 1e-19, 0):
        rule, call = _prepared("ball@1", {"heads": 2}, (1, 6), radius=radius)
        for scale in (1e-26, 1e-22, 1e-20, 1e-18, 1.0):
            x = scale * np.random.default_rng(3).standard_normal((1, 1, 6)).astype(np.float32).astype(np.float64)
            z = x.astype(np.float32).reshape(1, 1, 2, 3)
            norm = np.sqrt((z * z).sum(axis=-1, keepdims=True, dtype=np.float32))
            tiny = np.finfo(np.float32).tiny
            single = z * np.minimum(np.float32(1.0), np.float32(radius) / np.maximum(norm, tiny))
            error = float(np.linalg.norm(single.reshape(1, 1, 6).astype(np.float64) - rule.apply(call, x)))
            size = float(np.linalg.norm(x))
            deviated = UNIT_ROUNDOFF["float32"] * radius
            object.__setattr__(call, "deviations", {"radius": deviated})
            assert error <= rule.rounding(call, UNIT_ROUNDOFF["float32"], (Size(size, size),)) + 2.0**-100
            assert float(np.linalg.norm(rule.apply(call, x))) <= rule.size(call, (Size(size, size),)).total * (
                1 + 1e-12
            )


def test_a_radius_that_strays() -> None:
    """Every head of every token ends on its sphere, so that all of the deviation shows."""
    x = np.random.default_rng(4).standard_normal((1, 5, 6)) * 100.0
    (rule, call), (_, strayed) = (_prepared("ball@1", {"heads": 2}, (5, 6), radius=r) for r in (0.5, 0.5 + 2.0**-20))
    object.__setattr__(call, "deviations", {"radius": 2.0**-20})
    error = float(np.linalg.norm(rule.apply(strayed, x) - rule.apply(call, x)))
    bound = rule.rounding(call, UNIT_ROUNDOFF["float64"], (Size(1e3, 1e3),))
    assert 0.999 * bound <= error <= bound


_PAD = {"before": [1, 1], "after": [1, 1], "mode": "zeros"}


@pytest.mark.parametrize(
    ("op", "attrs", "shapes"),
    [
        ("pixel_unshuffle@1", {"factor": 2}, [(1, 3, 4)]),
        ("pixel_unshuffle@1", {"factor": 2}, [(4, 4)]),
        ("pixel_unshuffle@1", {"factor": 0}, [(1, 4, 4)]),
        ("pixel_shuffle@1", {"factor": 2}, [(6, 2, 2)]),
        ("pixel_shuffle@1", {"factor": 2}, [(4, 4)]),
        ("reshape@1", {"shape": [5]}, [(2, 3)]),
        ("reshape@1", {"shape": [1, 1, 2, 3]}, [(2, 3)]),
        ("reshape@1", {"shape": [-1]}, [(2, 3)]),
        ("reshape@1", {"shape": []}, [(2, 3)]),
        ("permute@1", {"axes": [0]}, [(2, 3)]),
        ("permute@1", {"axes": [0, 0]}, [(2, 3)]),
        ("permute@1", {"axes": [0, 1, 2]}, [(2, 3)]),
        ("permute@1", {"axes": [True, 0]}, [(2, 3)]),
        ("slice@1", {"axis": 0, "start": 1, "stop": 1}, [(2, 3)]),
        ("slice@1", {"axis": 0, "start": 0, "stop": 3}, [(2, 3)]),
        ("slice@1", {"axis": 2, "start": 0, "stop": 1}, [(2, 3)]),
        ("slice@1", {"axis": 0, "start": -1, "stop": 1}, [(2, 3)]),
        ("pad@1", _PAD, [(4, 4)]),
        ("pad@1", _PAD | {"before": [1]}, [(1, 4, 4)]),
        ("pad@1", _PAD | {"before": [1, 1, 1]}, [(1, 4, 4)]),
        ("pad@1", _PAD | {"after": [-1, 0]}, [(1, 4, 4)]),
        ("pad@1", _PAD | {"mode": "mirror"}, [(1, 4, 4)]),
        ("pad@1", _PAD | {"mode": "reflect", "after": [0, 4]}, [(1, 4, 4)]),
        ("pad@1", _PAD | {"mode": "reflect"}, [(1, 1, 4)]),
        ("pad@1", _PAD | {"mode": "circular", "before": [5, 0]}, [(1, 4, 4)]),
        ("add@1", {}, [(2, 3), (3, 2)]),
        ("add@1", {}, [(1, 3), (2, 3)]),
        ("concatenate@1", {"axis": 0}, [(2, 3), (2, 4)]),
        ("concatenate@1", {"axis": 2}, [(2, 3), (2, 3)]),
        ("concatenate@1", {"axis": 0}, [(2, 3), (3,)]),
        ("concatenate@1", {"axis": 1}, [(2, 3), (2,)]),
        ("concatenate@1", {"axis": 1}, [(2, 3, 4), (2, 3, 5)]),
        ("rotation@1", {"heads": 2, "base": 10000.0, "layout": "half"}, [(3, 6)]),
        ("rotation@1", {"heads": 1, "base": 10000.0, "layout": "half"}, [(4,)]),
        ("rotation@1", {"heads": 1, "base": 0.5, "layout": "half"}, [(3, 4)]),
        ("rotation@1", {"heads": 1, "base": 10000.0, "layout": "neox"}, [(3, 4)]),
    ],
)
def test_refused(op: str, attrs: dict[str, Any], shapes: list[Shape]) -> None:
    with pytest.raises(KernelError):
        rule, call = _prepared(op, attrs, *shapes)
        rule.shape(call)


@pytest.mark.parametrize(
    ("heads", "shape", "radius"),
    [(2, (3, 5), 1.0), (1, (3, 2, 2), 1.0), (1, (4,), -1.0), (2, (4,), ["sub", 0, 1e-300])],
)
def test_balls_that_are_refused(heads: int, shape: Shape, radius: Any) -> None:
    rule, call = _prepared("ball@1", {"heads": heads}, shape, radius=radius)
    with pytest.raises(KernelError):
        rule.shape(call)


def test_branches_of_different_widths() -> None:
    """What one branch has in a token adds up with the other's along channels, and only there."""
    for axis, shapes, result, token in ((1, [(2, 3), (2, 1)], (2, 4), 5.0), (0, [(2, 3), (1, 3)], (3, 3), 4.0)):
        rule, call = _prepared("concatenate@1", {"axis": axis}, *shapes)
        assert rule.shape(call) == result
        assert rule.lipschitz(call, "token_max", (3.0, 4.0)) == pytest.approx(token, rel=1e-15)
        assert rule.lipschitz(call, "l2", (3.0, 4.0)) == pytest.approx(5.0, rel=1e-15)
