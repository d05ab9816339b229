"""The two readings of a bound program, and the rounding error of its floating-point execution.

*Bounded*: ``bound_program`` walks the nodes with the stored weights and returns a proved Lipschitz bound of each
output. *Executed*: ``evaluate_program`` computes the function in float64. ``rounding_error`` bounds how far a forward
pass in a dtype strays from it. Everything unknown is an error that names the node, never a default.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from .errors import KernelError
from .program import Node, Program
from .rounding import ARITHMETIC, UNIT_ROUNDOFF, Arithmetic, Array, add_up, array_norm_up, largest, mul_up, sqrt_up
from .rule import GEOMETRIES, SEARCH, Call, Geometry, NodeBound, NormTable, Rule, Shape, Size, tightened
from .rules.scalars import MAX_COST, enclose, expression_cost

# The one kind of stored tensor that an evaluation forward never reads: counters of normalisation layers.
UNREAD_SUFFIXES = ("num_batches_tracked",)
# What a hostile program may cost: entries of one value and of all, multiplications in norms (and times one norm each).
MAX_ENTRIES, MAX_TOTAL, MAX_WORK, WORK_RATIO = 2**27, 2**34, 2.0**36, 64.0


@dataclass(frozen=True)
class ProgramBound:
    """Bounds of one program with one set of weights.

    ``nodes`` holds a NodeBound for each node, ``shapes`` their sample shapes, ``outputs`` those of features and logits,
    ``norms`` the norm bounds of matrices by label, ``geometry`` the norm that all Lipschitz bounds speak of.
    """

    geometry: Geometry
    nodes: tuple[NodeBound, ...]
    shapes: tuple[Shape, ...]
    outputs: Mapping[str, NodeBound]
    norms: NormTable


@dataclass(frozen=True)
class RoundingBound:
    """For one dtype: bounds of the l2 error and of the l2 norm of each output, over all inputs of the domain."""

    features_error: float
    features_norm: float
    logits_error: float


def bound_program(
    program: Program,
    weights: Mapping[str, Array],
    rules: Mapping[str, Rule],
    *,
    geometry: Geometry = "l2",
    witnesses: Mapping[str, float] | None = None,
    unit: float = 1.0,
    norms: NormTable | None = None,
) -> ProgramBound:
    """Bound the Lipschitz constant from the program's input to every node.

    Args:
        program: a program in any topological order.
        weights: stored tensors by name; every one must be read by the program.
        rules: the rule table that the caller trusts.
        geometry: ``l2`` or ``token_max``.
        witnesses: mu by matrix label, from a certificate (they save time and cannot weaken the result).
        unit: the Lipschitz bound of the input, to which all others are proportional (a small one avoids overflow).
        norms: norms of the same weights that the caller has proved already; others are added.

    Raises:
        KernelError: unknown operation or attribute, tensor missing or not covered, wrong shape, not finite.

    Source: composition of Lipschitz maps, node by node; each rule states its own source.
    """
    if geometry not in GEOMETRIES:
        raise KernelError(f"unknown geometry {geometry!r}; known: {', '.join(GEOMETRIES)}")
    check_coverage(program, weights)
    check_origin(program, rules)
    norms = NormTable(witnesses, MAX_WORK + sum(map(_justified, weights.values()))) if norms is None else norms
    bounds: list[NodeBound] = []
    shapes: list[Shape] = []
    for index, node in enumerate(program.nodes):
        with _place(index, node):
            rule, call = _prepare(index, node, weights, rules, shapes, norms)
            incoming = [bounds[i] for i in node.inputs]
            call = replace(call, sizes=tuple(b.size for b in incoming))
            shape = _limited(rule.shape(call), shapes)
            factor = unit if rule.arity == 0 else rule.lipschitz(call, geometry, tuple(b.lipschitz for b in incoming))
            size = tightened(rule.size(call, tuple(b.size for b in incoming)), shape)
            if not factor >= 0.0 or not size.token >= 0.0 or not size.total >= 0.0:
                raise KernelError("the bound is not a number")
            bounds.append(NodeBound(factor, size))
            shapes.append(shape)
    outputs = {name: bounds[index] for name, index in program.outputs.items()}
    return ProgramBound(geometry, tuple(bounds), tuple(shapes), outputs, norms)


def evaluate_program(
    program: Program, weights: Mapping[str, Array], rules: Mapping[str, Rule], inputs: Array
) -> dict[str, Array]:
    """Execute the program in float64 on a batch of inputs; returns ``{"features": ..., "logits": ...}``."""
    values = node_values(program, weights, rules, inputs)
    return {name: values[index] for name, index in program.outputs.items()}


def node_values(
    program: Program, weights: Mapping[str, Array], rules: Mapping[str, Rule], inputs: Array
) -> list[Array]:
    """The value of every node for a batch of inputs, in float64; each has a leading batch axis."""
    check_coverage(program, weights)
    check_origin(program, rules)
    norms, values, shapes = NormTable(), list[Array](), list[Shape]()
    for index, node in enumerate(program.nodes):
        with _place(index, node):
            rule, call = _prepare(index, node, weights, rules, shapes, norms)
            shape = _limited(rule.shape(call), shapes)
            arguments = (np.asarray(inputs, dtype=np.float64),) if rule.arity == 0 else [values[i] for i in node.inputs]
            value = rule.apply(call, *arguments)
            if value.shape[1:] != shape:
                raise KernelError(f"the value has sample shape {value.shape[1:]}, expected {shape}")
            values.append(value)
            shapes.append(shape)
    return values


def rounding_error(
    program: Program, weights: Mapping[str, Array], rules: Mapping[str, Rule], dtype: str, bound: ProgramBound
) -> RoundingBound:
    """Bound the distance between the exact outputs and those of a forward pass in ``dtype``, over the whole domain."""
    sizes = [[n.size] for n in bound.nodes]
    errors = [each for (each,) in node_errors(program, weights, rules, dtype, bound, sizes)]
    features, logits = program.outputs["features"], program.outputs["logits"]
    return RoundingBound(errors[features], add_up(bound.nodes[features].size.total, errors[features]), errors[logits])


def node_errors(
    program: Program,
    weights: Mapping[str, Array],
    rules: Mapping[str, Rule],
    dtype: str,
    bound: ProgramBound,
    sizes: Sequence[Sequence[Size]],
    arithmetic: Arithmetic | None = None,
) -> list[list[float]]:
    """For every node and every case, bound the l2 error of the node's value in a forward pass in ``dtype``.

    Each node turns the errors of its inputs into at most ``lipschitz(errors)`` and adds its own local error, taken at
    the *computed* inputs, whose size is at most the exact size plus the error so far. The bound is infinite where
    something may overflow in ``dtype``, and everywhere if a weight is not exact in it; products in TF32, Winograd or
    FFT convolutions and reduced-precision sums are not covered.

    Args:
        sizes: for every node, how large its exact value is in each case (a case is the whole domain, or one input).
        arithmetic: how sums are accumulated, if not as ARITHMETIC says for the dtype.

    Source: ``||x^_L - f(x)|| <= sum_l Lip(f_L o ... o f_{l+1}) ||delta_l(x^_{l-1})||`` (telescoping sum).
    """
    arithmetic = arithmetic or ARITHMETIC[dtype]
    roundoff = arithmetic.roundoff
    tiny = 2.0**-900 if dtype == "float64" else 2.0**-100  # covers underflow of every operation of one output entry
    exact = all(_fits(array, dtype) for array in weights.values())
    sound = [exact] * len(sizes[0])
    errors: list[list[float]] = []
    for index, node in enumerate(program.nodes):
        with _place(index, node):
            rule, call = _prepare(index, node, weights, rules, bound.shapes, bound.norms, arithmetic)
            strays = all(map(math.isfinite, call.deviations.values()))
            lost = mul_up(tiny, sqrt_up(float(np.prod(bound.shapes[index]))))
            errors.append([0.0] * len(sound))
            for case in range(len(sound) if rule.arity else 0):
                before = [errors[i][case] for i in node.inputs]
                given = [sizes[i][case] for i in node.inputs]
                computed = tuple(
                    Size(add_up(s.token, e), add_up(s.total, e)) for s, e in zip(given, before, strict=True)
                )
                near = replace(call, sizes=computed)
                local = rule.rounding(near, roundoff, computed) if sound[case] and strays else math.inf
                error = add_up(rule.lipschitz(near, "l2", tuple(before)), local, lost)
                reach = max(sizes[index][case].total, error, *(s.total for s in computed))
                sound[case] = sound[case] and strays and reach <= largest(roundoff)
                errors[index][case] = error if sound[case] else math.inf
    return errors


def node_calls(
    program: Program, weights: Mapping[str, Array], rules: Mapping[str, Rule], bound: ProgramBound
) -> Generator[tuple[Rule, Call]]:
    """Each node's rule and the call that it is asked about, with shapes and norms of a bound of the same weights."""
    for index, node in enumerate(program.nodes):
        yield _prepare(index, node, weights, rules, bound.shapes, bound.norms)


