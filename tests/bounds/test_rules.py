"""Every built-in rule against its meaning: no search exceeds its constant, sizes or rounding; lies are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_lipschitz.bounds.rounding import UNIT_ROUNDOFF, Array
from hf_lipschitz.bounds.rule import GEOMETRIES, Geometry, Size
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds.cases import ROWS
from tests.bounds.operations import OPERATIONS
from tests.bounds.row import Example, Row
from tests.bounds.search import ask, claimed_constant, execute, lowered, reached_constant, token_norms

_BY_NAME = {row.name: row for row in ROWS}
_ALL = [pytest.param(row, id=row.name) for row in ROWS]
_NOISE = 1e-12  # of float64 execution, where sizes are met exactly


def _batch(example: Example, seed: int, count: int = 6) -> list[Array]:
    """Inputs of very different sizes, some with equal, zero and negative entries."""
    rng = np.random.default_rng(seed)
    values = []
    for shape in example.shapes:
        value = rng.standard_normal((count, *shape)) * np.array([1.0, 1e-3, 30.0, 1.0, 1.0, 0.0])[:count].reshape(
            -1, *[1] * len(shape)
        )
        value[3] = np.round(value[3])
        value[4] = np.abs(value[4])
        values.append(value.astype(np.float32).astype(np.float64))
    return values


def _size(value: Array) -> Size:
    return Size(
        float(token_norms(value).max()), float(np.sqrt((value * value).sum(axis=tuple(range(1, value.ndim)))).max())
    )


def test_every_rule_has_a_row_and_a_meaning() -> None:
    assert {row.op for row in ROWS} | {"input@1", "embedding@1"} == set(BUILT_IN) == set(OPERATIONS)
    for row in ROWS:
        assert set(row.sharp) | set(row.slack) == set(GEOMETRIES), row.name
    assert all(rule.source for rule in BUILT_IN.values())


@pytest.mark.parametrize("row", _ALL)
def test_meaning(row: Row) -> None:
    """``apply`` is the operation of operations.py, and ``shape`` is the shape of what it returns."""
    for kind in row.kinds():
        example = row.example(kind)
        rule, call = ask(example)
        values = _batch(example, seed=1)
        result = rule.apply(call, *values)
        expected = execute(example, [torch.from_numpy(value) for value in values]).numpy()
        assert result.shape[1:] == rule.shape(call)
        assert np.abs(result - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("row", _ALL)
def test_no_search_exceeds_the_constant(row: Row, geometry: Geometry) -> None:
    reached = 0.0
    for kind in row.kinds():
        example = row.example(kind)
        bound, found = claimed_constant(example, geometry), reached_constant(example, geometry)
        assert found <= bound, f"{row.name}, {kind}: {found} > {bound}"
        reached = max(reached, found / bound if bound > 0.0 else 0.0)
    assert reached > (0.98 if geometry in row.sharp else 0.0), f"the search reaches only {reached} of the bound"


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("row", _ALL)
def test_a_lowered_constant_is_found(row: Row, geometry: Geometry) -> None:
    if geometry not in row.sharp:
        assert row.slack[geometry]
        return
    example = row.example("gaussian")
    lie = claimed_constant(example, geometry, lowered(BUILT_IN[row.op]))
    assert reached_constant(example, geometry) > lie


@pytest.mark.parametrize("row", _ALL)
def test_size(row: Row) -> None:
    """No value is larger than the rule says, for inputs of the sizes that it was told."""
    for kind in row.kinds():
        example = row.example(kind)
        rule, call = ask(example)
        for values in (_batch(example, seed) for seed in (2, 3)):
            result, bound = rule.apply(call, *values), rule.size(call, tuple(_size(value) for value in values))
            found = _size(result)
            assert found.token <= bound.token * (1.0 + _NOISE), (row.name, kind)
            assert found.total <= bound.total * (1.0 + _NOISE), (row.name, kind)


def test_a_lowered_size_is_found() -> None:
    row = _BY_NAME["linear"]
    example = row.example("orthogonal")
    rule, call = ask(example)
    values = _batch(example, 2)
    result, bound = _size(rule.apply(call, *values)), rule.size(call, tuple(_size(value) for value in values))
    assert result.total > 0.8 * bound.total - rule.offset(call).total


@pytest.mark.parametrize("row", _ALL)
def test_rounding_in_float32(row: Row) -> None:
    """float32 execution against float64 execution, both of the independent meaning, within the local bound."""
    for kind in row.kinds():
        example = row.example(kind)
        rule, call = ask(example, roundoff=UNIT_ROUNDOFF["float32"])
        for values in (_batch(example, seed) for seed in (4, 5, 6)):
            deployed = execute(example, [torch.from_numpy(value).float() for value in values])
            exact = execute(example, [torch.from_numpy(value) for value in values])
            errors = (deployed.double() - exact).flatten(1).norm(dim=1)
            for index, error in enumerate(errors):
                sizes = tuple(_size(value[index : index + 1]) for value in values)
                bound = rule.rounding(call, UNIT_ROUNDOFF["float32"], sizes) + 2.0**-100
                assert float(error) <= bound, f"{row.name}, {kind}: {float(error)} > {bound}"


@pytest.mark.parametrize("row", _ALL)
def test_rounding_in_float64(row: Row) -> None:
    """float64 execution of the rule's own meaning against the same in extended precision."""
    if np.finfo(np.longdouble).nmant < 60:
        pytest.skip("this machine has no extended precision")
    for kind in row.kinds():
        example = row.example(kind)
        rule, call = ask(example, roundoff=UNIT_ROUNDOFF["float64"])
        values = _batch(example, 7)
        deployed = rule.apply(call, *values)
        exact = _extended(example, values)
        for index in range(len(deployed)):
            error = float(np.sqrt(np.sum((deployed[index] - exact[index]) ** 2)))
            sizes = tuple(_size(value[index : index + 1]) for value in values)
            assert error <= rule.rounding(call, UNIT_ROUNDOFF["float64"], sizes) * (1.0 + 1e-6) + 2.0**-900


def _extended(example: Example, values: list[Array]) -> Array:
    """The rule's meaning with every array in extended precision."""
    rule, call = ask(example)
    wide = {slot: tensor.astype(np.longdouble) for slot, tensor in call.tensors.items()}
    object.__setattr__(call, "tensors", wide)
    return rule.apply(call, *(value.astype(np.longdouble) for value in values))


@pytest.mark.parametrize(
    ("name", "factor"),
    [("linear", 100), ("head", 300), ("attention", 5000), ("sum pool", 50), ("normalize", 30), ("scale", 300)],
)
def test_rounding_is_not_vacuous(name: str, factor: float) -> None:
    """The float32 error comes near its bound, so a bound in the wrong unit, or without a factor, would show."""
    example = _BY_NAME[name].example("gaussian")
    rule, call = ask(example, roundoff=UNIT_ROUNDOFF["float32"])
    values = _batch(example, 8)
    deployed = execute(example, [torch.from_numpy(value).float() for value in values])
    errors = (
        (deployed.double() - execute(example, [torch.from_numpy(value) for value in values])).flatten(1).norm(dim=1)
    )
    bound = rule.rounding(call, UNIT_ROUNDOFF["float32"], tuple(_size(value) for value in values))
    assert bound / factor < float(errors.max()) <= bound
