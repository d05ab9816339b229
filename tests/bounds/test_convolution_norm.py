"""Norms of convolutions: never below the singular values of the explicit operator, and close above the supremum."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional

from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rules import convolution_norm
from hf_lipschitz.bounds.rules.convolution_norm import convolution_norm_upper

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A convolution: the kernel's shape as torch stores it, the image's size, and torch's options."""

    shape: tuple[int, int, int, int]
    size: Pair = (6, 6)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    mode: str = "zeros"
    transposed: bool = False

    @property
    def reduced(self) -> Pair:
        """The stride that is left when only pixels of one residue modulo its gcd with the dilation are read."""
        high, wide = (s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))
        return high, wide


CASES = {
    "1x1": Case((3, 4, 1, 1), padding=(0, 0)),
    "1x1 strided": Case((3, 4, 1, 1), padding=(0, 0), stride=(2, 2)),
    "3x3 zero-padded": Case((3, 2, 3, 3)),
    "3x3 unpadded": Case((2, 3, 3, 3), padding=(0, 0)),
    "3x3 padded wide": Case((2, 2, 3, 3), padding=(4, 3)),
    "3x3 circular": Case((3, 3, 3, 3), mode="circular"),
    "3x3 circular, odd size": Case((3, 3, 3, 3), size=(5, 7), mode="circular"),
    "even taps": Case((2, 2, 2, 2), padding=(1, 0)),
    "even taps, circular": Case((2, 3, 4, 2), padding=(0, 0), size=(8, 5), mode="circular"),
    "3x5": Case((2, 2, 3, 5), padding=(1, 2)),
    "5x2": Case((2, 2, 5, 2), padding=(2, 1)),
    "7x7 on a 5x5 image": Case((1, 2, 7, 7), size=(5, 5), padding=(3, 3)),
    "1-D": Case((3, 2, 1, 3), size=(1, 17), padding=(0, 1)),
    "1-D, the other axis": Case((3, 2, 3, 1), size=(17, 1), padding=(1, 0)),
    "1-D strided": Case((3, 2, 1, 5), size=(1, 24), padding=(0, 2), stride=(1, 3)),
    "1-D, 2 taps": Case((3, 2, 1, 2), size=(1, 24), padding=(0, 1)),
    "stride 2": Case((3, 2, 3, 3), stride=(2, 2), size=(7, 8)),
    "stride 2, circular": Case((3, 2, 3, 3), stride=(2, 2), size=(6, 8), mode="circular"),
    "stride 2 x 1": Case((3, 2, 3, 3), stride=(2, 1)),
    "stride as large as the kernel": Case((3, 2, 2, 2), stride=(2, 2), padding=(0, 0)),
    "stride larger than the kernel": Case((3, 2, 2, 2), stride=(3, 3), padding=(0, 0), size=(8, 8)),
    "7x7 stride 2": Case((2, 2, 7, 7), stride=(2, 2), padding=(3, 3), size=(9, 9)),
    "dilated": Case((2, 2, 3, 3), dilation=(2, 2), padding=(2, 2)),
    "dilated, circular": Case((2, 2, 3, 3), dilation=(2, 3), padding=(0, 0), size=(8, 9), mode="circular"),
    "dilated and strided": Case((2, 2, 3, 3), dilation=(2, 2), stride=(2, 2), padding=(2, 2), size=(9, 9)),
    "dilation prime to the stride": Case((2, 2, 3, 3), dilation=(3, 2), stride=(2, 3), padding=(3, 2), size=(9, 9)),
    "stride 4, dilation 2": Case((1, 2, 3, 3), dilation=(2, 1), stride=(4, 1), padding=(2, 1), size=(14, 6)),
    "groups": Case((4, 2, 3, 3), groups=2),
    "depthwise": Case((4, 1, 3, 3), groups=4),
    "depthwise with two outputs each": Case((6, 1, 3, 3), groups=3, stride=(2, 2)),
    "transposed": Case((3, 2, 3, 3), transposed=True),
    "transposed, stride 2": Case((3, 2, 3, 3), transposed=True, stride=(2, 2)),
    "transposed, groups": Case((4, 1, 4, 4), transposed=True, stride=(2, 2), groups=2),
}
DRAWS = ("gaussian", "positive", "alternating", "one tap", "rank one", "near-duplicate", "huge", "tiny", "integers")


