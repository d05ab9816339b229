"""The built-in rules: what a verifier trusts unless it names more."""

from __future__ import annotations

from ..rule import Rule
from . import activation, affine, attention, convolution, normalization, pooling, shape, structure

_ALL: tuple[Rule, ...] = (
    *structure.RULES,
    *shape.RULES,
    *affine.RULES,
    *convolution.RULES,
    *activation.RULES,
    *normalization.RULES,
    *pooling.RULES,
    *attention.RULES,
)
BUILT_IN: dict[str, Rule] = {rule.op: rule for rule in _ALL}
