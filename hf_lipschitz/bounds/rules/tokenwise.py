"""Maps of every token, or every head of a token, that lengthen none: rotation by position, projection on a ball."""

from __future__ import annotations

import math

import numpy as np

from ..rounding import Array, U, add_up, array_norm_up, gamma, mul_up, sqrt_up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of
from .attributes import integer, need, number, one_of


class Rotation(Rule):
    """Rotary positions: in every head, pair i of token n turns by the angle n base^(-2i / d_h), counted from 0.

    Pairs are (i, i + d_h/2) in layout ``half`` and (2i, 2i + 1) in layout ``interleaved``.

    Rounding. Angles are assumed to be computed in the dtype, or in float32 where it is coarser, with a power within 4
    units in the last place. With v the unit roundoff of that: base and 2i / d_h rounded move a frequency by (1 + ln
    base) v relatively, power, reciprocal and product with n by less than 11 v, so an angle by delta = (N - 1) (ln base
    + 16) v. Cosine and sine within 4 units in the last place, stored in the dtype, and two products add less than 24 u.
    """

    op = "rotation@1"
    source = "a rotation of each token; rounding: |error| <= (min(delta, 2) + 24 u) |X|, see the docstring"
    attrs = {"heads": integer(1, 4096), "base": number(1.0, 2.0**53), "layout": one_of("half", "interleaved")}

    def shape(self, call: Call) -> Shape:
        shape, heads = call.shapes[0], call.attrs["heads"]
        need(len(shape) == 2, f"rotation takes tokens, got sample shape {shape}")
        need(shape[1] % (2 * heads) == 0, f"{heads} heads of pairs do not divide {shape[1]} channels")
        return shape

    def apply(self, call: Call, *values: Array) -> Array:
        x, heads = values[0], call.attrs["heads"]
        n, pairs = x.shape[1], x.shape[2] // (2 * heads)
        frequency = x.dtype.type(call.attrs["base"]) ** (-np.arange(pairs, dtype=x.dtype) / pairs)
        angle = (np.arange(n, dtype=x.dtype)[:, None] * frequency)[:, None]
        axis, split = (3, (2, pairs)) if call.attrs["layout"] == "half" else (4, (pairs, 2))
        first, second = np.moveaxis(x.reshape(len(x), n, heads, *split), axis, 0)
        cosine, sine = np.cos(angle), np.sin(angle)
        return np.stack([first * cosine - second * sine, second * cosine + first * sine], axis=axis).reshape(x.shape)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0,)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        delta = mul_up(float(call.shapes[0][0] - 1), math.log(call.attrs["base"]) + 16.0, min(roundoff, 2.0**-24))
        return mul_up(add_up(min(delta, 2.0), 24.0 * roundoff), incoming[0].total)


class Ball(Rule):
    """z min(1, r / |z|) for every token, or for every head z of a token: the closest point of a ball of radius r >= 0.

    Rounding. A computed norm strays relatively by half the error of its sum of squares and a few u, and so does what
    comes out; squares that underflow move a norm, and with it the result, by at most sqrt(d_h) times the root of the
    least normal number; a radius that strays moves the result by as much.
    """

    op = "ball@1"
    source = "projection on a convex set (Bauschke and Combettes, Convex Analysis, proposition 4.16)"
    attrs = {"heads": integer(1, 4096)}
    scalars = ("radius",)

    def shape(self, call: Call) -> Shape:
        shape, heads, radius = call.shapes[0], call.attrs["heads"], call.scalars["radius"].low
        need(len(shape) <= 2, f"ball takes tokens, got sample shape {shape}")
        need(shape[-1] % heads == 0, f"{heads} heads do not divide {shape[-1]} channels")
        need(radius.size in (1, heads), f"scalar 'radius' needs one entry, or one a head ({heads})")
        need(bool(np.all(radius >= 0.0)), "scalar 'radius' must not be negative")
        return shape

    def apply(self, call: Call, *values: Array) -> Array:
        z = values[0].reshape(*values[0].shape[:-1], call.attrs["heads"], -1)
        norm = np.sqrt(np.sum(z * z, axis=-1, keepdims=True))
        scale = np.minimum(1.0, call.scalar("radius").reshape(-1, 1) / np.maximum(norm, 1e-300))
        return (z * scale).reshape(values[0].shape)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0,)

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        token = array_norm_up(np.broadcast_to(call.scalars["radius"].high, (call.attrs["heads"],)))
        total = mul_up(sqrt_up(float(tokens_of(call.shapes[0]))), token)
        return Size(min(token, incoming[0].token), min(total, incoming[0].total))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        shape, heads = call.shapes[0], call.attrs["heads"]
        width = shape[-1] // heads
        lost = mul_up(sqrt_up(float(width)), 2.0**-500 if roundoff == U else 2.0**-62)
        strays = mul_up(sqrt_up(float(tokens_of(shape) * heads)), add_up(call.deviations["radius"], lost))
        relative = add_up(call.arithmetic.total(width), gamma(8, roundoff))
        return add_up(mul_up(relative, add_up(self.size(call, incoming).total, strays)), strays)


RULES: tuple[Rule, ...] = (Rotation(), Ball())
