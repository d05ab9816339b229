"""spectral_hard_cap: close to an SVD where it is hard, a norm that rests on no product, and what it may skip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lipschitz.caps import spectral_hard_cap as module
from hf_lipschitz.caps.schedules import schedule
from hf_lipschitz.caps.spectral_hard_cap import spectral_hard_cap
from hf_lipschitz.caps.verified_norms import spectral_norms
from tests.caps.matrices import AROUND_ONE, apply_to_singular_values, gaussian, with_spectrum
from tests.caps.test_caps import worst_excess

TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-10}


def distance(matrix: Tensor, capped: Tensor, value: float) -> float:
    """To the cap by SVD, in units of the value."""
    wanted = apply_to_singular_values(lambda s: s.clamp(max=value), matrix)
    return float(torch.linalg.matrix_norm(capped.double() - wanted, 2)) / value


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("ratio", [1.001, 2.0, 3.9, 100.0])
@pytest.mark.parametrize("shape", [(8, 8), (12, 40), (60, 48)], ids=str)
@pytest.mark.parametrize("spectrum", sorted(AROUND_ONE))
def test_it_follows_the_svd_where_that_is_hard(
    spectrum: str, shape: tuple[int, int], ratio: float, dtype: torch.dtype
) -> None:
    value = 0.7
    matrix = (value * with_spectrum(AROUND_ONE[spectrum](min(shape), ratio), *shape)).to(dtype)
    capped = spectral_hard_cap(matrix, value=value)
    assert distance(matrix, capped, value) <= TOLERANCES[dtype]
    assert spectral_norms(capped)[0] <= value


@pytest.mark.slow_ci
@pytest.mark.parametrize("spectrum", sorted(AROUND_ONE))
@pytest.mark.parametrize("ratio", [1.05, 100.0])
def test_it_follows_the_svd_at_the_size_of_a_model(spectrum: str, ratio: float) -> None:
    matrix = with_spectrum(AROUND_ONE[spectrum](256, ratio), 256, 512).float()
    assert distance(matrix, spectral_hard_cap(matrix), 1.0) <= TOLERANCES[torch.float32]


def _plain_formula(x: Tensor, value: float) -> Tensor:
    """``(X + w O - (X - w O) msign(X - w O)^T O) / 2``, which needs O to be right for all singular values."""

    def msign(y: Tensor) -> Tensor:
        y = y / torch.linalg.matrix_norm(y)
        for a, b, c in schedule(8):
            gram = y @ y.mT
            y = a * y + (b * gram + c * gram @ gram) @ y
        for _ in range(4):
            y = 1.5 * y - 0.5 * y @ y.mT @ y
        return y

    o = msign(x)
    d = x - value * o
    return (x + value * o - d @ msign(d).mT @ o) / 2.0


def test_the_plain_formula_is_found_where_small_values_are_not_resolved() -> None:
    """Of large singular values it is exact; half resolved ones cost it a tenth of the value."""
    found = {}
    for spectrum in ("one above", "log"):
        matrix = with_spectrum(AROUND_ONE[spectrum](12, 2.0), 12, 40).double()
        found[spectrum] = distance(matrix, _plain_formula(matrix, 1.0), 1.0)
    assert found["one above"] < 1e-6
    assert found["log"] > 0.05


def test_float32_products_at_a_large_ratio_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum(AROUND_ONE["rank-deficient"](48, 100.0), 48, 60).float()
    assert distance(matrix, spectral_hard_cap(matrix), 1.0) <= TOLERANCES[torch.float32]
    monkeypatch.setattr(module, "_RATIO_OF_FLOAT32", 1e9)
    assert distance(matrix, spectral_hard_cap(matrix), 1.0) > 10 * TOLERANCES[torch.float32]


def test_one_projector_lets_the_largest_value_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there are two: an error in P of 1e-4 is seen a hundredfold with one, and not enlarged with two."""
    x = with_spectrum(AROUND_ONE["one above"](12, 100.0), 12, 40)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    o, error = u @ vh, 1e-4 * gaussian(12, 12)
    p = u @ torch.diag((s > 1.0).double()) @ u.T + error @ error.T + (error + error.T) / 2.0
    h = x @ o.T
    m, d = h - torch.eye(12), x - o
    one, two = x - p @ d, x - p @ d - (torch.eye(12) - p) @ m @ p @ o
    assert distance(x, one, 1.0) > 1e-2
    assert distance(x, two, 1.0) < 2e-3


@pytest.mark.parametrize("scale", [1e6, 1e8, 1e30])
def test_a_matrix_far_above_the_cap_keeps_its_directions(scale: float) -> None:
    matrix = (scale * with_spectrum(torch.linspace(5.0, 1.0, 12, dtype=torch.float64), 12, 40)).float()
    assert distance(matrix, spectral_hard_cap(matrix), 1.0) <= 1e-4


def test_the_norm_rests_on_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are 2 % low and rounded to bfloat16 cost accuracy; what is stored still satisfies."""
    exact = torch.baddbmm

    def rough(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
        low = (factor.bfloat16().to(factor.dtype) for factor in (a, b))
        return exact(base, *low, beta=beta, alpha=0.98 * alpha)

    monkeypatch.setattr(torch, "baddbmm", rough)
    assert worst_excess(spectral_hard_cap, "spectral", torch.float32, 1.0) <= 0.0
    matrix = with_spectrum(AROUND_ONE["linear"](12, 2.0), 12, 40).float()
    assert distance(matrix, spectral_hard_cap(matrix), 1.0) > 10 * TOLERANCES[torch.float32]


def test_a_known_reach_decides_what_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = gaussian(2, 2, 6, 9).float()
    stack[0, 1] *= 1e-3
    looked_at: list[int] = []

    def counted(weight: Tensor) -> list[float]:
        looked_at.append(len(weight))
        return spectral_norms(weight)

    monkeypatch.setattr(module, "spectral_norms", counted)
    capped = spectral_hard_cap(stack, value=1.0, reach=[50.0, 50.0, 1.0, 50.0])
    assert looked_at == [3, 2]
    assert torch.equal(capped[0, 1], stack[0, 1])  # satisfies, though its reach does not say so
    assert torch.equal(capped[1, 0], stack[1, 0])  # trusted
    for index in ((0, 0), (1, 1)):
        assert distance(stack[index], capped[index], 1.0) <= TOLERANCES[torch.float32]
    looked_at.clear()
    assert torch.equal(spectral_hard_cap(stack, value=1.0, reach=[0.5, 0.5, 1.0, 1.0]), stack)
    assert looked_at == [0]


def test_a_reach_that_is_not_a_number_is_no_reason_to_skip() -> None:
    matrix = gaussian(6, 9).float()
    assert torch.equal(spectral_hard_cap(matrix, reach=[float("nan")]), spectral_hard_cap(matrix))


def test_a_reach_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bounds for 3 matrices"):
        spectral_hard_cap(gaussian(3, 4, 4), reach=[1.0, 1.0])
