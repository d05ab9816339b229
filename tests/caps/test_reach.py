"""Caps that start from a known bound: their strength, the error of their products, and what they do with the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.caps.reach import PRODUCT_ERROR, correct_
from hf_lipschitz.caps.registry import CAPS
from hf_lipschitz.caps.spectral_power_cap import POWER_CAPS, POWERS, power_cap_limit, spectral_power_cap
from hf_lipschitz.caps.spectral_soft_cap import SOFT_CAP, soft_cap_strength, spectral_soft_cap
from hf_lipschitz.caps.verified_norms import spectral_norms
from tests.caps.matrices import SPECTRA, gaussian, with_spectrum

REACHING = ["decay", "spectral_power_cap", "spectral_soft_cap"]
CORRECTIONS = {"soft": SOFT_CAP, **{f"power {power}": POWER_CAPS[power] for power in POWERS}}


def soft(x: np.ndarray, strength: float) -> np.ndarray:
    once = x - strength * x**3
    return once + strength * once**3


@pytest.mark.parametrize("value", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("ratio", [1.0 + 1e-12, 1.0001, 1.01, 1.1, 1.3, 81 / 62, 1.5, 2.0, 2.6, 81 / 31 * (1 - 1e-12)])
def test_the_strength_is_enough_and_the_smallest(ratio: float, value: float) -> None:
    reach = ratio * value
    x = np.append(np.linspace(0.0, reach, 20001), reach)
    strength = soft_cap_strength(value, reach)
    assert np.abs(soft(x, strength)).max() <= value * (1.0 + 1e-12)
    if ratio > 1.00001:
        assert np.abs(soft(x, strength * 0.999)).max() > value


def test_the_strength_in_the_paper_s_setting() -> None:
    """Its equation for the reach 1 + lr and the value 1, solved by NumPy's polynomial roots."""
    for lr in (0.01, 0.05, 0.1, 0.2):
        k = 1.0 + lr
        roots = np.roots([-(k**9), 3 * k**7, -3 * k**5, 0.0, k - 1.0])
        smallest = min(root.real for root in roots if abs(root.imag) < 1e-9 and root.real >= 0.0)
        assert soft_cap_strength(1.0, k) == pytest.approx(smallest, rel=1e-9)


def test_no_strength_beyond_the_limit() -> None:
    assert soft_cap_strength(1.0, 1.0) == soft_cap_strength(1.0, 0.3) == 0.0
    with pytest.raises(ValueError, match=r"no soft cap brings a norm of 2\.7 down to 1, more than 2\.613 times"):
        soft_cap_strength(1.0, 2.7)
    with pytest.raises(ValueError, match="must be positive"):
        soft_cap_strength(0.0, 1.0)


@pytest.mark.parametrize("power", POWERS)
def test_the_power_cap_is_monotone_up_to_its_limit_and_not_beyond(power: int) -> None:
    def mapped(reach: float) -> np.ndarray:
        x = np.linspace(0.0, reach, 10001)
        return x - (reach - 1.0) * (x / reach) ** power

    limit = power_cap_limit(power)
    assert np.diff(mapped(limit)).min() >= 0.0 and mapped(limit).max() == pytest.approx(1.0, abs=1e-12)
    assert mapped(1.05 * limit).max() > 1.0
    with pytest.raises(ValueError, match="power is 7: choose 3, 5 or 9"):
        spectral_power_cap(torch.eye(3), power=7)


