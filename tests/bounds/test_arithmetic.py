"""Upward arithmetic, gamma, norms of arrays and the sums of a forward pass, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hf_lipschitz.bounds.rounding import ARITHMETIC, UNIT_ROUNDOFF, Arithmetic, U, array_norm_up, gamma

_F = Fraction


def _gamma(count: int, u: float) -> Fraction:
    return count * _F(u) / (1 - count * _F(u))


def _close_above(value: float, exact: Fraction, relative: float = 2.0**-49) -> bool:
    """At least the exact value, and no more than a few roundings above it."""
    return exact <= _F(value) <= exact * (1 + _F(relative))


@pytest.mark.parametrize("u", sorted(UNIT_ROUNDOFF.values()))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 100])
def test_gamma(count: int, u: float) -> None:
    assert _close_above(gamma(count, u), _gamma(count, u))


@pytest.mark.parametrize("dtype", ARITHMETIC)
@pytest.mark.parametrize("count", [1, 5, 64, 768])
def test_sums_of_a_dtype(dtype: str, count: int) -> None:
    """gamma_n of the accumulation, and one rounding to the dtype where that is coarser."""
    arithmetic, u = ARITHMETIC[dtype], UNIT_ROUNDOFF[dtype]
    fine = min(u, 2.0**-24)
    exact = _gamma(count, fine)
    if fine != u:
        exact += _F(u) * (1 + exact)
    assert _close_above(arithmetic.total(count), exact) and _close_above(arithmetic.dot(count), exact)


@pytest.mark.parametrize(("count", "chunk"), [(33, 32), (64, 32), (65, 32), (769, 32), (769, 16), (5, 2)])
@pytest.mark.parametrize("products", [2.0**-24, 2.0**-53])
def test_sums_in_chunks(count: int, chunk: int, products: float) -> None:
    """Chunks in any order, their sums in float64 in any order, one rounding; plain sums are not affected."""
    arithmetic = Arithmetic(2.0**-24, 2.0**-24, products, chunk)
    inner, outer = _gamma(chunk, products), _gamma(-(-count // chunk) + 1, U)
    exact = inner + outer + inner * outer
    exact += _F(2.0**-24) * (1 + exact)
    assert _close_above(arithmetic.dot(count), exact)
    assert arithmetic.total(count) == ARITHMETIC["float32"].total(count)
    whole = Arithmetic(2.0**-24, 2.0**-24, products, chunk).dot(chunk)
    assert whole == Arithmetic(2.0**-24, 2.0**-24, products).dot(chunk)


def test_sums_in_chunks_of_float32_hold() -> None:
    """Chunks summed by NumPy in float32, in the worst of a few orders, added in float64."""
    rng = np.random.default_rng(0)
    arithmetic = Arithmetic(2.0**-24, 2.0**-24, 2.0**-24, 8)
    for _ in range(200):
        a = np.sort(10.0 ** rng.uniform(-3, 3, 60)).astype(np.float32)
        b = rng.choice([-1.0, 1.0], 60).astype(np.float32) * a[rng.permutation(60)]
        exact = sum(_F(float(x)) * _F(float(y)) for x, y in zip(a, b, strict=True))
        parts = [np.float32(0)] * 8
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            parts[i // 8] = np.float32(parts[i // 8] + np.float32(x * y))
        computed = np.float32(sum(float(part) for part in parts))
        size = sum(abs(_F(float(x)) * _F(float(y))) for x, y in zip(a, b, strict=True))
        assert abs(_F(float(computed)) - exact) <= _F(arithmetic.dot(60)) * size


@pytest.mark.parametrize("count", [1, 3, 100, 5000])
def test_the_norm_of_an_array_has_its_allowance(count: int) -> None:
    """(1 + 2 gamma_{n+2}) above what float64 computes: on equal entries the sum itself is exact."""
    value = array_norm_up(np.full(count, 2.0))
    exact = _F(4 * count)
    allowed = (1 + 2 * _gamma(count + 2, U)) ** 2
    assert exact * allowed * (1 - _F(2.0**-51)) <= _F(value) ** 2 <= exact * allowed * (1 + _F(2.0**-49))


def test_what_scaling_loses_is_added() -> None:
    """Entries that vanish beside a large one still count."""
    small = np.full(100, 2.0**-1070)
    large = np.concatenate([[2.0**100], small])
    assert _F(array_norm_up(large)) - _F(2.0**100) >= 0
    assert _F(array_norm_up(np.array([1.0, 2.0**-600]))) >= 1 + 2 * _F(2.0**-500)
