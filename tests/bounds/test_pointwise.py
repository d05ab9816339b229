"""Pointwise activations: constants against 60 digits, torch's functions against theirs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf
from torch import Tensor
from torch.nn import functional

from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Node
from hf_lipschitz.bounds.rounding import UNIT_ROUNDOFF
from hf_lipschitz.bounds.rule import Call, Rule, Size
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds.cases_activation import ROWS
from tests.bounds.row import Example, Row
from tests.bounds.search import ask, token_norms

Exact = Callable[[Any], Any]
_SCALE, _ALPHA = "1.0507009873554804934193349852946", "1.6732632423543772848170429916717"


def _call(op: str, attrs: Mapping[str, Any], shape: tuple[int, ...] = (1,), dtype: str = "") -> tuple[Rule, Call]:
    node = Node(op, (0,), dict(attrs))
    return ask(Example(node, (shape,), {}), roundoff=UNIT_ROUNDOFF[dtype] if dtype else 0.0)


def _expm1(x: Any) -> Any:
    return mpmath.expm1(x)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def _softplus(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x))


def _cut(x: Any, low: Any, high: Any) -> Any:
    return min(max(x, mpf(low)), mpf(high))


def _gelu_tanh(x: Any) -> Any:
    return x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpf("0.044715") * x**3))) / 2


# operation, attributes, torch's function, the exact one
_FUNCTIONS: list[tuple[str, dict[str, Any], Callable[[Tensor], Tensor], Exact]] = [
    ("relu@1", {}, functional.relu, lambda x: max(x, mpf(0))),
    (
        "leaky_relu@1",
        {"slope": 0.01},
        lambda x: functional.leaky_relu(x, 0.01),
        lambda x: x if x > 0 else mpf(0.01) * x,
    ),
    ("elu@1", {"alpha": 1.7}, lambda x: functional.elu(x, 1.7), lambda x: x if x > 0 else mpf(1.7) * _expm1(x)),
    ("celu@1", {"alpha": 0.3}, lambda x: functional.celu(x, 0.3), lambda x: x if x > 0 else mpf(0.3) * _expm1(x / 0.3)),
    ("selu@1", {}, functional.selu, lambda x: mpf(_SCALE) * (x if x > 0 else mpf(_ALPHA) * _expm1(x))),
    (
        "hardtanh@1",
        {"low": -0.1, "high": 0.7},
        lambda x: functional.hardtanh(x, -0.1, 0.7),
        lambda x: _cut(x, -0.1, 0.7),
    ),
    ("hardtanh@1", {"low": 0, "high": 6}, functional.relu6, lambda x: _cut(x, 0, 6)),
    ("gelu@1", {"approximate": "none"}, functional.gelu, lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2),
    ("gelu@1", {"approximate": "tanh"}, lambda x: functional.gelu(x, approximate="tanh"), _gelu_tanh),
    ("silu@1", {"beta": 1}, functional.silu, lambda x: x * _sigmoid(x)),
    ("silu@1", {"beta": 1.702}, lambda x: x * torch.sigmoid(1.702 * x), lambda x: x * _sigmoid(mpf(1.702) * x)),
    ("mish@1", {}, functional.mish, lambda x: x * mpmath.tanh(_softplus(x))),
    ("tanh@1", {}, torch.tanh, mpmath.tanh),
    ("tanhshrink@1", {}, functional.tanhshrink, lambda x: x - mpmath.tanh(x)),
    ("sigmoid@1", {}, torch.sigmoid, _sigmoid),
    ("hardsigmoid@1", {}, functional.hardsigmoid, lambda x: _cut(x + 3, 0, 6) / 6),
    ("hardswish@1", {}, functional.hardswish, lambda x: x * _cut(x + 3, 0, 6) / 6),
    ("softplus@1", {"beta": 1, "threshold": 20}, functional.softplus, _softplus),
    (
        "softplus@1",
        {"beta": 0.3, "threshold": 25.0},
        lambda x: functional.softplus(x, 0.3, 25.0),
        lambda x: _softplus(mpf(0.3) * x) / mpf(0.3),
    ),
    ("softsign@1", {}, functional.softsign, lambda x: x / (1 + abs(x))),
    ("logsigmoid@1", {}, functional.logsigmoid, lambda x: -_softplus(-x)),
    (
        "softshrink@1",
        {"lambda": 0.45},
        lambda x: functional.softshrink(x, 0.45),
        lambda x: x - _cut(x, -mpf(0.45), mpf(0.45)),
    ),
]
_IDS = [f"{op[:-2]} {sorted(attrs.items())}" for op, attrs, _, _ in _FUNCTIONS]


def _peak(phi: Exact, start: str) -> Any:
    """|phi'| at its stationary point near ``start``, to 60 digits."""
    mpmath.mp.dps = 60
    point = mpmath.findroot(lambda x: mpmath.diff(phi, x, 2), mpf(start))
    return abs(mpmath.diff(phi, point))


