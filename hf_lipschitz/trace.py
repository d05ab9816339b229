"""The trace of a bound: for every operation of a program what came in, what its rule did with it, and what went out.

The kernel runs once, with every rule wrapped in one that writes down what it was asked and what it answered. So a trace
shows the kernel's own numbers, and nothing is computed a second time in another way. A bound may exceed float64, as
10^400 does: there the rule is asked again with its inputs scaled by a power of two, which is exact because a rule's
bound is homogeneous in them (it is an operator norm of the inputs' bounds), and the logarithm is kept. A trace explains
and verifies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from hf_lipschitz.bounds.engine import ProgramBound, bound_program
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import Array, log10_of
from hf_lipschitz.bounds.rule import Call, Geometry, NormTable, Rule, Shape, Size
from hf_lipschitz.bounds.spectral import NormBound
from hf_lipschitz.trace_tree import Again, Block, Item, Path, layout

_LOG10_2 = math.log10(2.0)
_SAME = 1e-12  # how closely a formula must reproduce what a rule answered to be printed as what it did
_TINY = 1e-290  # and where subnormal numbers make that impossible
_SMALLEST = math.ulp(0.0)


@dataclass(frozen=True)
class Magnitude:
    """A non-negative bound: ``value``, infinite where float64 ends, and ``log10``, which goes on there."""

    value: float
    log10: float

    @classmethod
    def of(cls, value: float, exponent: int = 0) -> Magnitude:
        """The number ``value * 2**exponent``."""
        try:
            scaled = math.ldexp(value, exponent)
        except OverflowError:
            scaled = math.inf
        return cls(scaled, log10_of(value) + exponent * _LOG10_2)

    @property
    def is_infinite(self) -> bool:
        """Whether nothing is bounded at all; a value that float64 cannot hold is not infinite."""
        return self.log10 == math.inf

    def to_json(self) -> dict[str, Any]:
        """``value`` in hexadecimal ("inf" beyond float64), ``decimal`` in 17 digits, ``log10`` (None of 0 and inf)."""
        log10 = self.log10 if math.isfinite(self.log10) else None
        return {"value": self.value.hex(), "decimal": repr(self.value), "log10": log10}


@dataclass(frozen=True)
class Step:
    """One node: what came in, what its rule did, what went out.

    Attributes:
        index: of the node. op: versioned name. path: the module it is counted with, as far as tensor names tell.
        inputs: indices of the nodes it reads. tensors: slot -> name. attrs: constants. shape: the value's sample shape.
        scalars: slot -> smallest and largest entry of the enclosure of a scalar expression.
        incoming: Lipschitz bounds of the inputs. gains: the rule's factor for each. outgoing: what the rule made of it.
        formula: how ``outgoing`` follows from gains and incoming: ``sum``, ``root`` (of the sum of squares of the
            products), ``largest`` (of the products), ``largest input``, or ``own`` (a formula that ``source`` states).
        size: bound of the value itself. norms: label and bound of each norm of a tensor that was used.
        source: the rule's theorem or proof. warning: what the rule wants said beside a bound that rests on it.
    """

    index: int
    op: str
    path: Path
    inputs: tuple[int, ...]
    tensors: Mapping[str, str]
    attrs: Mapping[str, Any]
    shape: Shape
    scalars: Mapping[str, tuple[float, float]]
    incoming: tuple[Magnitude, ...]
    gains: tuple[float, ...]
    outgoing: Magnitude
    formula: str
    size: Size
    norms: tuple[tuple[str, NormBound], ...]
    source: str
    warning: str

    def to_json(self) -> dict[str, Any]:
        """JSON values; magnitudes as ``Magnitude.to_json`` gives them."""
        return {
            "index": self.index,
            "op": self.op,
            "module": ".".join(self.path),
            "inputs": list(self.inputs),
            "tensors": dict(self.tensors),
            "attrs": dict(self.attrs),
            "shape": list(self.shape),
            "scalars": {slot: [low.hex(), high.hex()] for slot, (low, high) in self.scalars.items()},
            "lipschitz_in": [each.to_json() for each in self.incoming],
            "factors": [Magnitude.of(gain).to_json() for gain in self.gains],
            "formula": self.formula,
            "lipschitz_out": self.outgoing.to_json(),
            "size": {
                "token": Magnitude.of(self.size.token).to_json(),
                "total": Magnitude.of(self.size.total).to_json(),
            },
            "norms": [
                {"label": label, "method": bound.method, **Magnitude.of(bound.value).to_json()}
                for label, bound in self.norms
            ],
            "source": self.source,
            "warning": self.warning,
        }


@dataclass(frozen=True)
class Trace:
    """All steps of one program with one set of weights.

    Attributes:
        geometry: the norm all bounds speak of. origin: the space of the input. outputs: name -> node.
        tree: the steps by module and branch (see trace_tree.py).
    """

    geometry: Geometry
    origin: str
    steps: tuple[Step, ...]
    outputs: Mapping[str, int]
    tree: tuple[Item, ...]

    def bound(self, output: str = "logits") -> Magnitude:
        """The bound to an output: the certificate's before its slack."""
        return self.steps[self.outputs[output]].outgoing

    def factor(self, before: int, after: int) -> Magnitude:
        """By how much the bound grows from one node (-1: before the input) to a later one that all of it passes."""
        start = self.steps[before].outgoing if before >= 0 else Magnitude(1.0, 0.0)
        end = self.steps[after].outgoing
        if end.is_infinite or start.log10 == -math.inf:
            return Magnitude(math.inf, math.inf)
        log10 = end.log10 - start.log10
        if 0.0 < start.value < math.inf and 0.0 < end.value < math.inf:
            return Magnitude(end.value / start.value, log10)
        return Magnitude(10.0**log10 if log10 < 308.0 else math.inf, log10)

    def share(self, before: int, after: int) -> float | None:
        """The part of log L (to the logits) that is made between two nodes that all of it passes; None where L is 1, 0
        or infinite. Shares of consecutive stretches add up to 1.
        """
        total, part = self.bound().log10, self.factor(before, after).log10
        return part / total if total != 0.0 and math.isfinite(total) and math.isfinite(part) else None

    def notes(self) -> list[str]:
        """What a reader must know beside the numbers, one sentence each."""
        found: list[str] = []
        warned = {step.op: step.warning for step in self.steps if step.warning}
        for op, warning in warned.items():
            found.append(f"{op} at node {_listed([s.index for s in self.steps if s.op == op])}: {warning}")
        labels = {label: bound for step in self.steps for label, bound in step.norms if "fallback" in bound.method}
        for label in labels:
            found.append(f"the norm of {label!r} is a coarse one (method fallback): the factorisation failed")
        first = next((step for step in self.steps if step.outgoing.is_infinite), None)
        if first is not None:
            found.append(f"the bound is infinite from node {first.index} ({first.op}) on: nothing is proved of it")
        elif any(step.outgoing.value == math.inf for step in self.steps):
            found.append("bounds beyond float64 are shown as powers of ten")
        first = next((step for step in self.steps if not math.isfinite(step.size.total)), None)
        if first is not None and not first.inputs:
            found.append("inputs may be of any size, so the sizes of most values are not bounded")
        elif first is not None:
            found.append(f"the size of the values is not bounded from node {first.index} ({first.op}) on")
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON values: the bounds, every node, and the tree with the share of each block in log L."""
        return {
            "norm": self.geometry,
            "from": self.origin,
            "bounds": {output: self.bound(output).to_json() for output in self.outputs},
            "outputs": dict(self.outputs),
            "nodes": [step.to_json() for step in self.steps],
            "tree": [self._item_json(item, True) for item in self.tree],
            "notes": self.notes(),
        }

    def _item_json(self, item: Item, outside: bool) -> dict[str, Any]:
        """``outside``: of all branches, where shares of log L add up."""
        if isinstance(item, Block):
            share = self.share(item.before, item.index) if outside else None
            factor = self.factor(item.before, item.index).to_json()
            inner = [self._item_json(each, outside) for each in item.items]
            path = ".".join(item.path)
            return {"block": path, "from": item.before, "to": item.index, "factor": factor, "share": share, "in": inner}
        if isinstance(item, Again):
            return {"again": item.index}
        share = self.share(item.before, item.index) if outside else None
        branches = [[self._item_json(each, False) for each in branch] for branch in item.branches]
        return {"node": item.index, "share": share, "branches": branches}


def trace_program(
    program: Program,
    weights: Mapping[str, Array],
    rules: Mapping[str, Rule],
    *,
    geometry: Geometry = "l2",
    witnesses: Mapping[str, float] | None = None,
    norms: NormTable | None = None,
) -> Trace:
    """Bound a program as :func:`~hf_lipschitz.bounds.engine.bound_program` does and write down every step.

    Args:
        program, weights, rules, geometry, witnesses, norms: as there.

    Returns:
        Trace; a bound that exceeds float64 is kept by its logarithm.

    Raises:
        KernelError: as there.
    """
    scribe = _Scribe(program)
    wrapped = cast("dict[str, Rule]", {op: _Recorder(rule, scribe) for op, rule in rules.items()})
    bound = bound_program(program, weights, wrapped, geometry=geometry, witnesses=witnesses, norms=norms)
    paths, tree = layout(program, bound.shapes)
    by_tensor = _by_tensor(bound.norms.bounds)
    steps = tuple(
        _step(index, node, paths[index], rules[node.op], scribe, bound, tuple(_norms_of(index, node, by_tensor)))
        for index, node in enumerate(program.nodes)
    )
    origin = next((str(node.attrs["space"]) for node in program.nodes if "space" in node.attrs), "model_input")
    return Trace(geometry, origin, steps, dict(program.outputs), tree)


@dataclass(frozen=True)
class _Answer:
    """What a rule said of one node; the bound is ``mantissa * 2**exponent``."""

    mantissa: float
    exponent: int
    gains: tuple[float, ...]
    formula: str
    scalars: Mapping[str, tuple[float, float]]


class _Scribe:
    """The answers by node. A node without an answer is the input, whose bound is 1."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.answers: dict[int, _Answer] = {}

    def bound(self, index: int) -> tuple[float, int]:
        """Mantissa and exponent of a node's bound."""
        answer = self.answers.get(index)
        return (1.0, 0) if answer is None else (answer.mantissa, answer.exponent)

    def magnitude(self, index: int) -> Magnitude:
        """A node's bound."""
        return Magnitude.of(*self.bound(index))

    def scaled(self, index: int) -> tuple[tuple[float, ...], int]:
        """The bounds of a node's inputs over one power of two; what would vanish is rounded up."""
        pairs = [self.bound(i) for i in self.program.nodes[index].inputs]
        top = max((exponent for mantissa, exponent in pairs if 0.0 < mantissa < math.inf), default=0)
        lifted = [(mantissa, math.ldexp(mantissa, exponent - top)) for mantissa, exponent in pairs]
        return tuple(max(value, _SMALLEST) if mantissa > 0.0 else value for mantissa, value in lifted), top


