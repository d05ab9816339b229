"""clip: entries of tensors of any shape, exactly, and a limit that the dtype cannot hold rounds towards zero."""

from __future__ import annotations

import pytest
import torch

from hf_lipschitz.caps.arithmetic import NonFiniteWeightError
from hf_lipschitz.caps.clip import clip
from hf_lipschitz.caps.verified_norms import NORMS
from tests.caps.matrices import gaussian

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_outside_end_at_the_limit_and_others_stay(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = (3.0 * gaussian(1, *shape)[0]).to(dtype)
    clipped = clip(weight, value=0.5)
    assert torch.equal(clipped, torch.where(weight.abs() > 0.5, 0.5 * weight.sign(), weight))
    assert (clipped.shape, clipped.dtype) == (weight.shape, dtype)
    assert clipped.data_ptr() != weight.data_ptr() or not weight.numel()


@pytest.mark.parametrize("value", [0.3, 0.1, 1 / 3, 2.9999999999, 1e-41, 3e-8, 1e-50, 60000.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_limit_is_the_largest_number_that_is_at_most_the_value(dtype: torch.dtype, value: float) -> None:
    largest = clip(torch.tensor(65000.0, dtype=dtype), value=value)
    assert largest.item() <= value
    assert NORMS["interval"](largest, None) == largest.item()
    above = torch.nextafter(largest.double(), torch.tensor(torch.inf).double()) if dtype == torch.float64 else None
    if above is None:
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        above = (largest.view(bits) + 1).view(dtype)
    assert above.item() > value
    assert clip(torch.tensor(-65000.0, dtype=dtype), value=value).item() == -largest.item()


def test_rounding_to_nearest_would_exceed_the_value() -> None:
    assert torch.ones(1).clamp(max=0.1).item() > 0.1 >= clip(torch.ones(1), value=0.1).item()


def test_a_scalar_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteWeightError, match="clip: matrix 0 holds NaN"):
        clip(torch.tensor(float("nan")))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clip needs a floating-point tensor, this one is torch.int64 of shape \(\)"):
        clip(torch.tensor(1))