_SUPREMA: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "selu": ("selu@1", {}, lambda: mpf(_SCALE) * mpf(_ALPHA)),
    "gelu": (
        "gelu@1",
        {"approximate": "none"},
        lambda: _peak(lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2, "1.4"),
    ),
    "gelu in closed form": (
        "gelu@1",
        {"approximate": "none"},
        lambda: (1 + mpmath.erf(1)) / 2 + mpmath.exp(-1) / mpmath.sqrt(mpmath.pi),
    ),
    "gelu tanh": ("gelu@1", {"approximate": "tanh"}, lambda: _peak(_gelu_tanh, "1.4")),
    "silu": ("silu@1", {"beta": 1}, lambda: _peak(lambda x: x * _sigmoid(x), "2.4")),
    "quick gelu": ("silu@1", {"beta": 1.702}, lambda: _peak(lambda x: x * _sigmoid(mpf(1.702) * x), "1.4")),
    "mish": ("mish@1", {}, lambda: _peak(lambda x: x * mpmath.tanh(_softplus(x)), "1.5")),
    "sigmoid": ("sigmoid@1", {}, lambda: mpf(1) / 4),
    "hardsigmoid": ("hardsigmoid@1", {}, lambda: mpf(1) / 6),
    "hardswish": ("hardswish@1", {}, lambda: mpf(3) / 2),
    "elu": ("elu@1", {"alpha": 1.7}, lambda: mpf(1.7)),
}


@pytest.mark.parametrize("name", list(_SUPREMA))
def test_constants_are_the_suprema_of_slopes(name: str) -> None:
    """Never below the largest slope, and above it by no more than the digits that are given."""
    op, attrs, supremum = _SUPREMA[name]
    rule, call = _call(op, attrs)
    with mpmath.workdps(60):
        excess = mpf(rule.gains(call, "l2")[0]) - supremum()
        assert 0 <= excess <= mpf("1.01e-12")
    assert rule.gains(call, "l2") == rule.gains(call, "token_max")


@pytest.mark.parametrize(("op", "attrs", "_torch", "exact"), _FUNCTIONS, ids=_IDS)
def test_no_slope_exceeds_the_constant(op: str, attrs: dict[str, Any], _torch: Any, exact: Exact) -> None:
    """Chords of the exact function over a fine grid, which enclose every slope between, and far away."""
    rule, call = _call(op, attrs)
    near = [mpf(i) / 32 for i in range(-320, 321)]
    points = [mpf(-1000), mpf(-60), *near, mpf(60), mpf(1000)]
    with mpmath.workdps(30):
        values = [exact(x) for x in points]
        steepest = max(
            abs((b - a) / (y - x)) for x, y, a, b in zip(points, points[1:], values, values[1:], strict=False)
        )
        assert steepest <= rule.gains(call, "l2")[0]
        assert steepest >= 0.96 * rule.gains(call, "l2")[0]
        assert abs(exact(mpf(0))) <= rule.offset(call).total