def check_origin(program: Program, rules: Mapping[str, Rule]) -> None:
    """Exactly one node has no inputs: where perturbations enter."""
    origins = [n for n in program.nodes if n.op in rules and rules[n.op].arity == 0]
    if len(origins) != 1:
        raise KernelError(f"a program has exactly one input node, this one has {len(origins)}")


def check_coverage(program: Program, weights: Mapping[str, Array]) -> None:
    """Refuse tensors that the program reads but the file lacks, and those of the file that it never reads."""
    needed = program.tensor_names()
    for name in sorted(name for name in needed if "|" in name):
        raise KernelError(f"tensor {name!r}: a name with '|' could be taken for a norm derived from another tensor")
    for name in sorted(needed - set(weights)):
        raise KernelError(f"tensor {name!r} is read by the program but missing from the weights")
    for name in sorted(set(weights) - needed):
        if not name.endswith(UNREAD_SUFFIXES) or weights[name].dtype.kind == "f":
            raise KernelError(f"tensor {name!r} is stored but not covered by the program: nothing bounds what it does")
    if sum(expression_cost(e, weights) for node in program.nodes for e in node.scalars.values()) > MAX_COST:
        raise KernelError(f"the program's scalar expressions cost more than {MAX_COST} evaluations: shorten them")


