"""Every cap of the registry: its exact scalar function, a proved norm of what is stored, clear errors."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lipschitz.bounds import spectral
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.caps import storage
from hf_lipschitz.caps.arithmetic import NonFiniteWeightError
from hf_lipschitz.caps.registry import CAPS, Cap, cap_named
from hf_lipschitz.caps.stiefel import _last_step, stiefel
from hf_lipschitz.caps.verified_norms import NORMS, frobenius_norms, row_norms
from tests.caps.cases import CASES
from tests.caps.matrices import HOPELESS, SPECTRA, apply_to_singular_values, gaussian, with_spectrum

NAMES = sorted(CAPS)
PROMISING = [name for name in NAMES if CAPS[name].promises]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
VALUES = [0.3, 1.0, 6.0]


def worst_excess(function: Callable[..., Tensor], norm: str, dtype: torch.dtype, value: float) -> float:
    """The largest proved norm over value that a cap leaves, over random and hopeless inputs."""
    matrices = [make() for make in HOPELESS.values()] + [5.0 * value * gaussian(m, n) for m, n in ((12, 12), (20, 50))]
    worst = -1.0
    for matrix in matrices:
        stored = matrix.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        result = function(stored, value=value)
        assert (result.dtype, result.shape) == (dtype, stored.shape)
        assert torch.isfinite(result).all()
        worst = max(worst, NORMS[norm](result, None) / value - 1.0)
    return worst


def _of_rows(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(matrix, dim=-1)
    return matrix * (function(norms) / norms)[:, None]


# What a scalar function acts on, by norm: (function, float64 matrix) to matrix.
ORACLES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "spectral": apply_to_singular_values,
    "frobenius": apply_to_singular_values,
    "row": _of_rows,
    "interval": lambda function, matrix: function(matrix),
}


def oracle(cap: Cap, matrix: Tensor, value: float) -> Tensor:
    """The cap in real arithmetic, by an SVD, by row norms or by entries, in float64."""
    return ORACLES[cap.norm](lambda s: torch.from_numpy(cap.scalar(s.numpy(), value, float(s.max()))), matrix.double())


def test_every_cap_has_its_row() -> None:
    assert sorted(CASES) == NAMES
    assert all(cap.name == name and cap.norm in NORMS for name, cap in CAPS.items())


def test_the_documentation_has_a_line_for_every_cap() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "constraints.md").read_text()
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    stated = {line[1].strip(" `"): not line[3].strip().startswith("no") for line in lines}
    assert stated == {name: cap.promises for name, cap in CAPS.items()}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 8), (12, 40), (40, 12)], ids=str)
@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
@pytest.mark.parametrize("name", NAMES)
def test_a_cap_follows_its_scalar_function(name: str, spectrum: str, shape: tuple[int, int], value: float) -> None:
    case, cap = CASES[name], CAPS[name]
    singular_values = SPECTRA[spectrum](min(shape))
    if case.needs_full_rank and singular_values.min() < 1e-4:
        singular_values = singular_values.clamp(min=1e-3)
    matrix = with_spectrum(2.0 * singular_values, *shape).float()
    result, wanted = cap.function(matrix, value=value, **case.settings).double(), oracle(cap, matrix, value)
    if case.needs_gap and len(singular_values) > 1 and singular_values[0] < 1.001 * singular_values[1]:
        result, wanted = (torch.diag(torch.linalg.svdvals(each)) for each in (result, wanted))
    distance = torch.linalg.matrix_norm(result - wanted, 2)
    # Rounding of relative size u turns the vectors of the smallest singular value by about u times the condition.
    turned = 2.0**-23 * float(singular_values.max() / singular_values.min()) if case.needs_full_rank else 0.0
    assert distance / value <= case.tolerance + turned


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROMISING)
def test_the_stored_norm_is_within_the_value_whatever_comes_in(name: str, dtype: torch.dtype, value: float) -> None:
    assert worst_excess(CAPS[name].function, CAPS[name].norm, dtype, value) <= 0.0


@pytest.mark.parametrize("value", [1e-50, 1e-43, 1e-30, 1e-10, 1e4, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROMISING)
def test_extreme_values_are_kept_or_refused(name: str, dtype: torch.dtype, value: float) -> None:
    if value > torch.finfo(dtype).max:
        with pytest.raises(ValueError, match="cannot be capped at 1e\\+30"):
            CAPS[name].function(torch.ones(2, 2, dtype=dtype), value=value)
    else:
        assert worst_excess(CAPS[name].function, CAPS[name].norm, dtype, value) <= 0.0


def _by_power_iteration(weight: Tensor, *, value: float) -> Tensor:
    v = torch.ones(weight.shape[-1], dtype=torch.float64)
    for _ in range(20):
        v = weight.double().T @ (weight.double() @ v)
        v = v / v.norm().clamp(min=1e-300)
    return (weight.double() / max(1.0, float((weight.double() @ v).norm()) / value)).to(weight.dtype)


def _by_newton_schulz(weight: Tensor, *, value: float) -> Tensor:
    x = weight / weight.abs().max().clamp(min=1e-44)
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(10):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return value * x


def _rows_without_rounding(weight: Tensor, *, value: float) -> Tensor:
    norms = torch.linalg.vector_norm(weight.double(), dim=-1, keepdim=True)
    return (weight.double() / (norms / value).clamp(min=1.0)).to(weight.dtype)


def _frobenius_without_rounding(weight: Tensor, *, value: float) -> Tensor:
    return (weight.double() / max(1.0, float(weight.double().norm()) / value)).to(weight.dtype)


@pytest.mark.parametrize(
    ("function", "norm"),
    [
        (_by_power_iteration, "spectral"),
        (_by_newton_schulz, "spectral"),
        (_rows_without_rounding, "row"),
        (lambda weight, *, value: stiefel(weight, value=1.02 * value), "spectral"),
        (lambda weight, *, value: weight.clone(), "spectral"),
        (CAPS["spectral_hammer"].function, "spectral"),
        (_frobenius_without_rounding, "frobenius"),
        (lambda weight, *, value: weight.clamp(-1.0000001 * value, 1.0000001 * value), "interval"),
    ],
    ids=["power", "Newton-Schulz", "row rounding", "two percent", "nothing", "hammer", "Frobenius rounding", "clip"],
)
def test_a_wrong_cap_is_found(function: Callable[..., Tensor], norm: str) -> None:
    assert worst_excess(function, norm, torch.float32, 1.0) > 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if CAPS[name].keeps])
def test_what_satisfies_is_kept_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    function = CAPS[name].function
    once = function((3.0 * gaussian(2, 9, 6)).to(dtype), value=1.0)
    assert torch.equal(function(once, value=1.0), once)
    small = (1e-3 * gaussian(9, 6)).to(dtype)
    assert torch.equal(function(small, value=1.0), small)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_capped_matrix_by_matrix_and_the_input_stays(name: str, dtype: torch.dtype) -> None:
    stack = (gaussian(2, 3, 10, 7) * torch.tensor([0.01, 1.0, 30.0])[:, None, None]).to(dtype)
    before = stack.clone()
    result = CAPS[name].function(stack, value=0.7)
    assert torch.equal(stack, before) and result.data_ptr() != stack.data_ptr()
    for index in np.ndindex(2, 3):
        single = CAPS[name].function(stack[index], value=0.7)
        # float32 rounding differs between a stack and a matrix, and 16-bit dtypes may shrink once more or less
        assert torch.allclose(result[index].double(), single.double(), rtol=0, atol=4 * torch.finfo(dtype).eps + 2e-5)
    assert CAPS[name].function(torch.zeros(0, 4, dtype=dtype), value=1.0).shape == (0, 4)


@pytest.mark.parametrize(("entry", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_finite_is_refused_and_its_place_named(name: str, entry: float, word: str) -> None:
    stack = gaussian(3, 4, 5).float()
    stack[2, 1, 1] = entry
    with pytest.raises(NonFiniteWeightError, match=f"{name}: matrix 2 holds {word}") as caught:
        CAPS[name].function(stack, value=1.0)
    assert caught.value.index == 2


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_no_norm_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: a norm cannot be capped at {value!r}"):
        CAPS[name].function(torch.ones(2, 2), value=value)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2) * 1j])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_real_matrix_is_refused(name: str, weight: Tensor) -> None:
    if CASES[name].any_shape and weight.is_floating_point():
        assert torch.equal(CAPS[name].function(weight, value=1.0), weight)
        return
    needed = "tensor" if CASES[name].any_shape else "matrix"
    with pytest.raises(ValueError, match=f"{name} needs a floating-point {needed}"):
        CAPS[name].function(weight, value=1.0)


@pytest.mark.parametrize("slack", [-0.1, 1.0, float("nan")])
def test_a_slack_that_is_no_fraction_is_refused(slack: float) -> None:
    with pytest.raises(ValueError, match="slack is a fraction"):
        stiefel(torch.eye(3), slack=slack)


def test_a_slack_lowers_the_aim() -> None:
    norms = torch.linalg.svdvals(stiefel(gaussian(6, 9).float(), value=2.0, slack=0.01).double())
    assert torch.allclose(norms, torch.full_like(norms, 1.98), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_recorded(name: str) -> None:
    assert not CAPS[name].function(gaussian(4, 4).requires_grad_(), value=0.1).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_inside(name: str) -> None:
    weight = gaussian(16, 16).float()
    outside = CAPS[name].function(weight, value=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CAPS[name].function(weight, value=1.0), outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stiefel_holds_when_its_float32_steps_are_wrong(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm rests on the last step alone: earlier ones, rounded to bfloat16 and 2 % low, change nothing of it."""
    exact = torch.Tensor.matmul

    def rough(a: Tensor, b: Tensor) -> Tensor:
        return exact(a, b) if a.dtype == torch.float64 else exact(a.bfloat16(), b.bfloat16()).to(a.dtype) * 0.98

    monkeypatch.setattr(torch.Tensor, "__matmul__", rough)
    assert worst_excess(stiefel, "spectral", dtype, 1.0) <= 0.0