def _points(dtype: torch.dtype) -> Tensor:
    """Where activations bend, cancel, underflow, saturate, and where softplus jumps."""
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(400, generator=generator, dtype=torch.float64) * 4.0
    tiny = 10.0 ** (torch.rand(100, generator=generator, dtype=torch.float64) * -12.0)
    far = torch.rand(150, generator=generator, dtype=torch.float64) * 200.0 - 100.0
    edges = torch.tensor([0.0, 20.0, 20.0 + 1e-5, 66.0, 83.5, 3.0, -3.0, 0.45, -0.45, 1e4, -1e4], dtype=torch.float64)
    return torch.cat([near, tiny, -tiny, far, edges]).to(dtype)


def _units(op: str, attrs: dict[str, Any], torch_function: Callable[[Tensor], Tensor], exact: Exact, dtype: str) -> Any:
    """The error of torch's function at every point, as a share of what the rule allows one entry."""
    rule, call = _call(op, attrs, dtype=dtype)
    x = _points(getattr(torch, dtype))
    shares, torch_values = [], torch_function(x).double().tolist()
    with mpmath.workdps(40):
        for point, value in zip(x.double().tolist(), torch_values, strict=True):
            allowed = rule.rounding(call, UNIT_ROUNDOFF[dtype], (Size(abs(point), abs(point)),))
            error = abs(mpf(value) - exact(mpf(point)))
            shares.append(float(error / (mpf(allowed) + mpf(2) ** -140)) if error else 0.0)
    return np.asarray(shares)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("op", "attrs", "torch_function", "exact"), _FUNCTIONS, ids=_IDS)
def test_torch_errs_within_the_rounding_of_one_entry(
    op: str, attrs: dict[str, Any], torch_function: Callable[[Tensor], Tensor], exact: Exact, dtype: str
) -> None:
    """Torch's function in a dtype against 40 digits; entry by entry, so that no large entry hides a small one."""
    shares = _units(op, attrs, torch_function, exact, dtype)
    assert shares.max() <= 1.0
    rule, call = _call(op, attrs, dtype=dtype)
    if dtype == "float32" and rule.rounding(call, UNIT_ROUNDOFF[dtype], (Size(1.0, 1.0),)) > 0.0:
        assert shares.max() >= 0.03, "the allowance is far too large: is it in the right unit?"


def test_a_smaller_jump_is_found() -> None:
    """Softplus in float64: without the jump at the threshold the allowance would be a thousandfold too small."""
    rule, call = _call("softplus@1", {"beta": 1, "threshold": 20}, dtype="float64")
    just_above = torch.tensor([20.0 + 1e-9], dtype=torch.float64)
    with mpmath.workdps(40):
        error = float(abs(mpf(functional.softplus(just_above).item()) - _softplus(mpf(just_above.item()))))
    allowed = rule.rounding(call, UNIT_ROUNDOFF["float64"], (Size(20.0, 20.0),))
    assert 0.97 * allowed <= error <= allowed


def test_prelu_is_that_of_torch() -> None:
    """For samples of every kind: torch's channels are the axis after the batch."""
    rng = np.random.default_rng(0)
    for shape in ((3,), (3, 2), (3, 2, 2)):
        for entries in {1, shape[0]}:
            weight = rng.standard_normal(entries).astype(np.float32)
            rule, call = ask(Example(Node("prelu@1", (0,), {}, {"weight": "w"}), (shape,), {"w": weight}))
            x = rng.standard_normal((2, *shape))
            expected = functional.prelu(torch.from_numpy(x), torch.from_numpy(weight).double()).numpy()
            assert np.array_equal(rule.apply(call, x), expected)


