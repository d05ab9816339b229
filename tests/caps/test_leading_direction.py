"""spectral_hammer and spectral_weight_decay: the leading singular value moves by a change of rank one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lipschitz.caps import leading_direction
from hf_lipschitz.caps.arithmetic import NonFiniteWeightError
from hf_lipschitz.caps.leading_direction import _leading_vector
from hf_lipschitz.caps.spectral_hammer import spectral_hammer
from hf_lipschitz.caps.spectral_weight_decay import spectral_weight_decay
from tests.caps.matrices import HOPELESS, gaussian, with_spectrum

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 1), (1, 7), (7, 1), (8, 8), (12, 40), (40, 12)]
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-12}


def by_svd(matrix: Tensor, factor: float, target: float) -> Tensor:
    """The leading singular value s becomes ``factor * s + target``."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s[0] = factor * s[0] + target
    return (u * s) @ vh


def _distance(result: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.matrix_norm(result.double() - wanted, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("value", [0.3, 5.0, 60.0])
def test_the_hammer_follows_the_svd_from_above_and_below(
    value: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    singular_values = torch.linspace(10.0, 1.0, min(shape), dtype=torch.float64)
    matrix = with_spectrum(singular_values, *shape).to(dtype)
    result = spectral_hammer(matrix, value=value)
    assert (result.dtype, result.shape) == (dtype, matrix.shape)
    assert _distance(result, by_svd(matrix, 0.0, value)) <= max(10.0, value) * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])
def test_the_decay_follows_the_svd(rate: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    singular_values = torch.linspace(10.0, 1.0, min(shape), dtype=torch.float64)
    matrix = with_spectrum(singular_values, *shape).to(dtype)
    result = spectral_weight_decay(matrix, rate=rate)
    assert (result.dtype, result.shape) == (dtype, matrix.shape)
    assert _distance(result, by_svd(matrix, 1.0 - rate, 0.0)) <= 10.0 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rate_of_nothing_changes_nothing(dtype: torch.dtype) -> None:
    matrix = gaussian(2, 5, 6).to(dtype)
    result = spectral_weight_decay(matrix, rate=0)
    assert torch.equal(result, matrix) and result.data_ptr() != matrix.data_ptr()


def test_the_second_singular_value_stays_above_the_cap() -> None:
    matrix = with_spectrum(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64), 3, 9)
    found = torch.linalg.svdvals(spectral_hammer(matrix, value=2.0))
    assert torch.allclose(found, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), rtol=1e-12)


def test_the_direction_that_was_found_ends_at_the_value_even_if_it_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, u = gaussian(9, 14), torch.nn.functional.normalize(gaussian(9, seed=1), dim=0)
    monkeypatch.setattr(leading_direction, "_leading_vector", lambda x: u[None, :, None])
    length = (u @ matrix).norm()
    assert (u @ spectral_hammer(matrix, value=0.4)).norm() == pytest.approx(0.4, rel=1e-12)
    assert (u @ spectral_weight_decay(matrix, rate=0.25)).norm() == pytest.approx(0.75 * length.item(), rel=1e-12)
    assert _distance(spectral_hammer(matrix, value=0.4), by_svd(matrix, 0.0, 0.4)) > 0.1  # and the oracle notices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(HOPELESS))
def test_whatever_comes_in_the_result_is_finite_and_zero_stays(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    matrix = HOPELESS[name]().clamp(-largest, largest).to(dtype)
    hammered, decayed = spectral_hammer(matrix, value=1.0), spectral_weight_decay(matrix, rate=0.3)
    assert torch.isfinite(hammered).all() and torch.isfinite(decayed).all()
    if not matrix.any():
        assert torch.equal(hammered, matrix) and torch.equal(decayed, matrix)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_the_scale_of_a_matrix_does_not_matter(scale: float) -> None:
    matrix = with_spectrum(torch.linspace(10.0, 1.0, 6, dtype=torch.float64), 6, 9)
    result = spectral_hammer(scale * matrix, value=2.0 * scale) / scale
    assert _distance(result, by_svd(matrix, 0.0, 2.0)) < 1e-11


@pytest.mark.parametrize(
    ("gap", "equals", "angle"),
    [(0.5, 11, 1e-12), (0.9, 11, 1e-12), (0.98, 11, 1e-4), (0.99, 11, 0.1)],
)
def test_the_angle_shrinks_with_the_gap_to_the_ninth(gap: float, equals: int, angle: float) -> None:
    singular_values = torch.tensor([1.0] + [gap] * equals, dtype=torch.float64)
    matrix = with_spectrum(singular_values, 12, 20)
    leading = torch.linalg.svd(matrix)[0][:, 0]
    found = _leading_vector((matrix / matrix.abs().max())[None])[0, :, 0]
    assert (found - (found @ leading) * leading).norm() <= angle


def test_seven_more_values_near_the_largest_do_not_slow_it_down() -> None:
    singular_values = torch.tensor([1.0] + [0.999] * 7 + [0.5] * 4, dtype=torch.float64)
    matrix = with_spectrum(singular_values, 12, 20)
    assert _distance(spectral_hammer(matrix, value=0.1), by_svd(matrix, 0.0, 0.1)) < 1e-12


def test_equal_largest_values_of_any_number_move_one_by_one() -> None:
    for equals in (2, 8, 12):
        matrix = with_spectrum(torch.tensor([3.0] * equals + [1.0] * (12 - equals), dtype=torch.float64), 12, 20)
        found = torch.linalg.svdvals(spectral_hammer(matrix, value=0.5))
        wanted = torch.tensor([3.0] * (equals - 1) + [1.0] * (12 - equals) + [0.5], dtype=torch.float64)
        assert torch.allclose(found, wanted, rtol=1e-10)


def test_runs_repeat() -> None:
    matrix = gaussian(30, 40).float()
    torch.manual_seed(1)
    first = spectral_hammer(matrix)
    torch.manual_seed(2)
    assert torch.equal(spectral_hammer(matrix), first)


def test_what_float16_cannot_hold_becomes_its_largest_number() -> None:
    """The change of rank one can raise an entry: here a row of -60000 meets one of +60000 that must go."""
    matrix = torch.full((2, 2), 60000.0, dtype=torch.float16)
    assert spectral_hammer(matrix, value=65504.0 * 2**0).isfinite().all()
    assert spectral_hammer(torch.tensor([[60000.0, 0.0]]).half(), value=65504.0).max().item() == 65504.0


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "1"])
def test_a_rate_that_is_no_fraction_is_refused(rate: object) -> None:
    with pytest.raises(ValueError, match=rf"rate is a fraction in \[0, 1\], not {rate!r}"):
        spectral_weight_decay(torch.eye(2), rate=rate)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_decay_refuses_what_is_no_finite_matrix(rate: float) -> None:
    with pytest.raises(ValueError, match="spectral_weight_decay needs a floating-point matrix"):
        spectral_weight_decay(torch.ones(3), rate=rate)
    with pytest.raises(NonFiniteWeightError, match="spectral_weight_decay: matrix 1 holds NaN"):
        spectral_weight_decay(torch.tensor([[[1.0]], [[float("nan")]]]), rate=rate)
    assert spectral_weight_decay(torch.zeros(0, 4), rate=rate).shape == (0, 4)


def test_the_decay_leaves_autocast_and_gradients() -> None:
    weight = gaussian(16, 16).float().requires_grad_()
    outside = spectral_weight_decay(weight, rate=0.2)
    assert not outside.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spectral_weight_decay(weight, rate=0.2), outside)