def draw(name: str, shape: tuple[int, ...]) -> Array:
    """A kernel of a kind that is hard for some step of the bound."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode()))
    gaussian = rng.standard_normal(shape)
    rows, columns, h, w = shape
    checkered = (-1.0) ** np.add.outer(np.arange(h), np.arange(w))
    if name == "one tap":
        gaussian *= 0.0
        gaussian[:, :, h // 2, w // 2] = rng.standard_normal((rows, columns))
    if name == "rank one":
        gaussian = np.einsum("i,j,k,l->ijkl", *(rng.standard_normal(n) for n in shape))
    if name == "near-duplicate":
        gaussian = np.eye(rows, columns)[:, :, None, None] * rng.standard_normal((h, w)) + 1e-9 * gaussian
    made = {
        "positive": np.abs(gaussian),
        "alternating": np.abs(gaussian) * checkered,
        "huge": 1e200 * gaussian,
        "tiny": 1e-310 * gaussian,
        "integers": rng.integers(-(2**24), 2**24 + 1, shape).astype(np.float64),
    }
    return made.get(name, gaussian)


def operator_norm(kernel: Array, case: Case) -> float:
    """The largest singular value of the explicit matrix of torch's convolution (scaled, so that its SVD stays sane)."""
    exponent = math.frexp(float(np.abs(kernel).max()))[1]
    weight = torch.from_numpy(np.ldexp(kernel, -exponent))
    channels = kernel.shape[0] if case.transposed else kernel.shape[1] * case.groups
    basis = torch.eye(channels * math.prod(case.size), dtype=torch.float64).reshape(-1, channels, *case.size)
    options = {"stride": case.stride, "groups": case.groups, "dilation": case.dilation}
    if case.mode == "circular":
        reach = [d * (k - 1) for d, k in zip(case.dilation, kernel.shape[2:], strict=True)]
        before = (reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2)
        images = functional.conv2d(functional.pad(basis, before, mode="circular"), weight, **options)
    else:
        apply = functional.conv_transpose2d if case.transposed else functional.conv2d
        images = apply(basis, weight, padding=case.padding, **options)
    return math.ldexp(float(np.linalg.svd(images.flatten(1).numpy(), compute_uv=False)[0]), exponent)


def supremum_estimate(kernel: Array, stride: Pair = (1, 1), groups: int = 1) -> float:
    """The largest singular value of the symbol over a grid, then nearer and nearer to the best frequency."""
    taps = convolution_norm._unshuffled(kernel, stride, groups)

    def at(theta: Array) -> float:
        phase = np.exp(-1j * np.add.outer(np.arange(taps.shape[0]) * theta[0], np.arange(taps.shape[1]) * theta[1]))
        return float(np.linalg.svd(np.tensordot(phase, taps, axes=2), compute_uv=False).max())

    grid = [np.array([x, y]) for x in np.arange(24) * np.pi / 12 for y in np.arange(13) * np.pi / 12]
    best = max(grid, key=at)
    step = 0.2
    while step > 1e-5:
        nearer = max((best + step * np.array(move) for move in np.ndindex(3, 3)), key=lambda t, s=step: at(t - s))
        nearer = nearer - step
        if at(nearer) > at(best):
            best = nearer
        else:
            step /= 2.0
    return at(best)


def bound_of(kernel: Array, case: Case, witness: float | None = None) -> convolution_norm.NormBound:
    """The bound with the case's options (padding and size make no difference to it)."""
    return convolution_norm_upper(kernel, stride=case.reduced, groups=case.groups, witness=witness)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("name", CASES)