def _hadamard(size: int, rounding: float) -> Tensor:
    """Entries of one size; rounding to bfloat16 lifts positive ones and lowers negative ones."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)], 0)
    return signs * torch.where(signs > 0, 1.0 + 1.002 * rounding, 1.0 + 0.998 * rounding)


def hard_matrices(rows: int, columns: int) -> dict[str, Tensor]:
    small = min(rows, columns)
    found = {name: with_spectrum(make(small), rows, columns) for name, make in SPECTRA.items()}
    found["gaussian"] = gaussian(rows, columns)
    found["ones"] = torch.ones(rows, columns, dtype=torch.float64)
    if small & (small - 1) == 0:
        found["coherent rounding"] = _hadamard(small, 2.0**-9).repeat(rows // small, columns // small)
    return {name: matrix / torch.linalg.matrix_norm(matrix, 2) for name, matrix in found.items()}


def product_error(name: str, dtype: torch.dtype, sizes: Sequence[tuple[int, int]]) -> float:
    """The largest relative error of a correction over hard matrices and all regimes of the reach."""
    correction = CORRECTIONS[name]
    worst = 0.0
    for size in sizes:
        for matrix in hard_matrices(*size).values():
            given = matrix.float()[None]
            for target in (0.999, 0.9, 1.0 / (0.5 + 0.5 * correction.limit), 1.0001 / correction.limit):
                before, after = correction.before(target, 1.0), correction.after(target, 1.0)
                got = correction.polynomial((before * given).to(dtype)).double()
                wanted = correction.polynomial(before * given.double())
                error = after * torch.linalg.matrix_norm(got - wanted, 2).item()
                worst = max(worst, error / (1.0 - target))
    return worst


SIZES = [(1, 1), (3, 7), (64, 64), (64, 256), (200, 230)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_products_err_less_than_is_stated(name: str, dtype: torch.dtype) -> None:
    assert product_error(name, dtype, SIZES) <= 0.6 * PRODUCT_ERROR[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_products_of_wide_matrices_err_less_than_is_stated(name: str, dtype: torch.dtype) -> None:
    assert product_error(name, dtype, [(512, 512), (768, 768), (256, 3072)]) <= 0.6 * PRODUCT_ERROR[dtype]


def test_the_error_of_products_is_seen() -> None:
    assert product_error("power 9", torch.bfloat16, [(64, 64)]) > 0.01


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ratio", [1.0 + 1e-6, 1.01, 1.2, 1.4, 2.5, 3.0, 50.0])
@pytest.mark.parametrize("name", ["spectral_soft_cap", "spectral_power_cap"])
def test_from_a_sharp_reach_the_proved_norm_is_within_the_value(name: str, ratio: float, compute: torch.dtype) -> None:
    """The reach is the norm itself, so nothing but the stated error covers the rounding."""
    for value in (0.3, 4.0):
        for matrix in (*hard_matrices(32, 64).values(), *hard_matrices(72, 40).values()):
            weight = (ratio * value * matrix).float()
            reach = spectral_norms(weight)
            got = CAPS[name].function(weight, value=value, reach=reach, compute_dtype=compute)
            norm = spectral_norms(got)[0]
            assert norm <= value
            assert norm > 0.7 * value or ratio > 1.3  # there the soft cap may take a flat spectrum through zero


def test_a_cap_that_ignores_the_rounding_of_products_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCT_ERROR, torch.bfloat16, 0.0)
    with pytest.raises(AssertionError):
        test_from_a_sharp_reach_the_proved_norm_is_within_the_value("spectral_power_cap", 1.2, torch.bfloat16)


@pytest.mark.parametrize("name", REACHING)
def test_aligned_pushes_never_leave_the_cap(name: str) -> None:
    """One direction is pushed outwards in each step, at full length, from the largest reach a cap allows."""
    value, step = 1.0, 0.05
    push = with_spectrum(SPECTRA["rank one"](24), 24, 40).float()
    stack = torch.stack([push, 0.3 * gaussian(24, 40).float() / 10.0])
    excess = -1.0
    for index in range(120):
        stack = stack + step * (push if index % 7 else -push)
        stack = CAPS[name].function(stack, value=value, reach=[value + step * 1.0001, value + step * 1.0001])
        excess = max(excess, max(spectral_norms(stack)) - value)
    assert -0.1 < excess <= 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", REACHING)
def test_the_reach_is_trusted(name: str, dtype: torch.dtype) -> None:
    stack = torch.stack([3.0 * gaussian(9, 6), gaussian(9, 6, seed=1)]).to(dtype)
    kept = CAPS[name].function(stack, value=1.0, reach=[0.5, 1.0])  # a lie: nothing is looked at
    assert torch.equal(kept, stack) and kept.data_ptr() != stack.data_ptr()
    one = CAPS[name].function(stack, value=4.0, reach=[30.0, 4.0])
    assert torch.equal(one[1], stack[1]) and not torch.equal(one[0], stack[0])


@pytest.mark.parametrize("reach", [[1.0], [1.0, math.nan], [math.inf, 1.0], [-1.0, 2.0]], ids=str)
@pytest.mark.parametrize("name", REACHING)
def test_a_reach_that_bounds_nothing_is_refused(name: str, reach: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{name}: reach is .*give a finite bound .* each of the 2 matrices"):
        CAPS[name].function(torch.ones(2, 3, 3), value=0.5, reach=reach)


@pytest.mark.parametrize("function", [spectral_soft_cap, spectral_power_cap])
def test_an_unknown_compute_dtype_is_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="cannot compute in torch\\.float16: use bfloat16"):
        function(torch.ones(3, 3), value=0.5, compute_dtype=torch.float16)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("name", ["spectral_soft_cap", "spectral_power_cap"])
def test_in_place_it_does_the_same(name: str, shape: tuple[int, int]) -> None:
    stack = torch.stack([gaussian(*shape, seed=seed).float() for seed in range(3)])
    reach = [1.001 * norm for norm in spectral_norms(stack)]
    value = 0.95 * min(reach)
    correction = CAPS[name].correction
    assert correction is not None
    wanted = CAPS[name].function(stack, value=value, reach=reach)
    matrices = [nn.Parameter(matrix.clone()) for matrix in stack]
    with torch.no_grad():
        assert correct_(matrices, torch.empty_like(stack), correction, value=value, reach=reach)
        assert torch.allclose(torch.stack(list(matrices)), wanted, rtol=0.0, atol=1e-2 * value)
        assert max(spectral_norms(torch.stack(list(matrices)))) <= value
        before = [matrix.clone() for matrix in matrices]
        for other_value, other_reach in ((0.1, [2.0 * max(reach)] * 3), (1e-30, [1.01e-30] * 3)):
            assert not correct_(matrices, torch.empty_like(stack), correction, value=other_value, reach=other_reach)
        assert all(torch.equal(a, b) for a, b in zip(matrices, before, strict=True))