class _Recorder:
    """A rule that writes down what it answers; all else is the rule's own."""

    def __init__(self, rule: Rule, scribe: _Scribe) -> None:
        self._rule, self._scribe = rule, scribe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
        """The rule's own answer."""
        value = self._rule.lipschitz(call, geometry, incoming)
        asked, exponent, answer = incoming, 0, value
        if not (0.0 < value < math.inf and all(map(math.isfinite, incoming))):
            asked, exponent = self._scribe.scaled(call.index)
            answer = self._rule.lipschitz(call, geometry, asked)
        mantissa, shift = math.frexp(answer)
        gains = self._gains(call, geometry, len(incoming))
        self._scribe.answers[call.index] = _Answer(
            mantissa, shift + exponent, gains, _formula(gains, asked, answer), _ranges(call)
        )
        return value

    def _gains(self, call: Call, geometry: Geometry, count: int) -> tuple[float, ...]:
        """The rule's factors; of a rule that has only a formula for all inputs, its answer to each one alone."""
        try:
            return self._rule.gains(call, geometry)
        except KernelError:
            alone = ([float(i == j) for j in range(count)] for i in range(count))
            return tuple(self._rule.lipschitz(call, geometry, tuple(unit)) for unit in alone)


def _formula(gains: Sequence[float], incoming: Sequence[float], outgoing: float) -> str:
    """The first of the known formulas that gives what the rule answered."""
    products = [gain * each if gain and each else 0.0 for gain, each in zip(gains, incoming, strict=True)]
    known = {
        "sum": math.fsum(products) if all(map(math.isfinite, products)) else math.inf,
        "root": math.hypot(*products),
        "largest": max(products),
        "largest input": max(incoming),
    }
    close = (name for name, value in known.items() if math.isclose(value, outgoing, rel_tol=_SAME, abs_tol=_TINY))
    return next(close, "own")


