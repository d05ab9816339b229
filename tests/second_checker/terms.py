"""All checks of single terms."""

from __future__ import annotations

from collections.abc import Callable

from tests.second_checker import terms_convolution, terms_core, terms_matrices, terms_sums, terms_symbol

CHECKS: tuple[Callable[[], None], ...] = (
    *terms_core.CHECKS,
    *terms_convolution.CHECKS,
    *terms_matrices.CHECKS,
    *terms_sums.CHECKS,
    *terms_symbol.CHECKS,
)
