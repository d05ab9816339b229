"""Terms of the engine's sums and of the norm formula that no example need reach, each where it is the one that counts.

Derivations: the docstrings of ``engine.node_errors`` and of ``spectral``; ``any_l`` says the formula in fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import ClassVar
from unittest import mock

import numpy as np

from hf_lipschitz.bounds import spectral
from hf_lipschitz.bounds.engine import ProgramBound, bound_program, node_errors, rounding_error
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rule import Call, Geometry, Rule, Size
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.second_checker.any_l import crude, factored, near_orthogonal
from tests.second_checker.coarse import COARSE, at_least, coarse
from tests.second_checker.exact import Interval, exactly, gamma
from tests.second_checker.norms import fractions_of, frobenius, largest_row_sum, spectral_norm

_U = Fraction(1, 1 << 53)


class _Spy(Rule):
    """The identity, with a large rounding error, that keeps what it is asked about."""

    op: ClassVar[str] = "tests::spy@1"
    local = 0.5

    def __init__(self) -> None:
        self.asked: list[tuple[Size, ...]] = []

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0,)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        self.asked.append(incoming)
        return self.local


def _spied() -> tuple[_Spy, Program, dict[str, Rule], ProgramBound]:
    spy = _Spy()
    start = Node("input@1", (), {"shape": [4], "space": "pixels[0,1]"})
    program = Program((start, Node(spy.op, (0,)), Node(spy.op, (1,))), {"features": 1, "logits": 2})
    rules = {**BUILT_IN, spy.op: spy}
    return spy, program, rules, bound_program(program, {}, rules)


def computed_sizes() -> None:
    """A node is asked at the computed inputs: token and total are the exact ones plus the error so far."""
    spy, program, rules, bound = _spied()
    sizes = [[Size(0.25, 1.5)], [Size(0.75, 2.5)], [Size(0.5, 1.0)]]
    errors = node_errors(program, {}, rules, "float32", bound, sizes)
    for (given,), ((size,), (error,)) in zip(spy.asked, zip(sizes[:2], errors[:2], strict=True), strict=True):
        at_least(given.token, Fraction(size.token) + Fraction(error), "token norm of a computed input")
        at_least(given.total, Fraction(size.total) + Fraction(error), "norm of a computed input")
    result = rounding_error(program, {}, rules, "float32", bound)
    least = Fraction(bound.nodes[1].size.total) + Fraction(result.features_error)
    at_least(result.features_norm, least, "norm of the computed features")


def overflow() -> None:
    """Where the exact value, its error or a computed input is out of range, nothing is claimed."""
    spy, program, rules, bound = _spied()
    small, large = Size(1.0, 1.0), Size(2.0**70, 2.0**70)
    for place, local in ((0, 0.5), (1, 0.5), (None, 2.0**70)):
        sizes = [[large if index == place else small] for index in range(3)]
        spy.local = local
        errors = node_errors(program, {}, rules, "float32", bound, sizes)
        assert errors[1] == errors[2] == [math.inf], f"something overflows, but an error of {errors} is claimed"


def formula_of_a_coarse_unit() -> None:
    """Every term of the norm formula, for a unit roundoff that makes each of them count."""
    draw = np.random.default_rng(3).standard_normal
    matrices = [draw((2, 300)), draw((6, 10)), draw((3, 3)), draw((5, 9)) + 1j * draw((5, 9))]
    # many rows: the sums of L L^T count for more than the mu that they are added to
    for matrix, unit in [(each, COARSE) for each in matrices] + [(draw((40, 40)), 8 * COARSE)]:
        mu = 1.001 * float(np.linalg.norm(matrix, 2)) ** 2
        for witness in (mu, 4.0 * mu):
            with coarse(spectral, unit=unit):
                value = spectral.spectral_norm_upper(matrix, witness=witness).value
            _square(value, factored(matrix, witness, unit), f"any L, {matrix.shape}")
    nearly = np.linalg.qr(draw((200, 12)))[0].T
    sparse = np.diag(1.0 + np.arange(12) / 64.0)
    with coarse(spectral):
        near = spectral.spectral_norm_upper(nearly)
        with mock.patch.object(spectral, "_candidates", lambda *_: iter(())):
            fallback = spectral.spectral_norm_upper(sparse), spectral.spectral_norm_upper(matrices[0])
    assert near.method == "near_orthogonal" and {each.method for each in fallback} == {"fallback"}
    _square(near.value, near_orthogonal(nearly, COARSE), "near orthogonal")
    for bound, matrix in zip(fallback, (sparse, matrices[0]), strict=True):
        _square(bound.value, crude(matrix, COARSE), "fallback")


def _square(value: float, bracket: Interval, what: str) -> None:
    at_least(value, bracket.sqrt(), what)


def distance_of_a_factor() -> None:
    """D where only entries of it are not zero that the kernel forms once: 1.001 |D| counts in full.

    G + L L^T - mu I is 1 at (i, i + 32) and (i + 32, i), so that |D|_F = 8; L L^T has the trace 96.
    """
    unit, empty = np.eye(32), np.zeros((32, 32))
    lower = np.block([[unit, empty], [unit, unit]])
    gram = np.diag([3.0] * 32 + [2.0] * 32)[None]
    with mock.patch.object(np.linalg, "cholesky", lambda shifted: lower[None]):
        value = spectral.any_l(gram, 4.0, 0.25)
    assert value is not None
    scalars = exactly(1 + 32 * _U)
    trace = exactly(96 / (1 - gamma(4 * 64 + 2, _U).high)) * scalars
    total = exactly(4 * (1 + _U) + Fraction(1001, 1000) * 8 + Fraction(1, 4)) + gamma(64, _U) * trace
    at_least(value, total * scalars, "any L with a distance in the blocks off the diagonal")


def distance_of_a_gram() -> None:
    """A computed G need not be symmetric: row sums or column sums alone bound no norm."""
    row = np.zeros((6, 6))
    row[0, 1:] = 1e-8
    exact = exactly(1) + spectral_norm(fractions_of(row))
    for deviation in (row, row.T):
        value = spectral._near_orthogonal(np.eye(6)[None] + deviation, np.ones(1), 0.0)
        assert value is not None
        at_least(value, exact, "near orthogonal, a G that is not symmetric")


def rows_of_complex_entries() -> None:
    for matrix in (np.full((1, 2, 3), 1j), np.full((1, 2, 3), 1.0 - 1.0j)):
        exact = largest_row_sum(fractions_of(np.hypot(matrix.real, matrix.imag)[0]))
        at_least(spectral._largest_sum(matrix), exact, "sum of absolute values of complex numbers")


def lost_by_scaling() -> None:
    """Scaling may lose what lies below the range of floats: as much as it says, and no more is assumed."""
    for matrix in (np.full((10, 11), 2.0**-174), np.full((10, 6), 2.0**-174 * (1.0 + 1.0j))):
        matrix[0, 0] = 2.0**900
        scaled, exponent, lost = spectral.scaled(matrix[None])
        power = Fraction(2) ** -exponent
        parts, left = (fractions_of(each.view(np.float64)) for each in (matrix, scaled[0]))
        at_least(lost, frobenius(parts * power - left), "what scaling lost")
    ones = np.ones((2, 2))
    for exponent in (0, 3):
        with mock.patch.object(spectral, "scaled", lambda a, e=exponent: (a, e, 0.25)):
            value = spectral.spectral_norm_upper(ones).value
        at_least(value, Fraction(9, 4) * 2**exponent, "a norm with what its scaling lost")


def freivalds_allows_what_rounding_does() -> None:
    """A residual of exactly the allowed size passes though its norm is rounded: by up to a thousandth."""
    norm = np.linalg.norm
    with mock.patch.object(np.linalg, "norm", lambda a: 1.0009 * norm(a)):
        spectral.freivalds(np.full(4, 2.0), 2.0)


CHECKS: tuple[Callable[[], None], ...] = (
    computed_sizes,
    overflow,
    formula_of_a_coarse_unit,
    distance_of_a_factor,
    distance_of_a_gram,
    rows_of_complex_entries,
    lost_by_scaling,
    freivalds_allows_what_rounding_does,
)
