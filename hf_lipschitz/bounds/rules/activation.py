"""Pointwise and sorting activations. All rules here move or negate entries, so they are exact in floating point."""

from __future__ import annotations

import numpy as np

from ..rounding import Array
from ..rule import Call, Geometry, Rule, Shape, Size
from .attributes import integer, need


class _NormPreserving(Rule):
    """1-Lipschitz token by token, hence in both geometries; f(0) = 0; no rounding.

    Channels are the last axis, so images are refused: along their last axis different tokens would be sorted together.
    """

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) <= 2, f"an activation takes tokens, got sample shape {call.shapes[0]}")
        return call.shapes[0]

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0,)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return 0.0


class MaxMin(_NormPreserving):
    """(a, b) -> (max(a, b), min(a, b)) for the two halves a, b of the channels.

    Sorting is 1-Lipschitz: the sorted vectors are the closest pairing (rearrangement inequality, <x, y> is largest
    when both are sorted), so |sort x - sort y| <= |x - y|.
    """

    op = "maxmin@1"
    source = "rearrangement inequality (Hardy, Littlewood, Polya, Inequalities, theorem 368)"

    def shape(self, call: Call) -> Shape:
        need(call.shapes[0][-1] % 2 == 0, f"MaxMin needs an even number of channels, got {call.shapes[0][-1]}")
        return super().shape(call)

    def apply(self, call: Call, *values: Array) -> Array:
        first, second = np.split(values[0], 2, axis=-1)
        return np.concatenate([np.maximum(first, second), np.minimum(first, second)], axis=-1)


class GroupSort(_NormPreserving):
    """Ascending sort inside consecutive groups of ``group`` channels."""

    op = "group_sort@1"
    source = "as maxmin@1, group by group"
    attrs = {"group": integer(2, 65536)}

    def shape(self, call: Call) -> Shape:
        d, group = call.shapes[0][-1], call.attrs["group"]
        need(d % group == 0, f"groups of {group} do not divide {d} channels")
        return super().shape(call)

    def apply(self, call: Call, *values: Array) -> Array:
        x = values[0]
        return np.sort(x.reshape(*x.shape[:-1], -1, call.attrs["group"]), axis=-1).reshape(x.shape)


class Abs(_NormPreserving):
    """|x| on the first ``channels`` channels, the identity on the rest."""

    op = "abs@1"
    source = "reverse triangle inequality, entry by entry"
    attrs = {"channels": integer(1, 2**20)}

    def shape(self, call: Call) -> Shape:
        d, channels = call.shapes[0][-1], call.attrs["channels"]
        need(channels <= d, f"abs on {channels} channels of {d}")
        return super().shape(call)

    def apply(self, call: Call, *values: Array) -> Array:
        x, channels = values[0], call.attrs["channels"]
        return np.concatenate([np.abs(x[..., :channels]), x[..., channels:]], axis=-1)


RULES: tuple[Rule, ...] = (MaxMin(), GroupSort(), Abs())
