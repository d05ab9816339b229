"""Normalisation layers: BatchNorm in evaluation mode (an affine map of each channel), LayerNorm and RMSNorm.

The last two divide by a statistic of the value itself; their constant is max |weight| / sqrt(eps), reached next to a
constant (LayerNorm) or zero (RMSNorm) token, which makes every bound that passes through them large. What they do bound
well is the size of their value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..rounding import Array, Enclosure, add_up, array_norm_up, div_up, down, gamma, mul_up, sqrt_up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of, width_of
from .attributes import need, number

UNDERFLOW = 2.0**-120  # of a factor derived from parameters, in float32 and bfloat16; what multiplies it may be large


def need_vectors(call: Call, entries: int, *slots: str) -> None:
    """Refuse stored vectors that do not have one entry a channel."""
    for slot in set(slots) & set(call.tensors):
        shape = call.tensors[slot].shape
        need(shape == (entries,), f"tensor {call.names[slot]!r} has shape {shape}, expected {(entries,)}")


@dataclass(frozen=True)
class AffineMap:
    """x -> scale x + offset channel by channel: ``scale`` of shape (channels,), and bounds of two norms: that of the
    offset, and ``size`` that of what meets in it, |scale| (|before| + |mean|) + |bias|.
    """

    scale: Enclosure
    offset: float
    size: float


@np.errstate(over="ignore", invalid="ignore")  # what overflows becomes an infinite bound, or NaN and no bound
def batch_norm_map(call: Call, channels: int, weight: str, bias: str, before: str = "") -> AffineMap:
    """Enclose a BatchNorm in evaluation mode, of x + ``before``: slots of the vectors other than the statistics."""
    need_vectors(call, channels, "mean", "variance", weight, bias)
    need(bool(np.all(call.tensors["variance"] >= 0.0)), f"tensor {call.names['variance']!r} has a negative variance")
    held = {slot: Enclosure.exactly(value) for slot, value in call.tensors.items() if value.shape == (channels,)}
    zero, one, eps = (Enclosure.exactly(np.full(channels, value)) for value in (0.0, 1.0, call.attrs["eps"]))
    scale = held.get(weight, one) / (held["variance"] + eps).sqrt()
    start, mean, end = held.get(before, zero), held["mean"], held.get(bias, zero)
    apart = add_up(*(array_norm_up(peak(each)) for each in (scale * start, scale * mean, end)))
    return AffineMap(scale, array_norm_up(peak((start - mean) * scale + end)), apart)


def peak(values: Enclosure) -> Array:
    """The largest absolute value that each entry may have."""
    return np.maximum(np.abs(values.low), np.abs(values.high))


def batch_normalized(call: Call, x: Array, weight: str, bias: str) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias along the axis after the batch of an image, else the last."""
    column = (-1, 1, 1) if x.ndim == 4 else (-1,)
    held = {slot: tensor.reshape(column) for slot, tensor in call.tensors.items() if tensor.ndim == 1}
    result = (x - held["mean"]) / np.sqrt(held["variance"] + call.attrs["eps"]) * held.get(weight, 1.0)
    return result + held[bias] if bias in held else result