def test_never_below_the_explicit_operator(name: str, kind: str) -> None:
    case = CASES[name]
    kernel = draw(kind, case.shape)
    bound = bound_of(kernel, case)
    assert bound.method in ("frequencies", "flat", "cholesky", "near_orthogonal")
    assert bound.value >= operator_norm(kernel, case) * (1.0 - 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_close_above_the_supremum(name: str) -> None:
    case = CASES[name]
    for kind in ("gaussian", "alternating", "near-duplicate"):
        kernel = draw(kind, case.shape)
        bound = bound_of(kernel, case)
        estimate = supremum_estimate(kernel, case.reduced, case.groups)
        assert -1e-12 <= bound.value / estimate - 1.0 <= 1e-4
        assert bound.slack is not None and 0.0 <= bound.slack <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_witness_repeats_the_bound_without_eigenvalues(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    kernel = draw("gaussian", case.shape)
    bound = bound_of(kernel, case)

    def no_eigenvalues(gram: Array) -> Array:
        raise AssertionError("a witness makes eigenvalues needless")

    monkeypatch.setattr(np.linalg, "eigvalsh", no_eigenvalues)
    again = bound_of(kernel, case, bound.witness)
    assert again == bound
    assert again.slack is None or bound.witness is None


@pytest.mark.parametrize("witness", [0.0, -1.0, 5e-324, 1e-300, 1.0, 1e3, 1e30, 1e200, 1.7e308, np.inf, np.nan])
@pytest.mark.parametrize("name", ["3x3 zero-padded", "1-D", "depthwise", "1x1"])
def test_a_hostile_witness_only_loosens(name: str, witness: float) -> None:
    case = CASES[name]
    kernel = draw("gaussian", case.shape)
    honest = bound_of(kernel, case)
    assert bound_of(kernel, case, witness).value >= honest.value * (1.0 - 1e-4)


def between_the_nodes(taps: int) -> Array:
    """A kernel that is largest at one frequency (and its negative), which no coarse grid hits."""
    a = np.arange(taps)
    return np.cos(np.add.outer(a * 1.234, a * 0.567))[None, None]


@pytest.mark.parametrize("taps", [2, 3, 5])
@pytest.mark.parametrize("below", [0.9, 0.99, 0.999, 0.9999, 0.99999])
def test_a_witness_below_the_square_of_the_norm_proves_nothing(taps: int, below: float) -> None:
    kernel = between_the_nodes(taps)
    supremum = supremum_estimate(kernel)
    symbol = convolution_norm._symbol(convolution_norm._unshuffled(kernel, (1, 1), 1))
    assert convolution_norm._proved(symbol, below * supremum**2, search=False) is None
    assert convolution_norm_upper(kernel, witness=below * supremum**2).value >= supremum


def _no_cell_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_norm.math, "cos", lambda angle: 1.0)


def _one_axis_degree(monkeypatch: pytest.MonkeyPatch) -> None:
    cosine = math.cos
    monkeypatch.setattr(convolution_norm.math, "cos", lambda angle: cosine(angle / 2.0))


def _a_part_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = convolution_norm._moves
    monkeypatch.setattr(convolution_norm, "_moves", lambda pieces, many: moves(pieces, many)[1:])


def _any_factorisation_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_norm, "any_l", lambda gram, mu, error: 0.0)


