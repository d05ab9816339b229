"""One row a cap: what the table-driven suite needs to know beyond the registry. A new cap is one row here too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CapCase:
    """How closely a cap follows its scalar function, and what it leaves alone.

    Attributes:
        tolerance: relative distance to the oracle, in units of the value, for float32 weights.
        needs_full_rank: the scalar function describes matrices of full rank only.
    """

    tolerance: float
    needs_full_rank: bool = False


CASES: dict[str, CapCase] = {
    "stiefel": CapCase(tolerance=4e-6, needs_full_rank=True),
    "spectral_normalize": CapCase(tolerance=2e-6),
    "row_normalize": CapCase(tolerance=2e-7),
}
