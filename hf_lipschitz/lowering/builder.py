"""Collects the nodes of a program while a graph is walked, and refuses with the module that the walk stands at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.lowering.export import BATCH, ROOT
from hf_lipschitz.lowering.refusal import DEFAULT, PARAMETRIZED, packet, place, refusal
from hf_lipschitz.lowering.values import Rearrangement, Scalar, Shape, Stored, Value, rearrangements, sample_order


class Builder:
    """Nodes so far, and the call of the graph that is being lowered (``at``)."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.shapes: list[Shape] = []  # sample shapes of the nodes
        self.at: torch.fx.Node | None = None

    @property
    def shape(self) -> Shape:
        """The shape, batch included, of what the present call gives."""
        assert self.at is not None
        value = self.at.meta["val"]
        return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()

    @property
    def signal(self) -> bool:
        """Whether the present call gives signals (B, C, L)."""
        assert self.at is not None
        value = self.at.meta["val"]
        return (value if isinstance(value, torch.Tensor) else value[0]).ndim == 3

    @property
    def operation(self) -> str:
        """The overload that the present call names, such as ``relu.default``."""
        return name_of(self.at) if self.at is not None else ""

    def refuse(self, why: str = DEFAULT[0], instead: str = DEFAULT[1]) -> NoReturn:
        """Refuse the present call."""
        where = place(self.at.meta, ROOT) if self.at is not None else "the model"
        raise refusal(where, packet(self.operation), why, instead)

    def need(self, condition: bool, why: str, instead: str = DEFAULT[1]) -> None:
        """Refuse the present call unless ``condition`` holds."""
        if not condition:
            self.refuse(why, instead)

    def add(
        self,
        op: str,
        *inputs: Value,
        shape: Shape,
        attrs: Mapping[str, Any] | None = None,
        tensors: Mapping[str, str | None] | None = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> Value:
        """Append a node on settled values; ``shape`` is that of its sample. Tensor slots that are None are left out."""
        assert not any(each.steps for each in inputs)
        named = {slot: name for slot, name in (tensors or {}).items() if name is not None}
        indices = tuple(each.node for each in inputs)
        self.nodes.append(Node(op, indices, dict(attrs or {}), named, dict(scalars or {})))
        self.shapes.append(shape)
        return Value(len(self.nodes) - 1, shape, (BATCH, *shape))

    def entrywise(self, op: str, x: Value, **parts: Any) -> Value:
        """Append a node that treats every entry alike: what waits to be rearranged goes on waiting."""
        held = Value(x.node, x.held, (BATCH, *x.held))
        return Value(self.add(op, held, shape=x.held, **parts).node, x.held, x.shape, x.steps)

    def settle(self, x: Value) -> Value:
        """The same value, rearranged by nodes now."""
        if not x.steps:
            return x
        order = sample_order(x, BATCH)
        if order is None:
            self.refuse(
                f"its input, of shape {x.shape} for a batch of {BATCH}, does not keep the batch as its leading axis",
                "leave that axis alone, so that every sample is computed by itself",
            )
        nodes = rearrangements(x, order, BATCH)
        moved = not np.array_equal(order, np.arange(order.size))
        self.need(bool(nodes) or not moved, "its input moves the batch axis away and back", "leave that axis alone")
        result = Value(x.node, x.held, (BATCH, *x.held))
        for each in nodes:
            result = self._rearranged(each, result)
        return result

    def _rearranged(self, step: Rearrangement, x: Value) -> Value:
        return self.add(step.op, x, shape=step.shape, attrs=step.attrs)

    def tokens(self, x: Value) -> Value:
        """Settled as tokens, the last axis being channels: (d,) or (N, d)."""
        if len(x.shape) == 2 and x.shape[0] == BATCH:
            return self.settle(x)
        d = x.shape[-1]
        count, rest = divmod(math.prod(x.shape[:-1]), BATCH)
        self.need(rest == 0, f"its input of shape {x.shape} does not keep the batch of {BATCH} apart", "keep it apart")
        return self.settle(x.reshaped((BATCH, count, d)))

    def image(self, x: Value) -> Value:
        """Settled as an image (C, H, W); a signal (C, L) has height one, a vector (C,) one pixel."""
        self.need(len(x.shape) <= 4, f"it takes images or signals, its input has shape {x.shape}")
        shape = x.shape if len(x.shape) == 4 else (*x.shape[:2], 1, x.shape[2] if len(x.shape) == 3 else 1)
        return self.settle(x.reshaped(shape))

    def stored(self, value: Any, role: str) -> Stored:
        """The stored tensor behind an argument of the present call, unchanged but for views."""
        if isinstance(value, Stored):
            return value
        kind = "another activation" if isinstance(value, Value) else "no stored tensor"
        self.refuse(f"its {role} is {kind}", "read the tensor from a parameter or a persistent buffer")

    def activation(self, value: Any) -> Value:
        """The activation behind an argument of the present call."""
        if not isinstance(value, Value):
            self.refuse("it computes a weight from stored tensors", PARAMETRIZED)
        return value

    def name(self, value: Any, role: str) -> str | None:
        """The name of a stored tensor, or None for None."""
        return None if value is None else self.stored(value, role).name


def name_of(node: torch.fx.Node) -> str:
    """``aten.relu.default`` -> ``relu.default``; the plain name of anything that is no aten operation."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, operation = str(target).partition(".")
        return operation if namespace == "aten" else str(target)
    return getattr(target, "__name__", str(target))


def expression(value: Any) -> Any | None:
    """The scalar expression of a number, a scalar, or a stored tensor of one entry; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, Scalar):
        return value.expression
    if isinstance(value, Stored) and math.prod(value.shape) == 1:
        return ["tensor", value.name]
    return None
