"""The built-in rules, one line each: what a verifier trusts unless it names more."""

from __future__ import annotations

from ..rule import Rule
from . import activation, affine, attention, pooling, structure

_ALL: tuple[Rule, ...] = (
    structure.Input(),
    structure.Patchify(),
    structure.PatchMerge(),
    structure.Shift(),
    structure.TokenMixing(),
    structure.Offset(),
    structure.Scale(),
    structure.Residual(),
    affine.Normalize(),
    affine.Linear(),
    affine.NormalizedLinear(),
    activation.MaxMin(),
    activation.GroupSort(),
    activation.Abs(),
    pooling.L2Pool(),
    pooling.SumPool(),
    attention.SoftmaxAttention(),
)
BUILT_IN: dict[str, Rule] = {rule.op: rule for rule in _ALL}
