"""Whether the kernel and the second checker agree: never below the exact bound, and hardly above it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from hf_lipschitz.bounds.engine import bound_program, node_errors
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rounding import UNIT_ROUNDOFF, Array
from hf_lipschitz.bounds.rule import Geometry, Rule, Size
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds.row import Example
from tests.bounds.search import ask
from tests.second_checker.exact import Interval, exactly
from tests.second_checker.formula import BRAIN, SINGLE, Asked, Extent, Formula, Precision
from tests.second_checker.norms import fractions_of
from tests.second_checker.table import FORMULAS
from tests.second_checker.walk import asked, rounding, walk

# Strays of float scalars are differences of nearly equal floats in the kernel: good to this part at 2**-24.
PRECISIONS: Mapping[str, tuple[Precision, float]] = {"float32": (SINGLE, 1e-6), "bfloat16": (BRAIN, 1e-9)}

_UNDERFLOW = Fraction(1, 1 << 500)  # the root of the smallest number, and what rules multiply it with


class Disagreement(AssertionError):
    """The kernel's number and the exact interval do not fit."""


def compare(kernel: float, exact: Interval, slack: float, what: str) -> None:
    """Raise Disagreement unless exact.low <= kernel <= exact.high (1 + slack), up to what underflows."""
    if exact.infinite or math.isinf(kernel):
        if not (exact.infinite and kernel == math.inf):
            raise Disagreement(f"{what}: the kernel says {kernel}, the second checker {exact}")
        return
    value = Fraction(kernel)
    if value < exact.low:
        raise Disagreement(f"{what}: {kernel} is below the exact {float(exact.low)} by {_part(value, exact.low)}")
    if value > exact.high * (1 + Fraction(slack)) + _UNDERFLOW:
        raise Disagreement(f"{what}: {kernel} is above the exact {float(exact.high)} by {_part(value, exact.high)}")


def _part(value: Fraction, exact: Fraction) -> float:
    return float(abs(value - exact) / exact) if exact else math.inf


KINDS = ("gaussian", "hot_rows", "repeated_rows", "zeros")  # of matrices, on which rules are compared


def slack_of(kind: str) -> float:
    """The stated slack of norms: near-orthogonal matrices are bounded without a factorisation, to 1e-6."""
    return 1e-6 if kind in ("orthogonal", "near_duplicate_sigma") else 0.0


def compare_rule(example: Example, geometry: Geometry, rule: Rule | None = None, slack: float = 0.0) -> None:
    """Constant and sizes of one node, from inputs of several Lipschitz bounds and sizes."""
    rule, call = ask(example, rule)
    call = dataclasses.replace(call, sizes=_sizes(len(example.shapes))[0])
    formula, a = _asked(example, _extents(call.sizes))
    where, slack = f"{example.node.op} in {geometry}", max(slack, formula.slack)
    if rule.shape(call) != formula.shape(a):
        raise Disagreement(f"{where}: shapes {rule.shape(call)} and {formula.shape(a)}")
    for incoming in ((1.0, 1.0), (0.5, 3.0), (2.0, 0.25)):
        given = incoming[: len(example.shapes)]
        claimed = rule.lipschitz(call, geometry, given)
        exact = formula.lipschitz(a, geometry, [exactly(each) for each in given])
        compare(claimed, exact, slack, f"{where}, constant from {given}")
    for sizes in _sizes(len(example.shapes)):
        size = rule.size(call, sizes)
        extent = formula.extent(a, _extents(sizes))
        compare(size.token, extent.token, slack, f"{where}, token size from {sizes}")
        compare(size.total, extent.total, slack, f"{where}, total size from {sizes}")


def compare_rounding(example: Example, dtype: str, rule: Rule | None = None) -> None:
    """The local rounding error of one node at inputs of several sizes."""
    precision, slack = PRECISIONS[dtype]
    rule, call = ask(example, rule, roundoff=UNIT_ROUNDOFF[dtype])
    call = dataclasses.replace(call, sizes=_sizes(len(example.shapes))[0])
    formula, a = _asked(example, _extents(call.sizes), precision)
    for sizes in _sizes(len(example.shapes)):
        claimed = rule.rounding(call, UNIT_ROUNDOFF[dtype], sizes)
        exact = formula.rounding(a, precision, _extents(sizes))
        compare(claimed, exact, max(slack, formula.slack), f"{example.node.op} in {dtype}, rounding at {sizes}")


def _asked(example: Example, sizes: list[Extent], precision: Precision | None = None) -> tuple[Formula, Asked]:
    tensors = {name: fractions_of(value) for name, value in example.weights.items()}
    return asked(example.node.to_json(), example.shapes, tensors, precision, sizes)


def _sizes(count: int) -> list[tuple[Size, ...]]:
    choices = [(Size(1.5, 2.5), Size(0.25, 0.5)), (Size(0.0, 0.0), Size(4.0, 4.0)), (Size(8.0, 16.0), Size(0.0, 0.0))]
    return [sizes[:count] for sizes in choices]


def _extents(sizes: tuple[Size, ...]) -> list[Extent]:
    return [Extent(exactly(size.token), exactly(size.total)) for size in sizes]


def _shortened(values: Array) -> Array:
    """float32 values cut to the bits that bfloat16 holds: the kernel bounds no forward whose weights are rounded."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).reshape(np.shape(values))


def compare_program(
    program: Program, weights: Mapping[str, Any], geometry: Geometry, rules: Mapping[str, Rule] | None = None
) -> None:
    """Every node of a whole program: Lipschitz bound, sizes and (in l2) rounding errors."""
    rules, weights = rules or BUILT_IN, {name: _shortened(value) for name, value in weights.items()}
    bound = bound_program(program, weights, rules, geometry=geometry)
    json_program = program.to_json()
    found = walk(json_program, weights, geometry)
    slack = 1e-9 * len(program.nodes) + 2.0 * sum(FORMULAS[node.op].slack for node in program.nodes)
    for index, (kernel, exact) in enumerate(zip(bound.nodes, found, strict=True)):
        where = f"node {index} ({program.nodes[index].op}) in {geometry}"
        if bound.shapes[index] != exact.shape:
            raise Disagreement(f"{where}: shapes {bound.shapes[index]} and {exact.shape}")
        compare(kernel.lipschitz, exact.lipschitz, slack, f"{where}, Lipschitz bound")
        compare(kernel.size.token, exact.extent.token, slack, f"{where}, token size")
        compare(kernel.size.total, exact.extent.total, slack, f"{where}, total size")
    if geometry == "token_max":
        return
    for dtype, (precision, part) in PRECISIONS.items():
        sizes = [[node.size] for node in bound.nodes]
        kernel_errors = node_errors(program, weights, rules, dtype, bound, sizes)
        exact_errors = rounding(json_program, weights, found, precision)
        for index, ((error,), exact) in enumerate(zip(kernel_errors, exact_errors, strict=True)):
            where = f"node {index} ({program.nodes[index].op}) in {dtype}, error"
            compare(error, exact, max(slack, part * len(program.nodes)), where)