def _ranges(call: Call) -> dict[str, tuple[float, float]]:
    return {slot: (float(np.min(each.low)), float(np.max(each.high))) for slot, each in call.scalars.items()}


def _step(
    index: int,
    node: Node,
    path: Path,
    rule: Rule,
    scribe: _Scribe,
    bound: ProgramBound,
    norms: tuple[tuple[str, NormBound], ...],
) -> Step:
    answer = scribe.answers.get(index)
    return Step(
        index=index,
        op=node.op,
        path=path,
        inputs=node.inputs,
        tensors=node.tensors,
        attrs=node.attrs,
        shape=bound.shapes[index],
        scalars=answer.scalars if answer else {},
        incoming=tuple(scribe.magnitude(i) for i in node.inputs),
        gains=answer.gains if answer else (),
        outgoing=scribe.magnitude(index),
        formula=answer.formula if answer else "own",
        size=bound.nodes[index].size,
        norms=norms,
        source=rule.source,
        warning=rule.warning,
    )


def _by_tensor(bounds: Mapping[str, NormBound]) -> dict[str, list[tuple[str, NormBound]]]:
    """Norms by the tensor they are of; labels are ``name``, ``name|abs``, or ``name|form@node`` (see Call.norm)."""
    found: dict[str, list[tuple[str, NormBound]]] = {}
    for label, bound in bounds.items():
        found.setdefault(label.partition("|")[0], []).append((label, bound))
    return found


def _norms_of(index: int, node: Node, norms: Mapping[str, list[tuple[str, NormBound]]]) -> list[tuple[str, NormBound]]:
    """The norms of a node's tensors, but for those that belong to another node."""
    every = [pair for name in dict.fromkeys(node.tensors.values()) for pair in norms.get(name, ())]
    return [(label, bound) for label, bound in every if "|" not in label or label.endswith(("|abs", f"@{index}"))]


def _listed(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return shown if len(indices) <= 8 else f"{shown} and {len(indices) - 8} more"
