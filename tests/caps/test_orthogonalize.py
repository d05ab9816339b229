"""orthogonalize: the scalar polynomial on singular values, a norm within the stated bound, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lipschitz.caps import arithmetic
from hf_lipschitz.caps import orthogonalize as module
from hf_lipschitz.caps.arithmetic import matmul_dtype
from hf_lipschitz.caps.orthogonalize import UPDATE_NORM_BOUND, orthogonalize, orthogonalize_
from hf_lipschitz.caps.reach import correct_
from hf_lipschitz.caps.registry import CAPS
from hf_lipschitz.caps.schedules import MAX_STEPS, schedule
from tests.caps.matrices import SPECTRA, apply_to_singular_values, gaussian, with_spectrum

SHAPES = [(1, 1), (2, 2), (1, 9), (16, 16), (16, 48), (48, 16), (64, 64)]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def inputs() -> list[Tensor]:
    """Every spectrum at every shape, and Gaussians."""
    found = [gaussian(*shape) for shape in SHAPES]
    for rows, columns in SHAPES:
        found += [with_spectrum(spectrum(min(rows, columns)), rows, columns) for spectrum in SPECTRA.values()]
    return found


def largest_norm(dtype: torch.dtype, steps: int) -> float:
    results = (orthogonalize(m.float(), steps=steps, compute_dtype=dtype) for m in inputs())
    return max(float(torch.linalg.svdvals(result.double())[0]) for result in results)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, MAX_STEPS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_within_the_stated_bound(dtype: torch.dtype, steps: int) -> None:
    stored = 1e-6 if dtype == torch.float64 else 0.0  # the float64 result was rounded to the input's float32 here
    assert largest_norm(dtype, steps) <= UPDATE_NORM_BOUND[dtype] + stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_schedule_that_is_not_divided_by_its_maximum_is_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = schedule(MAX_STEPS)
    monkeypatch.setattr(module, "schedule", lambda steps: whole[:steps])
    assert largest_norm(dtype, 4) > UPDATE_NORM_BOUND[dtype]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 12, 8)], ids=str)
@pytest.mark.parametrize("steps", [3, 5, 8])
def test_it_acts_on_singular_values_alone(shape: tuple[int, ...], steps: int) -> None:
    matrix = gaussian(*shape)
    expected = []
    for single in matrix.reshape(-1, *shape[-2:]):
        gram = single @ single.T
        scale = torch.linalg.matrix_norm(gram @ gram).sqrt().sqrt()
        expected.append(apply_to_singular_values(lambda s, scale=scale: _compose(s / scale, steps), single))
    assert torch.allclose(orthogonalize(matrix, steps=steps), torch.stack(expected).reshape(shape), rtol=0, atol=1e-11)


def _compose(x: Tensor, steps: int) -> Tensor:
    for a, b, c in schedule(steps):
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("steps", "most"), [(4, 0.2), (5, 0.12)])
def test_few_steps_bring_a_gaussian_close_to_its_polar_factor(steps: int, most: float, dtype: torch.dtype) -> None:
    matrix = gaussian(64, 64).float()
    polar = apply_to_singular_values(torch.ones_like, matrix)
    error = torch.linalg.matrix_norm(orthogonalize(matrix, steps=steps, compute_dtype=dtype) - polar) / 8.0
    assert error < most  # torch.optim.Muon's five steps leave 0.3 here


@pytest.mark.parametrize("factor", [1e-40, 1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_the_scale_of_the_input_does_not_matter(factor: float) -> None:
    matrix = gaussian(12, 20).float()
    scaled = orthogonalize(matrix * factor, compute_dtype=torch.float32)
    tolerance = 1e-2 if factor == 1e-40 else 1e-4  # subnormal numbers have few digits
    assert torch.allclose(scaled, orthogonalize(matrix, compute_dtype=torch.float32), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_matrix_stays_zero_also_in_a_stack(dtype: torch.dtype) -> None:
    stack = torch.stack([torch.zeros(5, 7), gaussian(5, 7).float()])
    result = orthogonalize(stack, compute_dtype=dtype)
    assert torch.equal(result[0], torch.zeros(5, 7))
    assert torch.isfinite(result).all() and result[1].abs().max() > 0.1


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(entry: float) -> None:
    matrix = gaussian(4, 4).float()
    matrix[1, 2] = entry
    assert orthogonalize(matrix).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_input_is_untouched_and_its_dtype_and_shape_are_kept(dtype: torch.dtype) -> None:
    matrix = gaussian(2, 9, 5).to(dtype)
    before = matrix.clone()
    result = orthogonalize(matrix)
    assert torch.equal(matrix, before)
    assert (result.shape, result.dtype) == (matrix.shape, dtype)
    assert orthogonalize(torch.zeros(0, 3)).shape == (0, 3)


def test_autocast_does_not_reach_inside() -> None:
    matrix = gaussian(16, 16).float()
    outside = orthogonalize(matrix, compute_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonalize(matrix, compute_dtype=torch.float32), outside)


@pytest.mark.parametrize(
    ("matrix", "settings", "message"),
    [
        (torch.zeros(3), {}, r"orthogonalize needs a floating-point matrix .* shape \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.int64), {}, "needs a floating-point matrix .* torch.int64"),
        (torch.zeros(3, 3), {"steps": 9}, "1 to 8 steps, not 9"),
        (torch.zeros(3, 3), {"compute_dtype": torch.float16}, "cannot compute in torch.float16"),
    ],
)
def test_wrong_arguments_are_refused(matrix: Tensor, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(matrix, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_fast_dtype_follows_the_processor(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert matmul_dtype.__wrapped__("cpu") == expected
    assert matmul_dtype.__wrapped__("meta") == torch.float32


def test_older_releases_are_asked_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert arithmetic._cpu_multiplies_bfloat16()
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not arithmetic._cpu_multiplies_bfloat16()


class _Results(TorchDispatchMode):
    """Collects what batched products write."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.found.append(result)
        return result


def _products_of_orthogonalize(stack: Tensor) -> None:
    orthogonalize_(stack.clone(), steps=4, compute_dtype=torch.bfloat16)


def _products_of_a_correction(stack: Tensor) -> None:
    correction = CAPS["spectral_soft_cap"].correction
    assert correction is not None
    assert correct_(list(stack.clone()), torch.empty_like(stack), correction, value=1.0, reach=[1.02] * len(stack))


@pytest.mark.parametrize("shape", [(2, 12, 30), (2, 30, 12)], ids=str)
@pytest.mark.parametrize("run", [_products_of_orthogonalize, _products_of_a_correction])
def test_products_write_memory_in_order(run: Callable[[Tensor], None], shape: tuple[int, ...]) -> None:
    """bfloat16 products into a transposed stack took several hundred times as long on a CPU (torch 2.14)."""
    with _Results() as products, torch.no_grad():
        run(0.01 * gaussian(*shape).float())
    assert len(products.found) >= 4 and all(product.is_contiguous() for product in products.found)
