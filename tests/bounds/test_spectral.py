"""Spectral norms against 60 decimal digits: never below the true one, and close above it."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_lipschitz.bounds import spectral
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rounding import Array, U
from hf_lipschitz.bounds.spectral import spectral_norm_upper

Draw = Callable[[np.random.Generator], Array]


def exact_norm(matrix: Array) -> mpmath.mpf:
    """sigma_max of a float matrix, correct to some fifty digits (eigenvalues of the exact Gram matrix)."""
    a = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    with mpmath.workdps(120):
        rows = [[mpmath.mpf(float(value)) for value in row] for row in a]
        gram = mpmath.matrix([[mpmath.fsum(x * y for x, y in zip(r, s, strict=True)) for s in rows] for r in rows])
        with mpmath.workdps(60):
            return mpmath.sqrt(max(mpmath.eigsy(gram, eigvals_only=True)))


def _orthogonal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    q, _ = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    return q if rows >= columns else q.T


def _with_sigma(rng: np.random.Generator, sigma: list[float]) -> Array:
    k = len(sigma)
    return _orthogonal(rng, k, k) @ np.diag(sigma) @ _orthogonal(rng, k, k + 1)


def _huge_and_tiny(rng: np.random.Generator) -> Array:
    return rng.standard_normal((4, 5)) * 10.0 ** rng.integers(-150, 150, size=(4, 5)).astype(np.float64)


_ADVERSARIAL: dict[str, Draw] = {
    "one entry": lambda rng: np.array([[-0.3]]),
    "row": lambda rng: rng.standard_normal((1, 9)),
    "column": lambda rng: rng.standard_normal((9, 1)),
    "gaussian": lambda rng: rng.standard_normal((6, 8)),
    "float32 gaussian": lambda rng: rng.standard_normal((7, 7)).astype(np.float32),
    "float16": lambda rng: rng.standard_normal((5, 6)).astype(np.float16),
    "rank one": lambda rng: np.outer(rng.standard_normal(6), rng.standard_normal(5)),
    "orthogonal": lambda rng: _orthogonal(rng, 8, 8),
    "orthogonal in float32": lambda rng: _orthogonal(rng, 6, 9).astype(np.float32),
    "orthogonal and a bit": lambda rng: _orthogonal(rng, 6, 6) + 1e-7 * rng.standard_normal((6, 6)),
    "near-duplicate sigma": lambda rng: _with_sigma(rng, [1.0, 1.0 - 1e-15, 1.0 - 1e-9, 0.5]),
    "condition 1e12": lambda rng: _with_sigma(rng, [1e6, 1.0, 1e-3, 1e-6]),
    "graded": lambda rng: np.diag(10.0 ** -np.arange(0.0, 90.0, 10.0)) @ rng.standard_normal((9, 9)),
    "identity": lambda rng: np.eye(5),
    "repeated row": lambda rng: np.repeat(rng.standard_normal((1, 6)), 6, axis=0),
    "zero rows": lambda rng: np.vstack([np.zeros((3, 4)), rng.standard_normal((2, 4))]),
    "integers to 2^24": lambda rng: rng.integers(-(2**24), 2**24 + 1, size=(7, 9)).astype(np.float64),
    "integers": lambda rng: rng.integers(-2, 3, size=(8, 8)).astype(np.float64),
    "Hilbert": lambda rng: 1.0 / (np.arange(7.0)[:, None] + np.arange(7.0)[None] + 1.0),
    "cancelling": lambda rng: np.array([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]]),
    "scaled 1e150": lambda rng: 1e150 * rng.standard_normal((5, 6)),
    "scaled 1e-150": lambda rng: 1e-150 * rng.standard_normal((5, 6)),
    "scaled 1e300": lambda rng: 1e300 * rng.standard_normal((5, 4)),
    "scaled 1e-300": lambda rng: 1e-300 * rng.standard_normal((5, 4)),
    "scaled 2^200": lambda rng: 2.0**201 * rng.uniform(0.4, 0.6, size=(4, 4)),
    "scaled 2^-200": lambda rng: 2.0**-199 * rng.uniform(0.4, 0.6, size=(4, 4)),
    "subnormal": lambda rng: rng.integers(-9, 10, size=(4, 5)) * 2.0**-1074,
    "subnormal in float32": lambda rng: (rng.integers(-9, 10, size=(4, 5)) * 2.0**-149).astype(np.float32),
    "one subnormal": lambda rng: np.array([[2.0**-1074, 0.0], [0.0, 0.0]]),
    "huge and tiny": _huge_and_tiny,
    "huge and subnormal": lambda rng: np.array([[1e300, 2.0**-1074], [2.0**-1074, 1e300]]),
}
_SEEDS = range(3)


def _matrix(name: str, seed: int) -> Array:
    return _ADVERSARIAL[name](np.random.default_rng(zlib.crc32(f"{name} {seed}".encode())))


def _excess(name: str, matrix: Array, value: float) -> mpmath.mpf:
    exact = exact_norm(matrix)
    assert mpmath.mpf(value) >= exact, f"{name}: {value!r} is below {exact}"
    return mpmath.mpf(value) / exact - 1 if exact > 0 else mpmath.mpf(value)


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("name", _ADVERSARIAL)
def test_never_below_and_close_above(name: str, seed: int) -> None:
    matrix = _matrix(name, seed)
    bound = spectral_norm_upper(matrix)
    # numbers of a few units in the last subnormal place have no closer neighbour
    tolerance = 1e-6 if bound.method == "near_orthogonal" else 1.0 if bound.value < 1e-320 else 1e-10
    assert _excess(name, matrix, bound.value) <= tolerance
    assert bound.method in ("cholesky", "near_orthogonal") or not matrix.any()


@pytest.mark.parametrize("name", _ADVERSARIAL)
def test_transposes_and_signs_do_not_matter(name: str) -> None:
    matrix = _matrix(name, 0)
    for other in (matrix.T, -matrix, np.asfortranarray(matrix), matrix[::-1], np.flip(matrix, 1)):
        bound = spectral_norm_upper(other)
        _excess(name, matrix, bound.value)


@pytest.mark.parametrize("name", _ADVERSARIAL)
def test_a_witness_repeats_the_bound(name: str) -> None:
    matrix = _matrix(name, 1)
    bound = spectral_norm_upper(matrix)
    again = spectral_norm_upper(matrix, witness=bound.witness)
    assert again.value == bound.value
    assert again.method == bound.method


@pytest.mark.parametrize(
    "witness", [0.0, -1.0, 5e-324, 1e-300, 1e-6, 0.999, 1.0, 7.0, 1e6, 1e154, 1e300, 1.7e308, np.inf, -np.inf, np.nan]
)
@pytest.mark.parametrize("name", ["gaussian", "orthogonal", "rank one", "condition 1e12", "scaled 1e300", "subnormal"])
def test_a_hostile_witness_only_loosens(name: str, witness: float) -> None:
    matrix = _matrix(name, 2)
    honest = spectral_norm_upper(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow on the way to a useless factorisation
        bound = spectral_norm_upper(matrix, witness=witness)
    _excess(name, matrix, bound.value)
    assert bound.value >= honest.value * (1.0 - 1e-6)


@given(
    arrays.arrays(
        np.float64,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=4),
        elements=st.floats(-1e200, 1e200, allow_subnormal=True),
    )
)
def test_any_matrix(matrix: Array) -> None:
    _excess("drawn", matrix, spectral_norm_upper(matrix).value)


@pytest.mark.parametrize("name", ["gaussian", "orthogonal", "condition 1e12", "integers to 2^24", "graded"])
def test_without_a_factorisation_it_falls_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "any_l", lambda *arguments: None)
    monkeypatch.setattr(spectral, "_near_orthogonal", lambda *arguments: None)
    matrix = _matrix(name, 0)
    bound = spectral_norm_upper(matrix)
    assert bound.method == "fallback"
    _excess(name, matrix, bound.value)


@pytest.mark.parametrize("garbage", [0.0, 1.0, np.nan])
def test_a_factorisation_that_lies_only_loosens(garbage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a broken Cholesky returns, the bound holds: that is what "any L" means."""
    matrix = _matrix("gaussian", 0)
    monkeypatch.setattr(np.linalg, "cholesky", lambda shifted: np.full_like(shifted, garbage))
    bound = spectral_norm_upper(matrix)
    _excess("gaussian", matrix, bound.value)


