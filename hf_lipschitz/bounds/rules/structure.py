"""Input, rearrangements of entries, mixing of tokens, and combinations of branches."""

from __future__ import annotations

import math

import numpy as np

from ..rounding import Array, add_up, array_norm_up, gamma, mul_up, sqrt_up, up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of, width_of
from .attributes import integer, list_of, need, one_of


class Input(Rule):
    """Where perturbations enter: one array of the given sample shape.

    In ``pixels[0,1]`` every entry lies in [0, 1], which bounds the size of the input; the other spaces promise nothing.
    """

    op = "input@1"
    source = "definition; a vector of n entries in [0, 1] has norm at most sqrt(n)"
    arity = 0
    attrs = {"shape": list_of(integer(1, 65536)), "space": one_of("pixels[0,1]", "model_input", "embeddings")}

    def shape(self, call: Call) -> Shape:
        shape = tuple(call.attrs["shape"])
        need(len(shape) <= 3, f"an input has at most 3 dimensions beside the batch, not {len(shape)}")
        return shape

    def apply(self, call: Call, *values: Array) -> Array:
        need(values[0].shape[1:] == self.shape(call), f"the input has sample shape {values[0].shape[1:]}")
        return values[0]

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        if call.attrs["space"] != "pixels[0,1]":
            return Size(math.inf, math.inf)
        shape = self.shape(call)
        return Size(sqrt_up(float(width_of(shape))), sqrt_up(float(math.prod(shape))))


class Rearrangement(Rule):
    """Entries are moved, never changed: exact in floating point, and an isometry in ``l2``."""

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0 if geometry == "l2" else self._token_gain(call),)

    def _token_gain(self, call: Call) -> float:
        return 1.0

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return 0.0