class BatchNorm(Rule):
    """(x - mean) / sqrt(variance + eps) * weight + bias with stored statistics, channel by channel.

    Channels are the first axis of an image and the last one of tokens. Statistics of the batch (training mode) are no
    function of one sample and have no rule.
    """

    op = "batch_norm@1"
    source = "a diagonal map followed by a translation: sigma_max = max |weight| / sqrt(variance + eps)"
    attrs = {"eps": number(1e-12, 1e3)}
    tensors = {"mean": 1, "variance": 1, "weight": 1, "bias": 1}
    optional = frozenset({"weight", "bias"})

    steps = 12  # roundings on the way of an entry, see ``rounding``

    def shape(self, call: Call) -> Shape:
        self._map(call)  # refuses vectors that do not fit
        return call.shapes[0]

    def _map(self, call: Call) -> AffineMap:
        return batch_norm_map(call, width_of(call.shapes[0]), "weight", "bias")

    def apply(self, call: Call, *values: Array) -> Array:
        return batch_normalized(call, values[0], "weight", "bias")

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (float(np.max(peak(self._map(call).scale))),)

    def offset(self, call: Call) -> Size:
        token = self._map(call).offset
        return Size(token, mul_up(sqrt_up(float(tokens_of(call.shapes[0]))), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # scale^ = scale (1 + theta_8): eps rounded, added, the root, its reciprocal or a library's rsqrt (4), weight.
        # Both scale^ (x - mean) + bias and scale^ x + (bias - scale^ mean) then take at most 3 more roundings of each
        # term, so that gamma_12 (|scale| (|x| + |mean|) + |bias|) covers either order
        root, x = sqrt_up(float(tokens_of(call.shapes[0]))), incoming[0].total
        size = add_up(mul_up(self.gains(call, "l2")[0], x), mul_up(root, self._map(call).size))
        lost = mul_up(UNDERFLOW, add_up(x, mul_up(root, array_norm_up(call.tensors["mean"]))))
        return add_up(mul_up(gamma(self.steps, roundoff), size), lost)


class RMSNorm(Rule):
    """x / sqrt(mean(x^2) + eps) * weight + bias on the last axis of tokens of width d.

    With s = sqrt(|x|^2 / d + eps), the map x -> x / s has the Jacobian (I - x x^T / (d s^2)) / s, symmetric with
    eigenvalues in [0, 1/s], and s >= sqrt(eps), with equality at x = 0; and |x| / s < sqrt(d), whatever x is.
    """

    op = "rms_norm@1"
    source = "the Jacobian has norm 1/s <= 1/sqrt(eps), see the docstring; |y| <= sqrt(d) max |weight| + |bias|"
    warning = (
        "It multiplies the bound by max |weight| / sqrt(eps), which short or nearly constant tokens really reach: "
        "leave it out, use BatchNorm with stored statistics, or bound tokens by a ball projection instead."
    )
    attrs = {"eps": number(1e-12, 1e3)}
    tensors = {"weight": 1, "bias": 1}
    optional = frozenset({"weight", "bias"})

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) <= 2, f"the norm runs over the last axis of tokens, not of {call.shapes[0]}")
        need_vectors(call, call.shapes[0][-1], "weight", "bias")
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        x = values[0]
        result = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + call.attrs["eps"])
        return result * call.tensors.get("weight", 1.0) + call.tensors.get("bias", 0.0)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (div_up(self._peak(call), down(math.sqrt(call.attrs["eps"]))),)

    def _peak(self, call: Call) -> float:
        return float(np.max(np.abs(call.tensors.get("weight", np.ones(1)))))

    def offset(self, call: Call) -> Size:
        token = array_norm_up(call.tensors.get("bias", np.zeros(1)))
        return Size(token, mul_up(sqrt_up(float(tokens_of(call.shapes[0]))), token))

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        near, shape = super().size(call, incoming), call.shapes[0]
        far = add_up(mul_up(sqrt_up(float(shape[-1])), self._peak(call)), self.offset(call).token)
        return Size(min(near.token, far), min(near.total, mul_up(sqrt_up(float(tokens_of(shape))), far)))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # the mean of squares strays relatively by the error of a sum and two roundings, s by less with eps, the sum and
        # the root (a library's rsqrt: 4); then a quotient, weight and bias: relative to |weight x / s| + |bias|, whose
        # norm is at most the bound of the size
        error = add_up(call.arithmetic.total(call.shapes[0][-1]), gamma(16, roundoff))
        return mul_up(error, 1.0 + gamma(16, roundoff), self.size(call, incoming).total)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias on the last axis of tokens of width d.

    RMSNorm of the centred token z = x - mean(x): centring is an orthogonal projection, and var(x) = |z|^2 / d.
    """

    op = "layer_norm@1"
    source = "rms_norm@1 after an orthogonal projection"

    def apply(self, call: Call, *values: Array) -> Array:
        return super().apply(call, values[0] - np.mean(values[0], axis=-1, keepdims=True))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        """Infinite unless the variance is known to a fraction of eps: centring cancels, so no error is relative.

        Assumes of the library that mean and variance are off by at most g r and 4 g r^2, with r = |x| / sqrt(d) and g
        the relative error of a sum of d + 2 terms. Proved for the two-pass formula: |mean^ - mean| <= g r, and the
        computed sum of (x - mean^)^2 / d is var + (mean^ - mean)^2 up to g + 3u; for mean(x^2) - mean(x)^2: g r^2 + (2
        g + g^2) r^2 + u r^2; Welford's and pairwise updates have smaller published errors (Chan, Golub, LeVeque 1983,
        table 1). With e = 4 g r^2 <= eps / 2: s^ = s (1 + eta) (1 + theta), and |1/sqrt(1 - t) - 1| <= t on [0, 1/2]
        gives |z/s^ - z/s| <= |z| e / s^3 <= sqrt(d) e / (2 eps), since v^(1/2) / (v + eps)^(3/2) <= 0.385 / eps;
        |z^ - z| / s^ <= sqrt(2 / eps) (g + 3u) |x| in either order of centring and scaling; the rest is relative.
        """
        d, eps, x = call.shapes[0][-1], call.attrs["eps"], incoming[0].token
        g, scalar = add_up(call.arithmetic.total(d + 2), gamma(3, roundoff)), gamma(24, roundoff)
        variance = mul_up(div_up(mul_up(4.0, g, x, x), float(d)), 1.0 + scalar)
        if not 2.0 * variance <= eps or not scalar < 0.25:
            return math.inf
        moved = add_up(
            div_up(mul_up(sqrt_up(float(d)), variance), eps), div_up(mul_up(4.0, g, x), down(math.sqrt(eps)))
        )
        far = add_up(mul_up(sqrt_up(float(d)), self._peak(call)), self.offset(call).token)
        token = add_up(mul_up(self._peak(call), moved, 1.0 + scalar), mul_up(scalar, far))
        return mul_up(sqrt_up(float(tokens_of(call.shapes[0]))), token)


RULES: tuple[Rule, ...] = (BatchNorm(), LayerNorm(), RMSNorm())