def test_eigenvalues_that_lie_only_loosen(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _matrix("gaussian", 0)
    for lie in (0.0, 1e-3, 1e3, np.nan):
        monkeypatch.setattr(np.linalg, "eigvalsh", lambda gram, lie=lie: np.full(gram.shape[:-1], lie))
        _excess("gaussian", matrix, spectral_norm_upper(matrix).value)


def test_eigenvalues_and_a_factorisation_that_lie_together_only_loosen(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _matrix("gaussian", 0)
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda gram: np.full(gram.shape[:-1], 1e-3))
    for garbage in (0.0, 1e-3, 1.0):
        monkeypatch.setattr(np.linalg, "cholesky", lambda shifted, value=garbage: np.full_like(shifted, value))
        _excess("gaussian", matrix, spectral_norm_upper(matrix).value)


def test_an_estimate_would_be_caught() -> None:
    """The oracle finds the errors that this bound exists to avoid: NumPy's own norm is below the truth now and then."""
    below = 0
    for seed in range(30):
        matrix = np.random.default_rng(seed).standard_normal((5, 6))
        below += mpmath.mpf(float(np.linalg.norm(matrix, 2))) < exact_norm(matrix)
    assert below > 0


def test_zero_and_empty() -> None:
    for matrix in (np.zeros((3, 4)), np.zeros((0, 4)), -np.zeros((1, 1), dtype=np.float32)):
        assert spectral_norm_upper(matrix) == spectral.NormBound(0.0, "zero")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.array([[1.0, np.nan]]), "NaN or infinite"),
        (np.array([[1.0, -np.inf]]), "NaN or infinite"),
        (np.ones(3), "a spectral norm needs a matrix"),
        (np.ones((2, 2), dtype=np.int64), "a spectral norm needs a matrix"),
        (np.ones((2, 2), dtype=np.longdouble), "64-bit floats"),
        (np.ones((2, 2), dtype=bool), "a spectral norm needs a matrix"),
    ],
)
def test_refusals(matrix: Array, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        spectral_norm_upper(matrix)


def test_a_processor_that_flushes_subnormals_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "flushes_to_zero", lambda: True)
    with pytest.raises(KernelError, match="flushes subnormal"):
        spectral_norm_upper(np.eye(2))


