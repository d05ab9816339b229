"""Scalar expressions between rationals, and all that a float forward may compute in their place."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from tests.second_checker import elementary
from tests.second_checker.exact import ZERO, Interval, exactly, larger
from tests.second_checker.norms import Matrix

# Units in the last place that one operation of a float library may be off by (the assumptions of the rounding claim).
_ULPS = {"add": 1, "sub": 1, "mul": 1, "div": 1, "sqrt": 1, "exp": 8, "softplus": 8, "sigmoid": 8, "max": 0}


def _pairwise(first: list[Interval], second: list[Interval], head: str) -> list[Interval]:
    count = max(len(first), len(second))
    first, second = (side * count if len(side) == 1 else side for side in (first, second))
    operation = {
        "add": Interval.__add__,
        "sub": Interval.__sub__,
        "mul": Interval.__mul__,
        "div": Interval.__truediv__,
    }[head]
    return [operation(a, b) for a, b in zip(first, second, strict=True)]


def _single(values: list[Interval], head: str) -> list[Interval]:
    if head == "max":
        return [larger(*values)]
    function = {"sqrt": Interval.sqrt}.get(head) or getattr(elementary, head)
    return [function(value) for value in values]


def enclosed(expression: Any, tensors: Mapping[str, Matrix], unit: Fraction = Fraction(0)) -> list[Interval]:
    """The entries of an expression; with ``unit``, everything that a forward pass of that roundoff may compute."""
    if not isinstance(expression, list):
        return [_widened(exactly(expression), unit)]
    head, *parts = expression
    if head == "tensor":
        return [exactly(value) for value in tensors[parts[0]].ravel()]
    values = [enclosed(part, tensors, unit) for part in parts]
    result = _pairwise(values[0], values[1], head) if len(values) == 2 else _single(values[0], head)
    return [_widened(value, _ULPS[head] * unit) for value in result]


def _widened(value: Interval, relative: Fraction) -> Interval:
    reach = abs(value).high * relative
    return value + Interval(-reach, reach)


def stray(expression: Any, tensors: Mapping[str, Matrix], unit: Fraction) -> Interval:
    """How far the forward's scalar may lie from the exact one."""
    pairs = zip(enclosed(expression, tensors), enclosed(expression, tensors, unit), strict=True)
    return larger(ZERO, *(exactly(max(f.high - e.low, e.high - f.low)) for e, f in pairs))
