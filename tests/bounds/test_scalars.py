"""Rounded scalars and scalar expressions: every enclosure holds the number that mpmath finds."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lipschitz.bounds import rounding
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rounding import (
    UNIT_ROUNDOFF,
    Array,
    Enclosure,
    add_up,
    array_norm_up,
    div_up,
    gamma,
    mul_up,
    norm_up,
    sqrt_up,
)
from hf_lipschitz.bounds.rules.scalars import check_expression, enclose, expression_tensors
from tests.bounds.operations import value_of

_NON_NEGATIVE = st.floats(0.0, 1e150, allow_subnormal=True)


@given(st.lists(_NON_NEGATIVE, max_size=6))
def test_sums_and_products_round_up(terms: list[float]) -> None:
    exact_sum = sum((Fraction(term) for term in terms), Fraction(0))
    assert Fraction(add_up(*terms)) >= exact_sum
    assert add_up(*terms) <= float(exact_sum) * (1.0 + 1e-14) + 1e-300
    exact_product = math.prod(Fraction(term) for term in terms[:2])
    assert Fraction(mul_up(*terms[:2])) >= exact_product
    assert mul_up(*terms[:2]) <= float(exact_product) * (1.0 + 1e-14) + 1e-300
    with mpmath.workdps(60):
        exact_norm = mpmath.sqrt(mpmath.fsum(mpmath.mpf(term) ** 2 for term in terms))
        assert mpmath.mpf(norm_up(*terms)) >= exact_norm
        assert mpmath.mpf(array_norm_up(np.array(terms))) >= exact_norm


@given(_NON_NEGATIVE, st.floats(1e-150, 1e150))
def test_quotients_and_roots_round_up(a: float, b: float) -> None:
    assert Fraction(div_up(a, b)) >= Fraction(a) / Fraction(b)
    assert Fraction(sqrt_up(a)) ** 2 >= Fraction(a)
    assert sqrt_up(a) <= math.sqrt(a) * (1.0 + 1e-15) + 5e-324


def test_exact_values_stay_exact() -> None:
    assert add_up() == 0.0 and add_up(1.5) == 1.5 and add_up(0.0, 2.0, 0.0) == 2.0
    assert mul_up() == 1.0 and mul_up(1.0, 3.0, 1.0) == 3.0 and mul_up(0.0, math.inf) == 0.0
    assert [sqrt_up(float(n * n)) for n in (0, 1, 2, 3, 1000, 2**25)] == [0.0, 1.0, 2.0, 3.0, 1000.0, 2.0**25]
    assert sqrt_up(2.0) > math.sqrt(2.0) and sqrt_up(math.inf) == math.inf
    assert norm_up(3.0) == 3.0 and norm_up(3.0, 4.0) >= 5.0


def test_a_quotient_by_nothing_is_refused() -> None:
    for denominator in (0.0, -1.0):
        with pytest.raises(KernelError, match="must be positive"):
            div_up(1.0, denominator)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 255, 256, 257, 1000, 2**20, 2**24 - 1, 2**24, 2**53])
def test_gamma(count: int, dtype: str) -> None:
    u = Fraction(UNIT_ROUNDOFF[dtype])
    found = gamma(count, UNIT_ROUNDOFF[dtype])
    if count * u >= 1:
        assert found == math.inf
    else:
        exact = count * u / (1 - count * u)
        assert Fraction(found) >= exact
        assert found <= float(exact) * (1.0 + 1e-6) + 1e-300


def test_gamma_is_void_in_bfloat16_from_256_terms_on() -> None:
    assert gamma(256, UNIT_ROUNDOFF["bfloat16"]) == math.inf
    assert math.isfinite(gamma(255, UNIT_ROUNDOFF["bfloat16"]))


_ARRAYS = {
    "empty": np.zeros(0),
    "zero": np.zeros((2, 3)),
    "one": np.array([-3.0]),
    "subnormal": np.array([2.0**-1074, -(2.0**-1073)]),
    "huge": np.array([[1e308, -1e307], [3.0, 0.0]]),
    "mixed": np.array([1e-200, 1e200, 1.0]),
    "lost in the sum": np.concatenate([np.ones(1), np.full(100_000, 0.9 * 2.0**-27)]),
    "many": np.linspace(-1.0, 1.0, 100_001),
    "float32": np.random.default_rng(0).standard_normal(1000).astype(np.float32),
    "float16 subnormal": np.array([6e-8, 0.0], dtype=np.float16),
}


@pytest.mark.parametrize("name", _ARRAYS)
def test_array_norm_up(name: str) -> None:
    values = _ARRAYS[name]
    with mpmath.workdps(60):
        squares = sum((Fraction(float(value)) ** 2 for value in values.ravel()), Fraction(0))
        exact = mpmath.sqrt(mpmath.mpf(squares.numerator) / mpmath.mpf(squares.denominator))
        found = mpmath.mpf(array_norm_up(values))
        assert found >= exact
        assert found <= exact * (1 + mpmath.mpf(10) ** -9) + mpmath.mpf(2) ** -1073


def test_array_norm_up_of_what_is_too_large_is_infinite() -> None:
    assert array_norm_up(np.full(9, 1.7e308)) == math.inf


_POINTS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-1074, -(2.0**-1074), 1e-20, -1e-20, 1e-8, 20.0, -20.0, 29.9, -29.9, -30.0]
_POINTS += [
    -30.1,
    36.7,
    -36.8,
    88.7,
    -103.0,
    300.5,
    -300.5,
    699.9,
    -699.9,
    700.0,
    -700.0,
    700.1,
    -700.1,
    -745.2,
    1e5,
    -1e5,
]
_POINTS += [float(value) for value in np.random.default_rng(0).normal(scale=20.0, size=40)]

_FUNCTIONS = {
    "exp": mpmath.exp,
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "sqrt": mpmath.sqrt,
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_functions_are_enclosed(name: str) -> None:
    for x in _POINTS:
        if name == "sqrt" and x < 0.0:
            continue
        with mpmath.workdps(700 if name != "sqrt" else 60):
            exact = _FUNCTIONS[name](mpmath.mpf(x))
            found = enclose([name, x], {})
            assert mpmath.mpf(float(found.low)) <= exact <= mpmath.mpf(float(found.high)), x
            if -700.0 <= x <= 700.0:
                assert float(found.high) - float(found.low) <= 1e-15 * float(exact) + 1e-323, x


def test_intervals_are_enclosed_by_their_ends() -> None:
    for name in ("exp", "softplus", "sigmoid"):
        whole = getattr(Enclosure(np.array([-2.0]), np.array([3.0])), name)()
        for x in np.linspace(-2.0, 3.0, 7):
            inside = enclose([name, float(x)], {})
            assert whole.low[0] <= inside.low and inside.high <= whole.high[0]


_TENSORS = {
    "a": np.array([0.3, -1.7, 2.2], dtype=np.float32),
    "b": np.array([1.5, 0.25, 1e-3], dtype=np.float32),
    "s": np.array(0.7, dtype=np.float32),
}
_EXPRESSIONS: list[Any] = [
    3,
    -0.1,
    ["tensor", "a"],
    ["add", ["tensor", "a"], ["tensor", "b"]],
    ["sub", ["tensor", "s"], ["tensor", "a"]],
    ["mul", ["tensor", "a"], ["tensor", "a"]],
    ["mul", -2, ["softplus", ["tensor", "a"]]],
    ["div", ["tensor", "a"], ["tensor", "b"]],
    ["div", 1, ["add", 1, ["mul", 15, ["exp", ["mul", -2, ["softplus", ["tensor", "a"]]]]]]],
    ["sqrt", ["sigmoid", ["tensor", "a"]]],
    ["max", ["mul", ["tensor", "b"], ["exp", ["tensor", "a"]]]],
    ["sub", ["exp", ["tensor", "s"]], ["exp", ["tensor", "s"]]],
]


def _exact(expression: Any) -> list[mpmath.mpf]:
    if not isinstance(expression, list):
        return [mpmath.mpf(expression)]
    head, *parts = expression
    if head == "tensor":
        return [mpmath.mpf(float(value)) for value in np.atleast_1d(_TENSORS[parts[0]])]
    values = [_exact(part) for part in parts]
    if head == "max":
        return [max(values[0])]
    if head in _FUNCTIONS:
        return [_FUNCTIONS[head](value) for value in values[0]]
    length = max(map(len, values))
    pairs = zip(*(value * (length // len(value)) for value in values), strict=True)
    operation = {"add": "__add__", "sub": "__sub__", "mul": "__mul__", "div": "__truediv__"}[head]
    return [getattr(x, operation)(y) for x, y in pairs]


@pytest.mark.parametrize("expression", _EXPRESSIONS, ids=str)
def test_expressions_are_enclosed(expression: Any) -> None:
    check_expression(expression, "here")
    found = enclose(expression, _TENSORS)
    low, high, middle = (np.atleast_1d(value) for value in (found.low, found.high, found.middle()))
    with mpmath.workdps(60):
        for index, exact in enumerate(_exact(expression)):
            assert mpmath.mpf(float(low[index])) <= exact <= mpmath.mpf(float(high[index]))
    assert np.all(low <= middle) and np.all(middle <= high)
    assert np.all(high - low <= 1e-13 * (1.0 + np.abs(middle)))
    assert set(expression_tensors(expression)) <= set(_TENSORS)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("expression", _EXPRESSIONS, ids=str)
def test_what_torch_computes_is_enclosed_with_its_roundoff(expression: Any, dtype: str) -> None:
    stored = {name: torch.from_numpy(np.array(value)) for name, value in _TENSORS.items()}
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in stored.items()}
    arrays = {name: value.double().numpy() for name, value in tensors.items()}
    computed = value_of(expression, tensors, getattr(torch, dtype)).double().numpy()
    found = enclose(expression, arrays, UNIT_ROUNDOFF[dtype])
    assert np.all(found.low <= computed) and np.all(computed <= found.high)


def test_a_forgotten_rounding_is_found() -> None:
    """Without its roundoff the enclosure of the real value misses what float32 computes."""
    expression = ["div", ["tensor", "a"], ["tensor", "b"]]
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in _TENSORS.items()}
    computed = value_of(expression, tensors, torch.float32).double().numpy()
    found = enclose(expression, _TENSORS)
    assert not np.all((found.low <= computed) & (computed <= found.high))


def test_what_overflows_in_a_dtype_is_unknown() -> None:
    expression = ["div", 1, ["exp", ["tensor", "t"]]]
    tensors = {"t": np.array([200.0], dtype=np.float32)}
    assert 0.0 < float(enclose(expression, tensors).high[0]) < 1e-80
    assert np.isnan(enclose(expression, tensors, UNIT_ROUNDOFF["float32"]).high[0])
    assert np.isfinite(enclose(expression, tensors, UNIT_ROUNDOFF["float64"]).high[0])
    for head in ("softplus", "sigmoid", "exp", "sqrt", "max"):
        assert np.isnan(enclose([head, expression], tensors, UNIT_ROUNDOFF["float32"]).high).all()


@pytest.mark.parametrize(
    ("expression", "tensors", "message"),
    [
        (["div", 1, ["tensor", "t"]], {"t": np.array([1.0, 0.0])}, "contains zero"),
        (["div", 1, ["sub", ["exp", 1.0], ["exp", 1.0]]], {}, "contains zero"),
        (["sqrt", ["tensor", "t"]], {"t": np.array([-1e-30])}, "negative"),
        (["tensor", "t"], {"t": np.array([np.nan])}, "not finite"),
        (["tensor", "t"], {"t": np.array([np.inf])}, "not finite"),
        (["tensor", "t"], {"t": np.zeros((2, 2))}, "floats of one dimension"),
        (["tensor", "t"], {"t": np.zeros(0)}, "floats of one dimension"),
        (["tensor", "t"], {"t": np.array(2**53 + 1)}, "floats of one dimension"),
        (["tensor", "t"], {"t": np.array([True])}, "floats of one dimension"),
        (["add", ["tensor", "t"], ["tensor", "v"]], {"t": np.zeros(2), "v": np.zeros(3)}, "combines tensors of shapes"),
    ],
)
def test_values_that_are_refused(expression: Any, tensors: dict[str, Array], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        enclose(expression, tensors)


@pytest.mark.parametrize(
    "expression",
    [
        None,
        True,
        "exp",
        {},
        [],
        [[]],
        [1],
        ["tensor"],
        ["tensor", 1],
        ["tensor", "a", "b"],
        ["exp"],
        ["exp", 1, 2],
        ["add", 1],
        ["pow", 1, 2],
        ["exp", ["log", 1]],
        ["exp", None],
        2**53 + 1,
        -(2**60),
        ["mul", 1, 2**53 + 1],
    ],
    ids=str,
)
def test_expressions_that_are_refused(expression: Any) -> None:
    with pytest.raises(KernelError, match="here"):
        check_expression(expression, "here")


def test_a_wrong_library_function_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle of this file finds an exponential that is off by one unit in the last place."""
    monkeypatch.setattr(rounding, "down", lambda value: value)
    wrong = 0
    for x in _POINTS:
        found = enclose(["exp", x], {})
        with mpmath.workdps(60):
            wrong += not mpmath.mpf(float(found.low)) <= mpmath.exp(mpmath.mpf(x))
    assert wrong > 0