def test_what_overflows_is_infinite() -> None:
    assert spectral_norm_upper(np.full((3, 3), 1.7e308)).value == np.inf


def test_large_matrices_are_tight() -> None:
    """At real sizes the excess over a float64 SVD (good to 1e-13 here) stays below 1e-10, in every path."""
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal((192, 384)).astype(np.float32)
    orthogonal = _orthogonal(rng, 256, 256).astype(np.float32)
    for matrix, tolerance in ((gaussian, 1e-10), (np.abs(orthogonal), 1e-10), (orthogonal, 1e-6)):
        sigma = float(np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[0])
        assert -1e-13 < spectral_norm_upper(matrix).value / sigma - 1.0 < tolerance


_STACKS: dict[str, Draw] = {
    "heads": lambda rng: rng.standard_normal((3, 2, 5)),
    "tall": lambda rng: rng.standard_normal((2, 5, 3)).astype(np.float32),
    "two axes": lambda rng: rng.standard_normal((2, 2, 3, 4)),
    "one hot": lambda rng: rng.standard_normal((4, 3, 3)) * np.array([1e-3, 1e3, 1.0, 0.0])[:, None, None],
    "repeated": lambda rng: np.repeat(rng.standard_normal((1, 4, 4)), 3, axis=0),
    "orthogonal": lambda rng: np.stack([_orthogonal(rng, 4, 6) for _ in range(3)]),
    "orthogonal of other scale": lambda rng: np.stack([c * _orthogonal(rng, 4, 6) for c in (1.0, 0.3, 1.0 + 1e-8)]),
    "huge": lambda rng: 1e200 * rng.standard_normal((2, 3, 4)),
    "none": lambda rng: np.zeros((0, 3, 3)),
}
_COMPLEX: dict[str, Draw] = {
    "gaussian": lambda rng: _complex(rng, 4, 5),
    "single": lambda rng: _complex(rng, 4, 4).astype(np.complex64),
    "tall": lambda rng: _complex(rng, 6, 3),
    "row": lambda rng: _complex(rng, 1, 7),
    "rank one": lambda rng: _complex(rng, 5, 1) @ _complex(rng, 1, 4),
    "unitary": lambda rng: np.linalg.qr(_complex(rng, 5, 5))[0],
    "real": lambda rng: rng.standard_normal((4, 4)).astype(np.complex128),
    "imaginary": lambda rng: 1j * rng.standard_normal((4, 4)),
    "graded": lambda rng: np.diag(10.0 ** -np.arange(0.0, 60.0, 10.0)) @ _complex(rng, 6, 6),
    "huge": lambda rng: 1e160 * _complex(rng, 3, 4),
    "subnormal": lambda rng: (rng.integers(-9, 10, (3, 3)) + 1j * rng.integers(-9, 10, (3, 3))) * 2.0**-1074,
}


def _complex(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return rng.standard_normal((rows, columns)) + 1j * rng.standard_normal((rows, columns))


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("name", _STACKS)
def test_a_stack_has_the_largest_norm(name: str, seed: int) -> None:
    stack = _STACKS[name](np.random.default_rng(seed))
    bound = spectral_norm_upper(stack)
    exact = max((exact_norm(matrix) for matrix in stack.reshape(-1, *stack.shape[-2:])), default=mpmath.mpf(0))
    assert exact <= bound.value <= exact * (1 + (1e-6 if bound.method == "near_orthogonal" else 1e-10))
    assert spectral_norm_upper(stack, witness=bound.witness) == bound


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("name", _COMPLEX)
def test_complex_matrices(name: str, seed: int) -> None:
    """The norm is that of the real matrix [[Re, -Im], [Im, Re]]."""
    matrix = _COMPLEX[name](np.random.default_rng(seed))
    real = np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])
    bound = spectral_norm_upper(matrix)
    tolerance = 1e-6 if bound.method == "near_orthogonal" else 1.0 if bound.value < 1e-320 else 1e-10
    assert _excess(name, real, bound.value) <= tolerance
    assert spectral_norm_upper(matrix, witness=bound.witness) == bound
    for same in (matrix.conj().T, matrix.T, 1j * matrix):
        _excess(name, real, spectral_norm_upper(same).value)