@pytest.mark.parametrize("factor", [0.5, 1.9, 2.1, 30.0])
@pytest.mark.parametrize("rank", [1, 10, 20])
def test_the_last_step_of_stiefel_is_safe_from_anywhere(rank: int, factor: float) -> None:
    singular_values = torch.where(torch.arange(20) < rank, factor, 0.0).to(torch.float64)
    result = _last_step(with_spectrum(singular_values, 20, 30)[None].float())
    assert 0.6 < float(torch.linalg.matrix_norm(result[0], 2)) <= 1.0 + 1e-12


def test_stiefel_keeps_the_rank() -> None:
    singular_values = torch.tensor([5.0] * 12 + [0.1] * 4 + [0.0] * 14, dtype=torch.float64)
    norms = torch.linalg.svdvals(stiefel(with_spectrum(singular_values, 30, 40)).double())
    assert torch.allclose(norms[:16], torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert norms[16] < 1e-8


@pytest.mark.parametrize("step", [0.3, 0.06, 1e-3, 3e-4, 1e-6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)], ids=["32", "64"])
def test_stiefel_repairs_an_update(dtype: torch.dtype, tolerance: float, step: float) -> None:
    """From singular values 1 +- step, as an update leaves them, all come back to 1."""
    frame, other = (stiefel(gaussian(48, 96, seed=seed).to(dtype)) for seed in (0, 1))
    values = torch.linalg.svdvals(stiefel(frame + step * other).double())
    assert (1.0 - values).abs().max() < tolerance