PLANTED = (_no_cell_factor, _one_axis_degree, _a_part_is_lost, _any_factorisation_will_do)


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_mistakes_are_caught(plant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake makes the search accept a mu below the square of the norm for one of these kernels."""
    plant(monkeypatch)  # type: ignore[operator]

    def accepts_too_little(seed: int) -> bool:
        phase = np.random.default_rng(seed).uniform(0.0, np.pi, 2)
        kernel = np.cos(np.add.outer(np.arange(3) * phase[0], np.arange(3) * phase[1]))[None, None]
        symbol = convolution_norm._symbol(convolution_norm._unshuffled(kernel, (1, 1), 1))
        return convolution_norm._proved(symbol, 0.998 * supremum_estimate(kernel) ** 2, search=False) is not None

    assert any(accepts_too_little(seed) for seed in range(20))


def test_norms_of_groups_are_not_multiplied_or_forgotten() -> None:
    for hot in range(3):
        kernel = 0.1 * draw("gaussian", (6, 1, 3, 3))
        kernel[2 * hot : 2 * hot + 2] *= 100.0
        alone = convolution_norm_upper(kernel[2 * hot : 2 * hot + 2])
        assert convolution_norm_upper(kernel, groups=3).value == pytest.approx(alone.value, rel=1e-4)


def test_a_known_counterexample_needs_its_own_refusal() -> None:
    """Circular padding with a stride that does not divide the size repeats pixels: the norm is above this bound."""
    case = Case((1, 1, 3, 3), size=(5, 5), stride=(2, 2), mode="circular")
    kernel = np.ones(case.shape)
    line = Case((1, 1, 1, 3), size=(1, 5), stride=(1, 2), padding=(0, 1), mode="circular")
    assert operator_norm(kernel, case) > bound_of(kernel, case).value
    assert operator_norm(np.ones(line.shape), line) == pytest.approx(2.394, abs=1e-3)
    assert bound_of(np.ones(line.shape), line).value == pytest.approx(math.sqrt(5.0), rel=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_and_layouts(dtype: type[np.floating]) -> None:
    kernel = draw("gaussian", (3, 4, 3, 3)).astype(dtype)
    value = convolution_norm_upper(kernel).value
    assert convolution_norm_upper(np.asfortranarray(kernel)).value == value
    assert convolution_norm_upper(kernel.astype(np.float64)).value == value
    for same in (kernel.transpose(1, 0, 2, 3), kernel.transpose(0, 1, 3, 2), kernel[:, :, ::-1], -kernel):
        assert convolution_norm_upper(same).value == pytest.approx(value, rel=1e-4)


def test_flat_spectra_need_no_frequencies() -> None:
    """An orthogonal convolution (a rotation of channels and a shift of half of them) is bounded at once and tightly."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))
    kernel = np.zeros((6, 6, 3, 3))
    kernel[:3, :, 0, 1], kernel[3:, :, 2, 2] = rotation[:3], rotation[3:]
    for perturbed in (0.0, 1e-7):
        bound = convolution_norm_upper(kernel + perturbed * draw("gaussian", kernel.shape))
        assert bound.method == "flat"
        assert 1.0 <= bound.value <= 1.0 + 1e-4 and bound.slack is not None and bound.slack <= 1e-4


def test_spectra_that_are_nearly_flat_cost_excess_not_time() -> None:
    """Where nearly all frequencies are near the largest, the excess is that of the last level that was affordable."""
    kernel = np.zeros((2, 2, 3, 3))
    kernel[:, :, 1, 1] = np.eye(2)
    kernel += 3e-4 * draw("gaussian", kernel.shape)
    bound = convolution_norm_upper(kernel)
    assert bound.method == "frequencies" and bound.slack is not None and 1e-4 < bound.slack < 0.01
    assert supremum_estimate(kernel) <= bound.value <= supremum_estimate(kernel) * (1.0 + bound.slack + 1e-4)
    assert convolution_norm_upper(kernel, witness=bound.witness) == bound


def test_zero_kernels() -> None:
    for shape in ((2, 2, 3, 3), (2, 1, 1, 1)):
        assert convolution_norm_upper(np.zeros(shape), groups=2).value == 0.0


def test_where_the_search_gives_up_the_bound_is_loose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_norm, "_CELLS", 1)
    kernel = draw("gaussian", (3, 3, 3, 3))
    bound = convolution_norm_upper(kernel)
    assert bound.method == "fallback" and bound.witness is None and bound.slack is None
    assert bound.value >= supremum_estimate(kernel)


@pytest.mark.parametrize(
    ("kernel", "groups", "message"),
    [
        (np.ones((2, 2, 3)), 1, "4 dimensions"),
        (np.ones((3, 2, 3, 3)), 2, "multiple of its groups"),
        (np.ones((2, 2, 3, 3)), 0, "multiple of its groups"),
        (np.ones((0, 2, 3, 3)), 1, "4 dimensions"),
        (np.ones((2, 2, 3, 3), dtype=np.complex128), 1, "real numbers"),
        (np.ones((2, 2, 3, 3), dtype=np.int64), 1, "64-bit floats"),
        (np.full((2, 2, 3, 3), np.nan), 1, "NaN or infinite"),
    ],
)
def test_refusals(kernel: Array, groups: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        convolution_norm_upper(kernel, groups=groups)


class Wrong(np.ndarray):
    """An array whose products are wrong in the seventh digit."""

    def __matmul__(self, other: Array) -> Array:
        return np.asarray(self) @ np.asarray(other) * (1.0 + 1e-7)


def test_wrong_products_are_refused() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((7, 5)), rng.standard_normal((5, 9))
    assert np.array_equal(convolution_norm._product(left, right), left @ right)
    with pytest.raises(KernelError, match="plain sums"):
        convolution_norm._product(left.view(Wrong), right)


def test_a_huge_kernel_is_not_searched() -> None:
    """Its autocorrelation alone could exhaust a verifier; the bound falls back on the Frobenius norm, and says so."""
    kernel = np.random.default_rng(0).standard_normal((1, 1, 128, 128))
    found = convolution_norm_upper(kernel)
    assert found.method == "fallback" and found.value >= 128.0 * np.linalg.norm(kernel)
    assert convolution_norm_upper(kernel, stride=(128, 128)).value < 1.001 * np.linalg.norm(kernel)