def test_relu6_and_ends_of_few_bits_are_exact() -> None:
    for low, high, rounded in ((0, 6, 0.0), (-1.0, 1.0, 0.0), (-0.1, 1.0, 0.1), (-1.0, 257, 257.0), (-0.3, 0.1, 0.3)):
        rule, call = _call("hardtanh@1", {"low": low, "high": high}, (4,), "bfloat16")
        assert rule.rounding(call, 2.0**-8, (Size(9.0, 9.0),)) == pytest.approx(2.0 * rounded * 2.0**-8)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("softplus@1", {"beta": 1, "threshold": 19.9}),
        ("softplus@1", {"beta": 1, "threshold": 81}),
        ("softplus@1", {"beta": 0, "threshold": 20}),
        ("softplus@1", {"beta": -1.0, "threshold": 20}),
        ("celu@1", {"alpha": 0.0}),
        ("celu@1", {"alpha": -1.0}),
        ("elu@1", {"alpha": math.inf}),
        ("elu@1", {"alpha": math.nan}),
        ("elu@1", {"alpha": True}),
        ("leaky_relu@1", {"slope": "0.1"}),
        ("leaky_relu@1", {}),
        ("leaky_relu@1", {"slope": 0.1, "inplace": True}),
        ("hardtanh@1", {"low": 1.0, "high": 0.0}),
        ("gelu@1", {"approximate": "sigmoid"}),
        ("gelu@1", {}),
        ("silu@1", {"beta": None}),
        ("softshrink@1", {"lambda": -0.1}),
        ("hardshrink@1", {"lambda": 0.5}),
        ("threshold@1", {"threshold": 0.0, "value": 1.0}),
        ("glu@1", {}),
        ("rrelu@1", {"lower": 0.1, "upper": 0.3}),
    ],
)
def test_refused(op: str, attrs: dict[str, Any]) -> None:
    """Parameters without a constant, and functions that no constant bounds."""
    with pytest.raises(KernelError):  # by their attributes, or by their shape
        rule, call = _call(op, attrs)
        rule.shape(call)


@pytest.mark.parametrize(
    ("op", "tensors", "shape"),
    [
        ("prelu@1", {"weight": (2,)}, (3,)),
        ("prelu@1", {"weight": (2,)}, (3, 2)),
        ("prelu@1", {"weight": (2,)}, (3, 2, 2)),
        ("n_activation@1", {"first": (3,), "second": (2,)}, (3,)),
        ("n_activation@1", {"first": (2,), "second": (2,)}, (3, 2, 2)),
        ("n_activation@1", {"first": (3,), "second": (3,)}, (3, 2)),
        ("householder@1", {"angle": (2,)}, (2,)),
        ("householder@1", {"angle": (1,)}, (3,)),
        ("householder@1", {"angle": (1,)}, (2, 2, 2)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(op: str, tensors: dict[str, tuple[int]], shape: tuple[int, ...]) -> None:
    weights = {name: np.ones(entries, dtype=np.float32) for name, entries in tensors.items()}
    rule, call = ask(Example(Node(op, (0,), {}, {name: name for name in tensors}), (shape,), weights))
    with pytest.raises(KernelError):
        rule.shape(call)


def test_every_pointwise_rule_is_compared_with_torch() -> None:
    from hf_lipschitz.bounds.rules import pointwise

    assert {op for op, *_ in _FUNCTIONS} == {rule.op for rule in pointwise.RULES} <= set(BUILT_IN)


@pytest.mark.parametrize("op", ["tanh@1", "sigmoid@1", "softsign@1", "hardsigmoid@1"])
def test_ranges_bound_sizes(op: str) -> None:
    rule, call = _call(op, {}, (4, 2, 2))
    size = rule.size(call, (Size(math.inf, math.inf),))
    assert size == Size(2.0, 4.0)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_sizes_at_zero(row: Row) -> None:
    """What comes out of zeros is as large as the rule says, in both geometries."""
    rule, call = ask(row.example("gaussian"))
    result = rule.apply(call, np.zeros((1, *row.shapes[0])))
    size = rule.size(call, (Size(0.0, 0.0),))
    for found, bound in ((token_norms(result).max(), size.token), (np.sqrt((result**2).sum()), size.total)):
        assert found * (1.0 - 1e-15) <= bound <= found * (1.0 + 1e-12)
