"""What stands for a tensor while a graph is lowered, and the rearrangements that wait until an operation needs them.

A graph reshapes and transposes far more often than the function does: a signal becomes an image of height one and
back, a permutation is undone after one layer. So a value remembers the node that holds its entries and the steps that
the graph took since; entrywise operations ignore the steps, others *settle* them into as few nodes as possible.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

Shape = tuple[int, ...]
Step = tuple[Literal["reshape", "permute"], Shape]
Order = np.ndarray


@dataclass(frozen=True)
class Value:
    """An activation.

    Attributes:
        node: index of the program's node that holds its entries.
        held: sample shape of that node's value.
        shape: shape in the graph, with the batch axis.
        steps: reshapes and permutations, batch axis included, from ``(batch, *held)`` to ``shape``.
    """

    node: int
    held: Shape
    shape: Shape
    steps: tuple[Step, ...] = ()

    def reshaped(self, shape: Shape) -> Value:
        """The same entries in row-major order in another shape; two reshapes in a row are one."""
        if shape == self.shape:
            return self
        before = self.steps[:-1] if self.steps and self.steps[-1][0] == "reshape" else self.steps
        if not before and shape == (shape[0], *self.held):
            return replace(self, shape=shape, steps=())
        return replace(self, shape=shape, steps=(*before, ("reshape", shape)))

    def permuted(self, axes: Shape) -> Value:
        """Axes in another order, as in torch."""
        axes = tuple(axis % len(self.shape) for axis in axes)
        if axes == tuple(range(len(axes))):
            return self
        return replace(self, shape=tuple(self.shape[a] for a in axes), steps=(*self.steps, ("permute", axes)))


@dataclass(frozen=True)
class Stored:
    """A tensor of the state dict; ``turned`` if the graph holds the transpose of the stored matrix."""

    name: str
    shape: Shape
    turned: bool = False


@dataclass(frozen=True)
class Scalar:
    """A scalar expression over stored tensors (see bounds/rules/scalars.py)."""

    expression: Any


@dataclass(frozen=True)
class Rearrangement:
    """A node that rearranges entries: its operation and attributes, and the sample shape that it gives."""

    op: str
    attrs: dict[str, Any]
    shape: Shape


def sample_order(value: Value, batch: int) -> Order | None:
    """Which entry of the holding node's sample stands where, row-major; None if entries leave their own sample."""
    size = math.prod(value.held)
    order = np.arange(batch * size).reshape(batch, *value.held)
    for kind, argument in value.steps:
        order = order.reshape(argument) if kind == "reshape" else order.transpose(argument)
    if order.shape[0] != batch:
        return None
    order = order.reshape(batch, size)
    first = order[0]
    return first if np.array_equal(order, first + size * np.arange(batch)[:, None]) else None


def rearrangements(value: Value, order: Order, batch: int) -> list[Rearrangement]:
    """As few nodes as we know that bring the held entries into ``order`` and the shape of the value.

    Empty where nothing need move, and where nothing known would do it.
    """
    held, target = value.held, value.shape[1:]
    identity = np.arange(math.prod(held))
    if np.array_equal(order, identity):
        return _reshape(held, target)
    for candidate, moved in _candidates(held, target, identity):
        if np.array_equal(order, moved.reshape(-1)):
            return [candidate, *_reshape(candidate.shape, target)]
    return _recorded(value, batch)


def _reshape(held: Shape, target: Shape) -> list[Rearrangement]:
    if held == target:
        return []
    flat = Rearrangement("flatten@1", {}, target)
    return [flat if len(target) == 1 else Rearrangement("reshape@1", {"shape": list(target)}, target)]


def _candidates(held: Shape, target: Shape, identity: Order) -> Iterator[tuple[Rearrangement, Order]]:
    """Patches (also of one pixel: an image as tokens), which keep tokens together, then permutations of the axes."""
    array = identity.reshape(held)
    if len(held) == 3 and target:
        (c, h, w), patch = held, math.isqrt(target[-1] // held[0])
        if patch and c * patch * patch == target[-1] and h % patch == 0 and w % patch == 0:
            tokens = array.reshape(c, h // patch, patch, w // patch, patch).transpose(1, 3, 0, 2, 4)
            shape = ((h // patch) * (w // patch), target[-1])
            yield Rearrangement("patchify@1", {"patch": patch}, shape), tokens
    if len(held) <= 3:
        for axes in itertools.permutations(range(len(held))):
            shape = tuple(held[axis] for axis in axes)
            yield Rearrangement("permute@1", {"axes": list(axes)}, shape), array.transpose(axes)


def _recorded(value: Value, batch: int) -> list[Rearrangement]:
    """The graph's own steps, if each leaves the batch in front and permutes at most three groups of axes."""
    nodes, held, shape = list[Rearrangement](), value.held, (batch, *value.held)
    for kind, argument in value.steps:
        if kind == "reshape":
            shape = argument
            continue
        groups = _groups(argument)
        if shape[0] != batch or argument[0] != 0 or len(groups) > 3:
            return []
        merged = tuple(math.prod(shape[axis] for axis in group) for group in sorted(groups))
        axes = [sorted(groups).index(group) for group in groups]
        nodes += _reshape(held, merged)
        held, shape = tuple(merged[axis] for axis in axes), tuple(shape[axis] for axis in argument)
        nodes.append(Rearrangement("permute@1", {"axes": axes}, held))
    return [*nodes, *_reshape(held, value.shape[1:])]


def _groups(axes: Shape) -> list[list[int]]:
    """Axes behind the batch in their new order, those that stay neighbours in one group: they move as one axis."""
    groups: list[list[int]] = []
    for axis in axes[1:]:
        if groups and axis == groups[-1][-1] + 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups
