"""The bound program: a straight-line description of the function that a model computes.

A program is a list of nodes in topological order and the indices of its outputs. Its canonical form is the order in
which a depth-first walk from the outputs (features, then logits) first finishes each node; two programs describe the
same computation if and only if their canonical JSON is equal. Node ids do not exist: an input is an index into the
list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import strict_json
from .errors import KernelError
from .rules.scalars import check_expression, expression_tensors

MAX_NODES = 20_000
OUTPUTS = ("features", "logits")
_NODE_KEYS = ("attrs", "inputs", "op", "scalars", "tensors")


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: versioned operation name, such as ``linear@1``.
        inputs: indices of earlier nodes.
        attrs: constants of class and config (JSON values), by name.
        tensors: slot of the operation -> name of a stored tensor.
        scalars: slot of the operation -> scalar expression (see rules/scalars.py).
    """

    op: str
    inputs: tuple[int, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    scalars: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def tensor_names(self) -> Iterator[str]:
        """Every stored tensor that the node reads, in slots or in expressions."""
        yield from self.tensors.values()
        for expression in self.scalars.values():
            yield from expression_tensors(expression)

    def to_json(self) -> dict[str, Any]:
        """The node as JSON values."""
        return {
            "attrs": dict(self.attrs),
            "inputs": list(self.inputs),
            "op": self.op,
            "scalars": dict(self.scalars),
            "tensors": dict(self.tensors),
        }


@dataclass(frozen=True)
class Program:
    """Nodes in topological order and the index of each output (``features``, ``logits``)."""

    nodes: tuple[Node, ...]
    outputs: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The program as JSON values: ``{"nodes": [...], "outputs": {...}}``."""
        return {"nodes": [node.to_json() for node in self.nodes], "outputs": dict(self.outputs)}

    @classmethod
    def from_json(cls, value: Any, where: str = "program") -> Program:
        """Read a program strictly.

        Raises:
            KernelError: unknown or missing keys, wrong types, an input that is not an earlier node, an unreachable
                node, or nodes that do not stand in canonical order.
        """
        value = strict_json.fields(value, ("nodes", "outputs"), where)
        items = strict_json.list_of(value["nodes"], f"{where}: nodes")
        if not 0 < len(items) <= MAX_NODES:
            raise KernelError(f"{where}: a program has 1 to {MAX_NODES} nodes, not {len(items)}")
        nodes = tuple(_read_node(item, index, where) for index, item in enumerate(items))
        outputs = strict_json.fields(value["outputs"], OUTPUTS, f"{where}: outputs")
        strict_json.integers_of(list(outputs.values()), f"{where}: outputs", 0, len(nodes) - 1)
        program = cls(nodes, {name: outputs[name] for name in OUTPUTS})
        if program.canonical() != program:
            raise KernelError(f"{where}: the nodes do not stand in canonical order, or some lead to no output")
        return program

    def canonical(self) -> Program:
        """The same computation with nodes in canonical order; nodes that lead to no output are dropped."""
        order: dict[int, int] = {}
        for name in OUTPUTS:
            stack = [(self.outputs[name], iter(self.nodes[self.outputs[name]].inputs))]
            while stack:
                index, inputs = stack[-1]
                following = next((i for i in inputs if i not in order), None)
                if following is not None:
                    stack.append((following, iter(self.nodes[following].inputs)))
                    continue
                order.setdefault(index, len(order))
                stack.pop()
        nodes = tuple(
            Node(n.op, tuple(order[i] for i in n.inputs), dict(n.attrs), dict(n.tensors), dict(n.scalars))
            for n in (self.nodes[index] for index in order)
        )
        return Program(nodes, {name: order[self.outputs[name]] for name in OUTPUTS})

    def canonical_bytes(self) -> bytes:
        """The canonical JSON bytes, by which programs are compared."""
        return strict_json.canonical(self.canonical().to_json())

    def tensor_names(self) -> set[str]:
        """All stored tensors that the program reads."""
        return {name for node in self.nodes for name in node.tensor_names()}


def _read_node(item: Any, index: int, where: str) -> Node:
    here = f"{where}: node {index}"
    item = strict_json.fields(item, _NODE_KEYS, here)
    op = item["op"]
    if not isinstance(op, str):
        raise KernelError(f"{here}: 'op' must be a string")
    here = f"{here} ({op})"
    inputs = strict_json.integers_of(item["inputs"], f"{here}: inputs", 0, index - 1)
    attrs = strict_json.object_of(item["attrs"], f"{here}: attrs")
    tensors = strict_json.strings_of(item["tensors"], f"{here}: tensors")
    scalars = strict_json.object_of(item["scalars"], f"{here}: scalars")
    for slot, expression in scalars.items():
        check_expression(expression, f"{here}: scalar {slot!r}")
    return Node(op, tuple(inputs), attrs, tensors, scalars)
