"""Matrices that try caps: given spectra, and inputs that no cap can make good of but all must survive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda k: torch.ones(k, dtype=torch.float64),
    "linear": lambda k: torch.linspace(1.0, 1e-3, k, dtype=torch.float64),
    "log": lambda k: torch.logspace(0.0, -3.0, k, dtype=torch.float64),
    "rank one": lambda k: torch.eye(1, k, dtype=torch.float64)[0],
    "two levels": lambda k: torch.where(torch.arange(k) < k / 2, 1.0, 1e-6).to(torch.float64),
    "one large": lambda k: torch.where(torch.arange(k) < 1, 30.0, 1.0).to(torch.float64),
}


def _half(k: int, first: Tensor, others: float) -> Tensor:
    """Half of the values, at least one, are ``first``, the rest ``others``."""
    values = torch.full((k,), others, dtype=torch.float64)
    values[: max(1, k // 2)] = first[: max(1, k // 2)]
    return values


# Spectra of which a cap of 1 makes something hard; ``r`` is the largest value, k their number.
AROUND_ONE: dict[str, Callable[[int, float], Tensor]] = {
    "linear": lambda k, r: torch.linspace(r, 1e-3, k, dtype=torch.float64),
    "log": lambda k, r: r * torch.logspace(0.0, -5.0, k, dtype=torch.float64),
    "half tied at the cap": lambda k, r: _half(k, torch.linspace(r, min(2.0, r), k, dtype=torch.float64), 1.0),
    "all near the cap": lambda k, r: 1.0 + (r - 1.0) * torch.logspace(0.0, -9.0, k, dtype=torch.float64),
    "on both sides": lambda k, r: _half(k, torch.full((k,), r), 1.0) + 1e-5 * gaussian(k),
    "rank-deficient": lambda k, r: _half(k, torch.linspace(r, 0.5, k, dtype=torch.float64), 0.0),
    "one above": lambda k, r: torch.where(torch.arange(k) < 1, r, 0.5).to(torch.float64),
    "condition 1e12": lambda k, r: r * torch.logspace(0.0, -12.0, k, dtype=torch.float64),
}


def with_spectrum(singular_values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values and random vectors."""
    generator = torch.Generator().manual_seed(seed)

    def frame(size: int) -> Tensor:
        gaussian = torch.randn(size, len(singular_values), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian)[0]

    return (frame(rows) * singular_values) @ frame(columns).T


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal entries, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _outlier() -> Tensor:
    matrix = gaussian(7, 5)
    matrix[3, 2] = 1e6
    return matrix


HOPELESS: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(6, 9, dtype=torch.float64),
    "zero rows": lambda: torch.cat([gaussian(3, 8), torch.zeros(5, 8, dtype=torch.float64)]),
    "rank one, large": lambda: 1e3 * with_spectrum(SPECTRA["rank one"](6), 6, 9),
    "equal rows": lambda: torch.ones(40, 24, dtype=torch.float64),
    "huge": lambda: 1e30 * gaussian(6, 9),
    "tiny": lambda: 1e-30 * gaussian(6, 9),
    "subnormal": lambda: 1e-41 * gaussian(6, 9),
    "mixed scales": lambda: torch.diag(torch.logspace(-30, 30, 8, dtype=torch.float64)),
    "outlier": _outlier,
    "condition 1e12": lambda: with_spectrum(torch.logspace(0, -12, 8, dtype=torch.float64), 8, 16),
    "one entry": lambda: torch.tensor([[-5.0]], dtype=torch.float64),
    "one row": lambda: 3.0 * gaussian(1, 17),
    "one column": lambda: 3.0 * gaussian(17, 1),
}


def apply_to_singular_values(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """The oracle: the same singular vectors, the function of the singular values, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u * function(s)) @ vh
