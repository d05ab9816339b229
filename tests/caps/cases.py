"""One row a cap: what the table-driven suite needs to know beyond the registry. A new cap is one row here too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class CapCase:
    """How closely a cap follows its scalar function, and what it leaves alone.

    Attributes:
        tolerance: relative distance to the oracle, in units of the value, for float32 weights.
        settings: further arguments of the function that make it follow closely.
        needs_full_rank: the scalar function describes matrices of full rank only.
        needs_gap: of equal largest singular values one is taken, so that only the singular values are determined.
        any_shape: takes tensors of any number of dimensions.
    """

    tolerance: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_full_rank: bool = False
    needs_gap: bool = False
    any_shape: bool = False


CASES: dict[str, CapCase] = {
    "stiefel": CapCase(tolerance=4e-6, needs_full_rank=True),
    "spectral_normalize": CapCase(tolerance=2e-6),
    "spectral_soft_cap": CapCase(tolerance=3e-5, settings={"compute_dtype": torch.float64}),
    "spectral_power_cap": CapCase(tolerance=3e-5, settings={"compute_dtype": torch.float64}),
    "decay": CapCase(tolerance=2e-6),
    "spectral_hard_cap": CapCase(tolerance=1e-5),
    "spectral_hammer": CapCase(tolerance=5e-5, needs_gap=True),
    "row_normalize": CapCase(tolerance=2e-7),
    "frobenius_normalize": CapCase(tolerance=2e-7),
    "clip": CapCase(tolerance=3e-6, any_shape=True),
}
