"""Terms for float64 sums of the kernel itself (column sums of a pool, row sums of a mixing, rows of a table), and cases
of pools and branches that the tables of rules do not hold.

A sum of n terms errs by gamma_{n-1}, so the exact one is at most the computed one over 1 - gamma_{n-1}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.bounds.rounding import Array, Enclosure
from hf_lipschitz.bounds.rule import GEOMETRIES
from hf_lipschitz.bounds.rules import pooling, shape, structure
from tests.bounds.row import Example
from tests.bounds.search import ask
from tests.second_checker import agreement
from tests.second_checker.coarse import COARSE, at_least, at_most, coarse
from tests.second_checker.exact import Interval, euclidean, exactly, gamma, larger, root_of
from tests.second_checker.norms import fractions_of, largest_row_sum

_UNITS = (COARSE, Fraction(1, 25))  # the second so large that 1 + gamma is less than 1 / (1 - gamma)


def _grown(value: Fraction, count: int, unit: Fraction) -> Interval:
    return exactly(value) / (exactly(1) - gamma(count, unit))


def column_sums_of_a_pool() -> None:
    """Schur's test: sqrt(rows x columns) for each axis; shares 1/3 and 1/2 are rounded, then up to n are added."""
    attrs = {"kernel": [3, 1], "stride": [1, 1], "padding": [1, 0], "ceil": False, "count_padding": False}
    rule, call = ask(Example(Node("average_pool@1", (0,), attrs), ((2, 8, 1),), {}))
    sums = [Fraction(0)] * 8
    for held, divisor in rule._matrix(call, 0):  # type: ignore[attr-defined]
        for place in held:
            sums[place] += Fraction(1, divisor)
    assert max(sums) == Fraction(7, 6)
    for unit in _UNITS:
        with coarse(pooling, unit=unit):
            value = rule.gains(call, "l2")[0]
        # the axis with one column has the column sum 1, and one window
        exact = (_grown(max(sums), 8, unit) * _grown(Fraction(1), 1, unit)).sqrt()
        at_least(value, exact, "column sums of an average pool")
        at_most(value, exact, 0.5, "column sums of an average pool")


def row_sums_of_a_mixing() -> None:
    weight = np.linspace(-1.0, 2.0, 81).reshape(9, 9)
    rule, call = ask(Example(Node("token_mixing@1", (0,), {}, {"weight": "w"}), ((9, 2),), {"w": weight}))
    exact = largest_row_sum(fractions_of(weight)).high
    for unit in _UNITS:
        with coarse(structure, unit=unit):
            value = rule.gains(call, "token_max")[0]
        at_least(value, _grown(exact, 8, unit), "row sums of a mixing of tokens")
        at_most(value, _grown(exact, 8, unit), 0.5, "row sums of a mixing of tokens")


def windows_that_hang_over() -> None:
    """A last window that hangs over the padded image divides by its pixels inside: with no padding, with two pixels."""
    for size, kernel, stride, padding in ((4, 3, 2, 0), (6, 5, 3, 2)):
        attrs = {"kernel": [kernel, 1], "stride": [stride, 1], "padding": [padding, 0], "ceil": True}
        node = Node("average_pool@1", (0,), attrs | {"count_padding": True})
        for geometry in GEOMETRIES:
            agreement.compare_rule(Example(node, ((2, size, 1),), {}), geometry)


def weights_of_branches() -> None:
    """Of a weight a that is known to lie between two numbers, |1 - a| and |a| are largest at one of them."""
    rule, call = ask(Example(Node("residual@1", (0, 1), {}, {}, {"weight": 0}), ((3,), (3,)), {}))
    for low, high in ((-3.0, 2.0), (-1.0, 6.0), (0.25, 0.5), (-5.0, -1.0)):
        known = dataclasses.replace(call, scalars={"weight": Enclosure(np.asarray(low), np.asarray(high))})
        keep, take = rule.gains(known, "l2")
        for gain, exact in ((keep, max(abs(1 - low), abs(1 - high))), (take, max(abs(low), abs(high)))):
            at_least(gain, Fraction(exact), f"a branch of weight {low} to {high}")
            at_most(gain, Fraction(exact), 1e-15, f"a branch of weight {low} to {high}")


def _longest(weight: Array, slack: float = 0.0) -> float:
    attrs = {"length": 3, "slack": slack, "space": "embeddings"}
    rule, call = ask(Example(Node("embedding@1", (), attrs, {"weight": "w"}), (), {"w": weight}))
    size = rule.size(call, ())
    total = root_of(3) * exactly(size.token)
    at_least(size.total, total, "three rows of a table together")
    at_most(size.total, total, 1e-12, "three rows of a table together")
    return size.token


def rows_of_a_table() -> None:
    """A sum of d squares errs by gamma_d, its root by one rounding more; squares that underflow are added back."""
    for width in (1, 60):
        weight = np.random.default_rng(width).standard_normal((4, width))
        exact = larger(*(euclidean(map(exactly, row)) for row in fractions_of(weight)))
        with coarse(shape):
            value = _longest(weight)
        factor = exactly(1 / (1 - COARSE)) / (exactly(1) - gamma(width, COARSE)).sqrt()
        at_least(value, exact * factor, f"longest row of a table, {width} wide")
        at_most(value, exact, float(4 * (width + 8) * COARSE), f"longest row of a table, {width} wide")
        at_least(_longest(weight, 2.0), exact + exactly(2), "longest row and slack")
    tiny = np.array([[3.0, 4.0], [1.0, -1.0]]) * 2.0**-600
    at_least(_longest(tiny), 5 * Fraction(1, 1 << 600), "longest row of a table whose squares underflow")


CHECKS: tuple[Callable[[], None], ...] = (
    column_sums_of_a_pool,
    row_sums_of_a_mixing,
    windows_that_hang_over,
    weights_of_branches,
    rows_of_a_table,
)