def test_an_unknown_cap_is_named_with_the_nearest() -> None:
    assert cap_named("stiefel") is CAPS["stiefel"]
    with pytest.raises(ValueError, match="no cap named 'stiefl': did you mean 'stiefel'"):
        cap_named("stiefl")
    with pytest.raises(ValueError, match=f"known caps are {', '.join(NAMES)}"):
        cap_named("something else")


def _adversarial_rounding(size: int, norm: float) -> Tensor:
    """A multiple of a Hadamard matrix whose entries all round towards plus infinity in float32.

    Positive entries sit just above, negative ones just below a rounding midpoint in magnitude; so rounding adds half a
    unit in the last place to every entry, a matrix of rank one that lies in the matrix's own singular directions.
    """
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    entry = torch.tensor(norm / size**0.5).item()
    ulp = 2.0 ** (torch.tensor(entry).log2().floor().item() - 23)
    midpoint = (entry // ulp - 0.5) * ulp
    return torch.where(hadamard > 0, midpoint + ulp * 1e-3, -midpoint + ulp * 1e-3)


def _stored_excess(size: int) -> float:
    aim = 1.0 - storage.storage_slack(size, size)
    exact = _adversarial_rounding(size, aim)
    return NORMS["spectral"](storage.store_within(exact[None], [aim], 1.0, torch.float32), None) - 1.0


def test_adversarial_rounding_is_covered() -> None:
    assert _stored_excess(256) <= 0.0


def test_a_slack_without_the_root_of_the_width_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "storage_slack", lambda rows, columns: 3.0 * 2.0**-24)
    assert _stored_excess(256) > 0.0


