"""Activations that sort, reflect, or have stored parameters; the pointwise ones without stand in pointwise.py.

Sorting and abs move or negate entries, so they are exact in floating point.
"""

from __future__ import annotations

import numpy as np

from ..rounding import Array, array_norm_up, mul_up, sqrt_up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of, width_of
from . import pointwise
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


class Householder(_NormPreserving):
    """z - 2 v min(<v, z>, 0) for every pair z = (a, b) of the two halves of the channels: a reflection, or nothing.

    v = (sin(t / 2), -cos(t / 2)) with one stored angle t a pair. Both pieces are isometries that agree on <v, z> = 0.

    Rounding: sine and cosine are assumed within 4 units in the last place, which moves v by 12 u, the sum by 16 u |z|
    and its reflection by 60 u |z|; a pair on the wrong side strays by twice the error of the sum.
    """

    op = "householder@1"
    source = "continuous and piecewise isometric (Singla, Singla, Feizi 2022); rounding: 64 u |X|, see the docstring"
    tensors = {"angle": 1}

    def shape(self, call: Call) -> Shape:
        d, entries = call.shapes[0][-1], call.tensors["angle"].size
        need(2 * entries == d, f"tensor {call.names['angle']!r} has {entries} angles, {d} channels need half as many")
        return super().shape(call)

    def apply(self, call: Call, *values: Array) -> Array:
        a, b = np.split(values[0], 2, axis=-1)
        sine, cosine = np.sin(0.5 * call.tensors["angle"]), np.cos(0.5 * call.tensors["angle"])
        below = 2.0 * np.minimum(a * sine - b * cosine, 0.0)
        return np.concatenate([a - below * sine, b + below * cosine], axis=-1)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return mul_up(64.0 * roundoff, incoming[0].total)


class NActivation(Rule):
    """x - 2 clip(x, s, t) with two stored numbers a channel, s the smaller: slopes 1, -1, 1.

    Channels are the first axis of an image, else the last.
    """

    op = "n_activation@1"
    source = "slopes 1 and -1, continuous (Prach and Lampert 2023); rounding: one subtraction"
    tensors = {"first": 1, "second": 1}

    def shape(self, call: Call) -> Shape:
        width = width_of(call.shapes[0])
        for slot, tensor in call.tensors.items():
            need(tensor.size == width, f"tensor {call.names[slot]!r} needs {width} entries, it has {tensor.size}")
        return call.shapes[0]

    def _clipped(self, call: Call, x: Array) -> Array:
        first, second = (call.tensors[s].reshape(-1, *[1] * (2 if x.ndim == 4 else 0)) for s in self.tensors)
        return np.clip(x, np.minimum(first, second), np.maximum(first, second))

    def apply(self, call: Call, *values: Array) -> Array:
        return values[0] - 2.0 * self._clipped(call, values[0])

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0,)

    def offset(self, call: Call) -> Size:
        token = mul_up(2.0, array_norm_up(self._clipped(call, np.zeros(width_of(call.shapes[0])))))
        return Size(token, mul_up(sqrt_up(float(tokens_of(call.shapes[0]))), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return mul_up(roundoff, self.size(call, incoming).total)


class PReLU(Rule):
    """x for x > 0, else w x with stored slopes: one, or one for each entry of the sample's first axis, as torch's."""

    op = "prelu@1"
    source = "slopes 1 and w, a diagonal map; rounding: one product"
    tensors = {"weight": 1}

    def shape(self, call: Call) -> Shape:
        first, entries = call.shapes[0][0], call.tensors["weight"].size
        need(entries in (1, first), f"tensor {call.names['weight']!r} needs 1 or {first} entries, it has {entries}")
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        slopes = call.tensors["weight"].reshape(-1, *[1] * (values[0].ndim - 2))
        return np.where(values[0] > 0.0, values[0], values[0] * slopes)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (max(1.0, float(np.max(np.abs(call.tensors["weight"])))),)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return mul_up(roundoff, self.gains(call, "l2")[0], incoming[0].total)


_STORED = (Householder(), NActivation(), PReLU())
RULES: tuple[Rule, ...] = (MaxMin(), GroupSort(), Abs(), *_STORED, *pointwise.RULES)
