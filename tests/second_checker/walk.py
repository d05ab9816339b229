"""A program's bound between rationals: its JSON and arrays of floats in, intervals for every node out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tests.second_checker.exact import ONE, ZERO, Interval, exactly, root_of
from tests.second_checker.formula import DOUBLE, Asked, Extent, Formula, Precision, Shape, sharpened
from tests.second_checker.norms import Matrix, fractions_of
from tests.second_checker.scalars import enclosed, stray
from tests.second_checker.table import FORMULAS


@dataclass(frozen=True)
class Found:
    """What the second checker knows of one node."""

    shape: Shape
    lipschitz: Interval
    extent: Extent


def asked(
    node: Mapping[str, Any],
    shapes: Sequence[Shape],
    tensors: Mapping[str, Matrix],
    p: Precision | None = None,
    sizes: Sequence[Extent] = (),
) -> tuple[Formula, Asked]:
    """The formula of a node (as JSON) and the question put to it."""
    scalars = {slot: enclosed(expression, tensors) for slot, expression in node["scalars"].items()}
    strays = {slot: stray(e, tensors, p.unit) if p else ZERO for slot, e in node["scalars"].items()}
    slots = {slot: tensors[name] for slot, name in node["tensors"].items()}
    return FORMULAS[node["op"]], Asked(node["attrs"], tuple(shapes), slots, scalars, strays, tuple(sizes))


def walk(program: Mapping[str, Any], weights: Mapping[str, Any], geometry: str) -> list[Found]:
    """Bounds of every node of a program (its JSON) with stored weights (float arrays by name)."""
    tensors = {name: fractions_of(value) for name, value in weights.items()}
    found: list[Found] = []
    for node in program["nodes"]:
        before = [found[i] for i in node["inputs"]]
        formula, a = asked(node, [each.shape for each in before], tensors, None, [e.extent for e in before])
        shape = formula.shape(a)
        lipschitz = formula.lipschitz(a, geometry, [each.lipschitz for each in before]) if before else ONE
        found.append(Found(shape, lipschitz, sharpened(formula.extent(a, [each.extent for each in before]), shape)))
    return found


def rounding(
    program: Mapping[str, Any], weights: Mapping[str, Any], found: Sequence[Found], p: Precision
) -> list[Interval]:
    """The error of every node in a forward pass of precision ``p``, over the whole domain.

    |computed - exact| <= Lip(errors of the inputs) + local error at the computed inputs + what underflows in one entry.
    """
    tensors = {name: fractions_of(value) for name, value in weights.items()}
    lost = exactly(Fraction(1, 1 << (900 if p == DOUBLE else 100)))
    errors: list[Interval] = []
    for node, own in zip(program["nodes"], found, strict=True):
        inputs = node["inputs"]
        formula, a = asked(node, [found[i].shape for i in inputs], tensors, p, [found[i].extent for i in inputs])
        before = [errors[i] for i in inputs]
        computed = [Extent(found[i].extent.token + errors[i], found[i].extent.total + errors[i]) for i in inputs]
        if not inputs:
            errors.append(ZERO)
            continue
        local = formula.rounding(a, p, computed)
        errors.append(formula.lipschitz(a, "l2", before) + local + lost * root_of(math.prod(own.shape)))
    return errors