def _loosely_read_excess() -> float:
    """Of a matrix whose norm the kernel proves by its deviation from orthogonality: one singular value is 5e-7 low."""
    exact = torch.diag(torch.tensor([1.0] * 7 + [1.0 - 5e-7], dtype=torch.float64))
    return NORMS["spectral"](storage.store_within(exact[None], [1.0], 1.0, torch.float32), None) - 1.0


def test_the_slack_covers_what_the_proved_bound_may_add(monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage._BOUND_EXCESS > spectral._NEAR_ORTHOGONAL / 2
    assert _loosely_read_excess() <= 0.0
    monkeypatch.setattr(storage, "_BOUND_EXCESS", 0.0)
    assert _loosely_read_excess() > 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_norms_are_upper_bounds_and_tight(dtype: torch.dtype) -> None:
    weight = torch.cat([gaussian(5, 300), 1e-300 * gaussian(1, 300), 1e300 * gaussian(1, 300)]).to(dtype)
    weight = weight[torch.isfinite(weight).all(dim=1)]
    for row, bound in zip(weight, row_norms(weight).tolist(), strict=True):
        exact_squared = sum(Fraction(entry) ** 2 for entry in row.tolist())
        assert exact_squared <= Fraction(bound) ** 2 <= exact_squared * (1 + Fraction(1, 10**12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frobenius_norms_are_upper_bounds_and_tight(dtype: torch.dtype) -> None:
    weight = torch.stack([gaussian(7, 40), 1e-300 * gaussian(7, 40), 1e300 * gaussian(7, 40)]).to(dtype)
    weight = weight[torch.isfinite(weight).flatten(1).all(dim=1)]
    for matrix, bound in zip(weight, frobenius_norms(weight).tolist(), strict=True):
        exact_squared = sum(Fraction(entry) ** 2 for entry in matrix.flatten().tolist())
        assert exact_squared <= Fraction(bound) ** 2 <= exact_squared * (1 + Fraction(1, 10**12))


@pytest.mark.parametrize("norm", ["spectral", "per_head", "frobenius", "interval"])
def test_what_is_not_finite_has_no_norm(norm: str) -> None:
    with pytest.raises(KernelError, match="contains NaN or infinite entries"):
        NORMS[norm](torch.tensor([[1.0, float("nan")], [0.0, 2.0]]), 1)


def test_a_capped_frobenius_norm_caps_the_spectral_norm() -> None:
    for make in HOPELESS.values():
        assert NORMS["spectral"](CAPS["frobenius_normalize"].function(make(), value=0.3), None) <= 0.3 * (1.0 + 1e-6)
