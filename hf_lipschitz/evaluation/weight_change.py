"""How far the outputs of one program can move when its weights change: quantised, cast, fine-tuned or merged copies.

Let a and b be two sets of weights of one program, z_a and z_b the values of a node. Walking the program, with the input
values of b written x_b,

    |f_a(x_a) - f_b(x_b)| <= |f_a(x_a) - f_a(x_b)| + |f_a(x_b) - f_b(x_b)|
                          <= lipschitz of f_a (changes of the inputs)  +  change of f at inputs as large as those of b.

So the Lipschitz bounds are those of one network and the activation bounds those of the other; taking both of the same
network is wrong (weights 1 and 1 that become 2 and 2, at x = 1: true change 3, that formula gives 2). Every use of a
shared weight is a node of its own, and is counted.

The second term, for an operation that is linear in its tensors, is the size of the operation with the difference of
the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_lipschitz.bounds.engine import ProgramBound, bound_program, node_calls
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rounding import Enclosure, U, add_up, array_norm_up, mul_up, sqrt_up, up
from hf_lipschitz.bounds.rule import Call, NormTable, Rule, Size, tightened
from hf_lipschitz.bounds.rules.attention_heads import column_roots
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.evaluation.radii import normalized_rows

Array = NDArray[np.float64]
Change = Callable[[Rule, Call, Call, tuple[Size, ...]], float]


@dataclass(frozen=True)
class WeightChange:
    """Bounds, over every input of the program's domain, of the l2 distance between the outputs of two networks.

    ``nodes`` holds the bound for every node of the program, in order: where the distance comes from.
    """

    features: float
    logits: float
    nodes: tuple[float, ...]


def bound_change(
    program: Program,
    before: Mapping[str, Array],
    after: Mapping[str, Array],
    rules: Mapping[str, Rule] = BUILT_IN,
    *,
    witnesses: Mapping[str, float] | None = None,
) -> WeightChange:
    """Bound ``|f_before(x) - f_after(x)|`` in l2 for every x of the domain; infinite where the domain is unbounded.

    Args:
        program: in any topological order. before, after: its tensors by name, of the same shapes.
        witnesses: mu by matrix label, of either network: they save time and cannot weaken the result.

    Raises:
        KernelError: weights that do not fit the program.

    Source: module docstring. Both readings are bounds, before-Lipschitz with after-sizes and the reverse; the smaller
    one is returned.
    """
    bounds = [bound_program(program, weights, rules, witnesses=witnesses) for weights in (before, after)]
    ways = [
        _walk(program, (first, second), (of_first, of_second), rules)
        for first, second, of_first, of_second in (
            (before, after, *bounds),
            (after, before, *reversed(bounds)),
        )
    ]
    return min(ways, key=lambda way: (way.logits, way.features))


def _walk(
    program: Program,
    weights: tuple[Mapping[str, Array], Mapping[str, Array]],
    bounds: tuple[ProgramBound, ProgramBound],
    rules: Mapping[str, Rule],
) -> WeightChange:
    """Lipschitz bounds of the first network, sizes of the second."""
    moved: list[float] = []
    calls = zip(*(node_calls(program, w, rules, b) for w, b in zip(weights, bounds, strict=True)), strict=True)
    for index, ((rule, one), (_, other)) in enumerate(calls):
        node, sizes = program.nodes[index], bounds[1].nodes
        # between the inputs of the two networks: in the convex set of what is at most as large as either
        one = replace(one, sizes=tuple(_larger_size(bounds, i) for i in node.inputs))
        carried = rule.lipschitz(one, "l2", tuple(moved[i] for i in node.inputs)) if node.inputs else 0.0
        own = 0.0
        if node.inputs and not _same(one, other):
            incoming = tuple(sizes[i].size for i in node.inputs)
            own = min(_apart(rule, one, other, incoming), _CHANGES.get(rule.op, _apart)(rule, one, other, incoming))
        both = add_up(bounds[0].nodes[index].size.total, sizes[index].size.total)
        moved.append(min(add_up(carried, own), both))
    outputs = {name: moved[index] for name, index in program.outputs.items()}
    return WeightChange(outputs["features"], outputs["logits"], tuple(moved))


def _larger_size(bounds: tuple[ProgramBound, ProgramBound], index: int) -> Size:
    first, second = (bound.nodes[index].size for bound in bounds)
    return Size(max(first.token, second.token), max(first.total, second.total))


def _same(one: Call, other: Call) -> bool:
    """Whether a node reads equal tensors and scalars in both networks."""
    return all(np.array_equal(one.tensors[slot], other.tensors[slot]) for slot in one.tensors) and all(
        np.array_equal(one.scalars[slot].low, other.scalars[slot].low)
        and np.array_equal(one.scalars[slot].high, other.scalars[slot].high)
        for slot in one.scalars
    )


def _apart(rule: Rule, one: Call, other: Call, incoming: tuple[Size, ...]) -> float:
    """Any operation: two values are at most as far apart as they are long together."""
    values = [tightened(rule.size(call, incoming), rule.shape(call)) for call in (one, other)]
    return add_up(*(value.total for value in values))


def _difference(one: Call, other: Call) -> Call:
    """The call with the difference of the tensors, whose entries err by one roundoff (see :func:`_rounded`)."""
    tensors = {slot: one.tensors[slot] - other.tensors[slot] for slot in one.tensors}
    return replace(other, tensors=tensors, norms=NormTable())


def _rounded(value: float, one: Call, other: Call, incoming: tuple[Size, ...], factor: float = 1.0) -> float:
    """Add what the rounded subtraction of tensors may hide: u times their Frobenius norm, times the input and the
    factor that a difference counts with.
    """
    lost = add_up(*(mul_up(2.0 * U, array_norm_up(one.tensors[s] - other.tensors[s])) for s in one.tensors))
    reach = add_up(*(size.total for size in incoming), sqrt_up(float(np.prod(one.shapes[0]))))
    return add_up(value, mul_up(lost, reach, factor))


def _affine(rule: Rule, one: Call, other: Call, incoming: tuple[Size, ...]) -> float:
    """x -> W x + b is linear in (W, b): the change is the value with their differences."""
    return _rounded(rule.size(_difference(one, other), incoming).total, one, other, incoming)


def _offset(rule: Rule, one: Call, other: Call, incoming: tuple[Size, ...]) -> float:
    return _rounded(rule.offset(_difference(one, other)).total, one, other, incoming)


def _head(rule: Rule, one: Call, other: Call, incoming: tuple[Size, ...]) -> float:
    """Rows are normalised first; their difference and its errors in Frobenius norm, then the bias."""
    (rows, errors), (rows_other, errors_other) = (
        normalized_rows(call.tensors["weight"], call.attrs["eps"]) for call in (one, other)
    )
    apart = add_up(mul_up(array_norm_up(rows - rows_other), 1.0 + 4.0 * U), array_norm_up(errors + errors_other))
    bias = array_norm_up(one.tensors["bias"] - other.tensors["bias"]) if "bias" in one.tensors else 0.0
    return add_up(mul_up(up(apart), incoming[0].total), mul_up(bias, 1.0 + 4.0 * U))


def _scale(rule: Rule, one: Call, other: Call, incoming: tuple[Size, ...]) -> float:
    return mul_up(_scalar_change(one, other, "factor"), incoming[0].total)


def _residual(rule: Rule, one: Call, other: Call, incoming: tuple[Size, ...]) -> float:
    """(1 - a) x + a y moves by |da| |y - x|."""
    return mul_up(_scalar_change(one, other, "weight"), add_up(incoming[0].total, incoming[1].total))


def _attention(rule: Rule, one: Call, other: Call, incoming: tuple[Size, ...]) -> float:
    """Values, radii, queries, keys and temperatures change one after the other, the rest at either of its values.

    With tau, r the larger of both and column the root of the largest column sum of attention weights (1 for Sinkhorn):
    values move the result by column |dV| |X|, radii by sqrt(N) |dr|, queries by tau r |dQ| |X|, keys by tau r column
    |dK| |X|, temperatures by sqrt(N) |r dtau| (the derivation of the rule, with ds = tau <dq, k> and so on).
    """
    n, heads = one.shapes[0][0], one.attrs["heads"]
    tau, radius = (_larger(one, other, slot, heads) for slot in ("temperature", "radius"))
    column = 1.0 if rule.op.startswith("sinkhorn") else max(column_roots(tau, n, n))
    strength = float(np.max(np.nextafter(tau * radius, np.inf)))
    apart = _difference(one, other)
    factor = {"value": column, "query": strength, "key": mul_up(strength, column)}
    moved = [mul_up(factor[slot], apart.norm(slot, "", None), incoming[0].total) for slot in factor]
    bent = _scalar_changes(one.scalars["radius"], other.scalars["radius"])
    heated = radius * _scalar_changes(one.scalars["temperature"], other.scalars["temperature"])
    scalars = add_up(*(array_norm_up(np.nextafter(np.broadcast_to(each, (heads,)), np.inf)) for each in (bent, heated)))
    total = add_up(*moved, mul_up(sqrt_up(float(n)), scalars))
    return _rounded(total, one, other, incoming, max(1.0, *factor.values()))


def _larger(one: Call, other: Call, slot: str, heads: int) -> Array:
    return np.broadcast_to(np.maximum(one.scalars[slot].high, other.scalars[slot].high), (heads,))


def _scalar_change(one: Call, other: Call, slot: str) -> float:
    return array_norm_up(_scalar_changes(one.scalars[slot], other.scalars[slot]))


def _scalar_changes(one: Enclosure, other: Enclosure) -> Array:
    """Elementwise upper bounds of |s - t| for enclosed s and t."""
    farthest = np.maximum(np.abs(one.high - other.low), np.abs(other.high - one.low))
    return np.nextafter(np.atleast_1d(farthest), np.inf)


# Operations whose tensors or scalars may change, and what a change does; any other one changes by _apart at most.
_CHANGES: dict[str, Change] = {
    "linear@1": _affine,
    "token_mixing@1": _affine,
    "convolution@1": _affine,
    "transposed_convolution@1": _affine,
    "offset@1": _offset,
    "normalized_linear@1": _head,
    "scale@1": _scale,
    "residual@1": _residual,
    "softmax_attention@1": _attention,
    "sinkhorn_attention@1": _attention,
}
