"""The kernel's norm bounds against exact norms, and against the formula that it says it computes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from hf_lipschitz.bounds import rounding, spectral
from tests.second_checker.agreement import Disagreement, compare
from tests.second_checker.any_l import crude, factored, near_orthogonal
from tests.second_checker.exact import Interval, exactly, gamma
from tests.second_checker.norms import fractions_of, frobenius, spectral_norm

_U = Fraction(1, 1 << 53)


def _drawn(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def _orthogonal(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(_drawn(seed, columns, rows))[0].T


def compare_with_formula() -> None:
    """Long and square matrices, on which every term of the formula counts; never below it, and hardly above."""
    matrices = [_drawn(index, *shape) for index, shape in enumerate(((2, 3000), (3, 1500), (40, 40), (24, 300)))]
    matrices += [matrices[1] + 1j * _drawn(9, 3, 1500), matrices[2][:30, :30] + 1j * _drawn(8, 30, 30)]
    for matrix in matrices:
        rows, columns = matrix.shape
        bound = spectral.spectral_norm_upper(matrix)
        assert bound.method == "cholesky" and bound.witness is not None, bound.method
        again = spectral.spectral_norm_upper(matrix, witness=bound.witness)
        _squared(again.value, factored(matrix, bound.witness), f"any L, {rows} x {columns}")
        # a useless witness: mu and D are large, and so are L and its term
        coarse = spectral.spectral_norm_upper(matrix, witness=4.0 * bound.witness)
        _squared(coarse.value, factored(matrix, 4.0 * bound.witness), f"any L, large mu, {rows} x {columns}")
        _compare_wrong_factor(matrix, bound.witness)
    for rows, columns in ((30, 30), (4, 2000)):
        matrix = _orthogonal(rows, rows, columns)
        matrix[0, 0] += 1e-9
        bound = spectral.spectral_norm_upper(matrix)
        assert bound.method == "near_orthogonal", bound.method
        _squared(bound.value, near_orthogonal(matrix), f"near orthogonal, {rows} x {columns}")
    _compare_fallback()


def _compare_wrong_factor(matrix: np.ndarray, mu: float) -> None:
    """With an L that is no factor, D is large: the formula holds for every L."""
    original = np.linalg.cholesky
    np.linalg.cholesky = lambda a: 0.9 * original(a)  # type: ignore[assignment]
    try:
        value = spectral.spectral_norm_upper(matrix, witness=mu).value
        _squared(value, factored(matrix, mu), f"any L, not a factor, {matrix.shape}", 1e-9)
    finally:
        np.linalg.cholesky = original


def _compare_fallback() -> None:
    """Without eigenvalues or a witness there is no mu: the crude bound is all that is left."""
    dense, sparse = _drawn(5, 3, 1200), np.zeros((12, 12))
    sparse[np.arange(12), np.arange(12)] = 1.0 + np.arange(12) / 64.0
    original = spectral._candidates
    spectral._candidates = lambda *arguments: iter(())  # type: ignore[assignment]
    try:
        for matrix in (dense, sparse, np.abs(_drawn(6, 2, 900))):
            bound = spectral.spectral_norm_upper(matrix)
            assert bound.method == "fallback", bound.method
            _squared(bound.value, crude(matrix), f"fallback, {matrix.shape}", 1e-12)
    finally:
        spectral._candidates = original


def _squared(value: float, bracket: Interval, what: str, slack: float = 1e-14) -> None:
    """value^2 against a bracket; slack covers the kernel's own roundings, each up by a unit in the last place."""
    square = Fraction(value) ** 2
    if square < bracket.low or square > bracket.high * (1 + Fraction(slack)):
        part = float((square - bracket.low) / bracket.low / _U)
        raise Disagreement(f"{what}: the square of the bound is {part} u from the formula")


def compare_with_exact_norms() -> None:
    """Adversarial matrices against their exact norms."""
    big = [1e150, 1e-150, 1e300, 1e-300]
    for index in range(24):
        rng = np.random.default_rng(index)
        matrix = rng.standard_normal((1 + index % 5, 1 + index % 4))
        if index % 3 == 1:
            matrix = np.outer(matrix[:, 0], matrix[0])
        if index % 4 == 3:
            matrix = matrix * big[index // 4 % 4]
        if index % 6 == 5:
            matrix = np.round(matrix * 5.0) * 2.0**-1074
        value = spectral.spectral_norm_upper(matrix).value
        exact = spectral_norm(fractions_of(matrix))
        lost = 0 if np.abs(matrix).max(initial=0.0) > 1e-290 else Fraction(1, 1 << 1060)
        compare(value, Interval(exact.low, exact.high + lost), 1e-10, f"norm of matrix {index}")


def compare_array_norms() -> None:
    """Euclidean norms of arrays: above the exact one by the relative error that the sum may have, and little more."""
    for count in (1, 7, 1000, 20000):
        values = np.random.default_rng(count).standard_normal(count)
        exact = frobenius(fractions_of(values))
        compare(rounding.array_norm_up(values), exact, 1e-9, f"norm of {count} entries")
        allowed = exact * (exactly(1) + gamma(count, _U))
        compare(rounding.array_norm_up(values), allowed, 1e-9, f"norm of {count} entries, with its allowance")
        terms = [abs(float(value)) for value in values[:50]]
        exact = frobenius(fractions_of(np.asarray(terms)))
        compare(rounding.norm_up(*terms), exact, 1e-12, f"norm of {len(terms)} terms")