@pytest.mark.parametrize("name", _ADVERSARIAL)
def test_the_slack_says_how_far_the_bound_may_be(name: str) -> None:
    matrix = _matrix(name, 0)
    bound = spectral_norm_upper(matrix)
    assert bound.slack is not None and -1e-9 <= bound.slack <= (1.0 if bound.value < 1e-320 else 1e-6)
    if bound.witness is not None:
        assert spectral_norm_upper(matrix, witness=bound.witness).slack is None  # nothing was estimated


def test_a_witness_needs_no_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_eigenvalues(gram: Array) -> Array:
        raise AssertionError("a witness makes eigenvalues needless")

    matrix = _matrix("gaussian", 0)
    bound = spectral_norm_upper(matrix)
    monkeypatch.setattr(np.linalg, "eigvalsh", no_eigenvalues)
    assert spectral_norm_upper(matrix, witness=bound.witness) == bound


def _below_without(small: float, count: int, products_err: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the bound is below the norm of a row whose computed sum of squares lacks what each small entry adds to
    2^52, with the least witness that its factorisation allows.
    """
    row = np.full((1, count), small)
    row[0, 0] = 2.0**26
    gram = float((row[None] @ row[None].swapaxes(1, 2)).item())
    with monkeypatch.context() as patch:
        if not products_err:
            patch.setattr(spectral, "_dot", lambda count, like: 0.0)
        value = spectral_norm_upper(row, witness=gram * (1.0 + 4.0 * U)).value
    return Fraction(value) ** 2 < Fraction(2) ** 52 + (count - 1) * Fraction(small) ** 2


def test_without_the_error_of_products_the_bound_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(small, count) for small in (0.3, 0.45, 0.6, 0.7) for count in (1_000, 100_000)]
    assert not any(_below_without(*row, True, monkeypatch) for row in rows)
    assert any(_below_without(*row, False, monkeypatch) for row in rows)


def test_without_the_residual_the_bound_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _matrix("gaussian", 0)
    exact = exact_norm(matrix)
    monkeypatch.setattr(np.linalg, "cholesky", lambda shifted: np.zeros_like(shifted))
    assert spectral_norm_upper(matrix, witness=0.5).value >= exact
    monkeypatch.setattr(np.linalg, "norm", lambda *arguments, **options: np.zeros(1))
    assert spectral_norm_upper(matrix, witness=0.5).value < exact


def test_the_lower_half_of_the_residual_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With L = 0 the residual is the matrix of ones itself, whose norm is more than that of its lower block half."""
    monkeypatch.setattr(np.linalg, "cholesky", lambda shifted: np.zeros_like(shifted))
    value = spectral.any_l(np.ones((1, 64, 64)), 1e-6, 0.0)
    assert value is not None and value >= 64.0 > value / math.sqrt(2.0)


class Wrong(np.ndarray):
    """An array whose products are wrong in the eighth digit."""

    def __matmul__(self, other: Array) -> Array:
        return np.asarray(self) @ np.asarray(other) * (1.0 + 1e-8)


def test_wrong_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both products meet plain sums: A A*, and L L* beside mu I - A A*."""
    a = np.random.default_rng(0).standard_normal((1, 60, 90))
    assert spectral._best_squared(a, None)[1] == "cholesky"
    with pytest.raises(KernelError, match="plain sums"):
        spectral._best_squared(a.view(Wrong), None)
    gram = a @ a.swapaxes(1, 2)
    mu = 1.01 * float(np.linalg.eigvalsh(gram).max())
    assert spectral.any_l(gram, mu, 0.0) is not None
    lie = np.linalg.cholesky(mu * np.eye(60) - gram) * (1.0 + 1e-8)
    monkeypatch.setattr(np.linalg, "norm", _norm_of_small_residuals(np.linalg.norm))
    monkeypatch.setattr(np.linalg, "cholesky", lambda shifted: lie)
    with pytest.raises(KernelError, match="plain sums"):
        spectral.any_l(gram, mu, 0.0)


def _norm_of_small_residuals(norm: Callable[..., Array]) -> Callable[..., Array]:
    """As if the residual of a wrong L L* had been computed as nothing, which a wrong product can do."""
    return lambda values, axis=None: np.zeros(1) if axis == (1, 2) else norm(values)