class Patchify(Rearrangement):
    """(C, H, W) -> (H/p * W/p, C p p): non-overlapping patches in row-major order, entries in (channel, row, column)
    order.
    """

    op = "patchify@1"
    source = (
        "a permutation of entries; a patch gathers p^2 pixels, so its norm is at most p times the largest pixel norm"
    )
    attrs = {"patch": integer(1, 4096)}

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 3, f"patchify takes an image, got sample shape {call.shapes[0]}")
        (c, h, w), p = call.shapes[0], call.attrs["patch"]
        need(h % p == 0 and w % p == 0, f"a patch of {p} does not divide an image of {h} x {w}")
        return (h // p) * (w // p), c * p * p

    def apply(self, call: Call, *values: Array) -> Array:
        x, p = values[0], call.attrs["patch"]
        b, c, h, w = x.shape
        return x.reshape(b, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)

    def _token_gain(self, call: Call) -> float:
        return float(call.attrs["patch"])


class PatchMerge(Rearrangement):
    """(H W, d) -> (H/f * W/f, f f d): f x f neighbouring tokens become one, in (row, column, channel) order."""

    op = "patch_merge@1"
    source = "a permutation of entries; a merged token gathers f^2 tokens"
    attrs = {"height": integer(1, 65536), "width": integer(1, 65536), "factor": integer(1, 64)}

    def shape(self, call: Call) -> Shape:
        h, w, f = call.attrs["height"], call.attrs["width"], call.attrs["factor"]
        need(len(call.shapes[0]) == 2 and call.shapes[0][0] == h * w, f"a {h} x {w} grid needs {h * w} tokens")
        need(h % f == 0 and w % f == 0, f"a factor of {f} does not divide a grid of {h} x {w}")
        return (h // f) * (w // f), f * f * call.shapes[0][1]

    def apply(self, call: Call, *values: Array) -> Array:
        x, h, w, f = values[0], call.attrs["height"], call.attrs["width"], call.attrs["factor"]
        b, _, d = x.shape
        return x.reshape(b, h // f, f, w // f, f, d).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, f * f * d)

    def _token_gain(self, call: Call) -> float:
        return float(call.attrs["factor"])


class Shift(Rearrangement):
    """Circular shifts of four groups of ``moved`` channels by one cell of a grid: down, up, right, left; others stay.

    In ``token_max`` an output token gathers channels of as many tokens as there are distinct offsets.
    """

    op = "shift@1"
    source = "a permutation of entries; |y_n|^2 <= sum over the distinct source tokens of |x_m|^2"
    attrs = {"height": integer(1, 65536), "width": integer(1, 65536), "moved": integer(1, 65536)}

    def shape(self, call: Call) -> Shape:
        h, w, moved = call.attrs["height"], call.attrs["width"], call.attrs["moved"]
        need(len(call.shapes[0]) == 2 and call.shapes[0][0] == h * w, f"a {h} x {w} grid needs {h * w} tokens")
        need(4 * moved <= call.shapes[0][1], f"four groups of {moved} channels do not fit in {call.shapes[0][1]}")
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        b, n, d = values[0].shape
        x, m = values[0].reshape(b, call.attrs["height"], call.attrs["width"], d), call.attrs["moved"]
        parts = [np.roll(x[..., i * m : (i + 1) * m], step, axis) for i, (step, axis) in enumerate(_SHIFTS)]
        return np.concatenate([*parts, x[..., 4 * m :]], axis=-1).reshape(b, n, d)

    def _token_gain(self, call: Call) -> float:
        h, w = call.attrs["height"], call.attrs["width"]
        offsets = {(step % h, 0) if axis == 1 else (0, step % w) for step, axis in _SHIFTS}
        if 4 * call.attrs["moved"] < call.shapes[0][1]:
            offsets.add((0, 0))
        return sqrt_up(float(len(offsets)))


_SHIFTS = ((1, 1), (-1, 1), (1, 2), (-1, 2))  # (step, axis of a (batch, row, column, channel) array)


class TokenMixing(Rule):
    """(N, d) -> (N, d): Y = U X with a stored N x N matrix U."""

    op = "token_mixing@1"
    source = "|UX|_F <= sigma_max(U) |X|_F; |sum_j U_ij x_j| <= sum_j |U_ij| max_j |x_j|"
    tensors = {"weight": 2}

    def shape(self, call: Call) -> Shape:
        n = call.shapes[0][0]
        need(len(call.shapes[0]) == 2, f"token mixing takes tokens, got sample shape {call.shapes[0]}")
        shape = call.tensors["weight"].shape
        need(shape == (n, n), f"tensor {call.names['weight']!r} has shape {shape}, expected {(n, n)}")
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        return np.matmul(call.tensors["weight"], values[0])

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        if geometry == "l2":
            return (call.norm("weight"),)
        weight = np.abs(call.tensors["weight"])
        return (mul_up(float(np.max(weight.sum(axis=1))), 1.0 + 2.0 * gamma(weight.shape[1])),)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        absolute = call.norm("weight", "abs", lambda: np.abs(call.tensors["weight"]))
        return mul_up(call.dot(call.shapes[0][0]), absolute, incoming[0].total)


class Offset(Rule):
    """x + t, or x - t if ``negative``: a stored tensor with one number a channel (bias, running mean), a token
    (position), or an entry of the sample.
    """

    op = "offset@1"
    source = "a translation; one rounded addition an entry"
    attrs = {"axis": one_of("channel", "token", "entry"), "negative": one_of(True, False)}
    tensors = {"offset": 0}

    def shape(self, call: Call) -> Shape:
        shape, given, axis = call.shapes[0], call.tensors["offset"].shape, call.attrs["axis"]
        need(axis != "token" or len(shape) == 2, f"an offset along the token axis does not fit sample shape {shape}")
        expected = {"channel": (width_of(shape),), "token": (shape[0],), "entry": shape}[axis]
        fits = tuple(n for n in given if n > 1) == tuple(
            n for n in expected if n > 1
        )  # such as (1, N, d) or (1, C, 1, 1)
        need(fits, f"tensor {call.names['offset']!r} has shape {given}, expected {expected}")
        return shape

    def apply(self, call: Call, *values: Array) -> Array:
        offset = self._spread(call)
        return values[0] - offset if call.attrs["negative"] else values[0] + offset

    def _spread(self, call: Call) -> Array:
        """The offset, ready to broadcast over the sample."""
        axis, shape = call.attrs["axis"], call.shapes[0]
        columns = axis == "token" or (axis == "channel" and len(shape) == 3)
        wanted = (-1, *[1] * (len(shape) - 1)) if columns else shape if axis == "entry" else (-1,)
        return call.tensors["offset"].reshape(wanted)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0,)

    def offset(self, call: Call) -> Size:
        offset, shape, axis = call.tensors["offset"], call.shapes[0], call.attrs["axis"]
        norm = array_norm_up(offset)
        if axis == "channel":
            return Size(norm, mul_up(sqrt_up(float(tokens_of(shape))), norm))
        if axis == "entry":
            return Size(max(map(array_norm_up, self._spread(call))) if len(shape) == 2 else norm, norm)
        width = sqrt_up(float(width_of(shape)))
        return Size(mul_up(width, float(np.max(np.abs(offset)))), mul_up(width, norm))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return mul_up(roundoff, add_up(incoming[0].total, self.offset(call).total))


class Scale(Rule):
    """x times a scalar expression with one entry."""

    op = "scale@1"
    source = "|s x| = |s| |x|; the float factor strays from the expression by at most its enclosed deviation"
    scalars = ("factor",)

    def apply(self, call: Call, *values: Array) -> Array:
        return values[0] * call.scalar("factor")

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (call.magnitude("factor"),)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        computed = add_up(call.magnitude("factor"), call.deviations["factor"])
        return mul_up(incoming[0].total, add_up(mul_up(roundoff, computed), call.deviations["factor"]))


class Residual(Rule):
    """(1 - a) x + a y with a scalar expression a of one entry."""

    op = "residual@1"
    source = "triangle inequality; for 0 <= a <= 1 a convex combination is at most the larger of the two"
    arity = 2
    scalars = ("weight",)

    def shape(self, call: Call) -> Shape:
        need(call.shapes[0] == call.shapes[1], f"the branches have shapes {call.shapes[0]} and {call.shapes[1]}")
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        a = call.scalar("weight")
        return (1.0 - a) * values[0] + a * values[1]

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        call.magnitude("weight")  # refuses weights of more than one entry
        low, high = call.scalars["weight"].low.item(), call.scalars["weight"].high.item()
        return max(abs(up(1.0 - low)), abs(up(high - 1.0))), max(abs(low), abs(high))

    def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
        total = super().lipschitz(call, geometry, incoming)
        weight = call.scalars["weight"]
        return min(total, max(incoming)) if weight.low.item() >= 0.0 and weight.high.item() <= 1.0 else total

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        deviation = call.deviations["weight"]
        keep, take = (add_up(gain, deviation) for gain in self.gains(call, "l2"))
        local = mul_up(gamma(3, roundoff), add_up(mul_up(keep, incoming[0].total), mul_up(take, incoming[1].total)))
        return add_up(local, mul_up(deviation, add_up(incoming[0].total, incoming[1].total)))


RULES: tuple[Rule, ...] = (Input(), Patchify(), PatchMerge(), Shift(), TokenMixing(), Offset(), Scale(), Residual())
