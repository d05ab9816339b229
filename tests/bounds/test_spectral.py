"""Spectral norms against 60 decimal digits: never below the true one, and close above it."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_lipschitz.bounds import spectral
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rounding import Array
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
    monkeypatch.setattr(spectral, "_any_l", lambda *arguments: None)
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
        monkeypatch.setattr(np.linalg, "eigvalsh", lambda gram, lie=lie: np.full(len(gram), lie))
        _excess("gaussian", matrix, spectral_norm_upper(matrix).value)


def test_eigenvalues_and_a_factorisation_that_lie_together_only_loosen(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _matrix("gaussian", 0)
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda gram: np.full(len(gram), 1e-3))
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
        (np.ones(3), "a real matrix"),
        (np.ones((2, 2, 2)), "a real matrix"),
        (np.ones((2, 2), dtype=np.int64), "a real matrix"),
        (np.ones((2, 2), dtype=np.complex128), "a real matrix"),
        (np.ones((2, 2), dtype=np.longdouble), "64-bit floats"),
        (np.ones((2, 2), dtype=bool), "a real matrix"),
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