def _fits(array: Array, dtype: str) -> bool:
    """Whether a tensor's entries, and sums of their squares, are exact or in range in a dtype (counters always are)."""
    if array.dtype.kind != "f" or not array_norm_up(array) <= largest(UNIT_ROUNDOFF[dtype]):
        return array.dtype.kind != "f"
    single = array.astype(np.float64 if dtype == "float64" else np.float32)
    halves = dtype != "bfloat16" or not np.any(np.ascontiguousarray(single).view(np.uint32) & 0xFFFF)
    return bool(halves and np.array_equal(single, array))


def _prepare(
    index: int,
    node: Node,
    weights: Mapping[str, Array],
    rules: Mapping[str, Rule],
    shapes: Sequence[Shape],
    norms: NormTable,
    arithmetic: Arithmetic | None = None,
) -> tuple[Rule, Call]:
    """Find the rule by exact name and check the node against its declaration."""
    rule = rules.get(node.op)
    if rule is None:
        raise KernelError(f"no rule named {node.op!r}; known: {', '.join(sorted(rules))}")
    if len(node.inputs) != rule.arity:
        raise KernelError(f"takes {rule.arity} inputs, got {len(node.inputs)}")
    _same_names("attribute", node.attrs, rule.attrs, frozenset())
    for name, check in rule.attrs.items():
        if not check(node.attrs[name]):
            raise KernelError(f"attribute {name!r} has the inadmissible value {node.attrs[name]!r}")
    _same_names("tensor slot", node.tensors, rule.tensors, rule.optional)
    _same_names("scalar", node.scalars, dict.fromkeys(rule.scalars), frozenset())
    tensors = {slot: _tensor(weights, name, rule.tensors[slot]) for slot, name in node.tensors.items()}
    scalars = {slot: enclose(expression, weights) for slot, expression in node.scalars.items()}
    deviations: dict[str, float] = {}
    for slot, exact in scalars.items():
        forward = enclose(node.scalars[slot], weights, arithmetic.roundoff) if arithmetic else exact
        farthest = np.maximum(forward.high - exact.low, exact.high - forward.low)
        deviations[slot] = float(np.max(farthest)) * (1.0 + 2.0**-50)
    inputs = tuple(shapes[i] for i in node.inputs)
    arithmetic = arithmetic or ARITHMETIC["float64"]
    return rule, Call(index, node.attrs, inputs, tensors, node.tensors, scalars, norms, deviations, arithmetic)


def _justified(array: Array) -> float:
    """How many multiplications in norms a stored tensor justifies."""
    dense = float(array.size) * min(len(array), array.size // len(array)) if array.ndim and array.size else 1.0
    return dense * (4.0 * SEARCH if array.ndim > 2 else WORK_RATIO)


def _limited(shape: Shape, before: Sequence[Shape]) -> Shape:
    """The shape, unless a value of it, or all values so far together, would be too large."""
    if math.prod(shape) > MAX_ENTRIES or (len(before) % 64 == 63 and sum(map(math.prod, before)) > MAX_TOTAL):
        raise KernelError(f"a value of sample shape {shape}, or all values so far, have more entries than are allowed")
    return shape


def _tensor(weights: Mapping[str, Array], name: str, dimensions: int) -> Array:
    array = weights[name]
    if (dimensions and array.ndim != dimensions) or array.dtype.kind != "f" or array.size == 0:
        raise KernelError(
            f"tensor {name!r} is {array.dtype} of shape {array.shape}; expected {dimensions or 'any'} float dimensions"
        )
    if not np.all(np.isfinite(array)):
        raise KernelError(f"tensor {name!r} contains NaN or infinite entries")
    return array.astype(np.float64)


def _same_names(kind: str, given: Mapping[str, object], known: Mapping[str, object], optional: frozenset[str]) -> None:
    for name in given:
        if name not in known:
            raise KernelError(f"unknown {kind} {name!r}; known: {', '.join(known) or 'none'}")
    for name in known:
        if name not in given and name not in optional:
            raise KernelError(f"the {kind} {name!r} is missing")


@contextmanager
def _place(index: int, node: Node) -> Generator[None]:
    """Prefix errors of the kernel with the node they came from."""
    try:
        yield
    except KernelError as error:
        raise KernelError(f"node {index} ({node.op}): {error}") from None
