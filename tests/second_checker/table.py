"""All formulas of the second checker by the operation's name."""

from __future__ import annotations

from tests.second_checker import (
    activation,
    affine,
    attention,
    attention_open,
    convolution,
    normalization,
    pooling,
    rearrangement,
    structure,
)
from tests.second_checker.formula import Formula

FORMULAS: dict[str, Formula] = {
    **structure.FORMULAS,
    **rearrangement.FORMULAS,
    **affine.FORMULAS,
    **activation.FORMULAS,
    **normalization.FORMULAS,
    **convolution.FORMULAS,
    **pooling.FORMULAS,
    **attention.FORMULAS,
    **attention_open.FORMULAS,
}
