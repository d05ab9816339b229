"""Where embeddings enter, rearrangements of entries, and branches."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..rounding import Array, add_up, gamma, mul_up, norm_up, sqrt_up, up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of, width_of
from . import tokenwise
from .attributes import integer, list_of, need, number, one_of
from .structure import Rearrangement

_Padding = Literal["constant", "reflect", "edge", "wrap"]
_PADDINGS: dict[str, _Padding] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class Embedding(Rule):
    """Where perturbations of a text enter: a sequence (N, d) of token embeddings, rows of the stored (V, d) table.

    The lookup itself is not part of the function: an input is any sequence whose tokens are no longer than the longest
    row plus ``slack``, which is how far a token may be moved.
    """

    op = "embedding@1"
    source = "definition: |row + e| <= max |row| + slack for |e| <= slack"
    arity = 0
    attrs = {"length": integer(1, 65536), "slack": number(0.0), "space": one_of("embeddings")}
    tensors = {"weight": 2}

    def shape(self, call: Call) -> Shape:
        return call.attrs["length"], call.tensors["weight"].shape[1]

    def apply(self, call: Call, *values: Array) -> Array:
        need(values[0].shape[1:] == self.shape(call), f"the input has sample shape {values[0].shape[1:]}")
        return values[0]

    @np.errstate(over="ignore")  # what overflows becomes an infinite size
    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        # as array_norm_up for all rows at once: sums of d squares, of which those that underflow are added back
        (n, d), weight = self.shape(call), call.tensors["weight"]
        longest = math.sqrt(float(np.max(np.einsum("vd,vd->v", weight, weight)))) * (1.0 + 2.0 * gamma(d + 2))
        token = add_up(up(longest + d * 2.0**-500), float(call.attrs["slack"]))
        return Size(token, mul_up(sqrt_up(float(n)), token))


class PixelUnshuffle(Rearrangement):
    """(C, H, W) -> (C f f, H/f, W/f): f x f pixels become one, channels in (channel, row, column) order."""

    op = "pixel_unshuffle@1"
    source = "a permutation of entries; an output pixel gathers f^2 pixels"
    attrs = {"factor": integer(1, 4096)}

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 3, f"pixel_unshuffle takes an image, got sample shape {call.shapes[0]}")
        (c, h, w), f = call.shapes[0], call.attrs["factor"]
        need(h % f == 0 and w % f == 0, f"a factor of {f} does not divide an image of {h} x {w}")
        return c * f * f, h // f, w // f

    def apply(self, call: Call, *values: Array) -> Array:
        (b, c, h, w), f = values[0].shape, call.attrs["factor"]
        split = values[0].reshape(b, c, h // f, f, w // f, f)
        return split.transpose(0, 1, 3, 5, 2, 4).reshape(b, *self.shape(call))

    def _token_gain(self, call: Call) -> float:
        return float(call.attrs["factor"])


class PixelShuffle(Rearrangement):
    """(C f f, H, W) -> (C, H f, W f): the inverse of pixel_unshuffle."""

    op = "pixel_shuffle@1"
    source = "a permutation of entries; an output pixel holds entries of one pixel"
    attrs = {"factor": integer(1, 4096)}

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 3, f"pixel_shuffle takes an image, got sample shape {call.shapes[0]}")
        (c, h, w), f = call.shapes[0], call.attrs["factor"]
        need(c % (f * f) == 0, f"a factor of {f} needs a multiple of {f * f} channels, got {c}")
        return c // (f * f), h * f, w * f

    def apply(self, call: Call, *values: Array) -> Array:
        (b, _, h, w), f = values[0].shape, call.attrs["factor"]
        return values[0].reshape(b, -1, f, f, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(b, *self.shape(call))


class Reshape(Rearrangement):
    """The same entries in row-major order, in another sample shape."""

    op = "reshape@1"
    source = "|y_n|^2 <= sum over the distinct source tokens of |x_m|^2; how many there are: see gathered"
    attrs = {"shape": list_of(integer(1))}

    def shape(self, call: Call) -> Shape:
        shape = tuple(call.attrs["shape"])
        need(len(shape) <= 3, f"a value has at most 3 dimensions beside the batch, not {len(shape)}")
        need(math.prod(shape) == math.prod(call.shapes[0]), f"sample shape {call.shapes[0]} does not fit into {shape}")
        return shape

    def apply(self, call: Call, *values: Array) -> Array:
        return values[0].reshape(len(values[0]), *self.shape(call))

    def _token_gain(self, call: Call) -> float:
        return sqrt_up(float(gathered(call.shapes[0], self.shape(call))))


class Flatten(Reshape):
    """All entries as one token, in row-major order."""

    op = "flatten@1"
    source = "as reshape@1: one token gathers them all"
    attrs = {}

    def shape(self, call: Call) -> Shape:
        return (math.prod(call.shapes[0]),)


class Permute(Rearrangement):
    """Axes of the sample in another order: axis i of the result is axis ``axes[i]`` of the input."""

    op = "permute@1"
    source = "an output token runs along one axis of the input, on which lie all channels of a token, or as many tokens"
    attrs = {"axes": list_of(integer(0, 2))}

    def shape(self, call: Call) -> Shape:
        axes, shape = list[int](call.attrs["axes"]), call.shapes[0]
        need(sorted(axes) == list(range(len(shape))), f"axes {axes} are not those of sample shape {shape}")
        return tuple(shape[axis] for axis in axes)

    def apply(self, call: Call, *values: Array) -> Array:
        return values[0].transpose(0, *(axis + 1 for axis in call.attrs["axes"]))

    def _token_gain(self, call: Call) -> float:
        channel = _channel_axis(call.shapes[0])
        running = int(call.attrs["axes"][channel])
        return 1.0 if running == channel else sqrt_up(float(call.shapes[0][running]))


class Slice(Rearrangement):
    """Entries ``start`` to ``stop`` (without it) along one axis of the sample."""

    op = "slice@1"
    source = "a selection of entries"
    attrs = {"axis": integer(0, 2), "start": integer(0), "stop": integer(1)}

    def shape(self, call: Call) -> Shape:
        axis, start, stop = (int(call.attrs[name]) for name in self.attrs)
        shape = call.shapes[0]
        fits = axis < len(shape) and start < stop <= shape[axis]
        need(fits, f"entries {start} to {stop} along axis {axis} are not all in sample shape {shape}")
        return (*shape[:axis], stop - start, *shape[axis + 1 :])

    def apply(self, call: Call, *values: Array) -> Array:
        axis, start, stop = (call.attrs[name] for name in self.attrs)
        return values[0][(slice(None),) * (axis + 1) + (slice(start, stop),)]


class Pad(Rearrangement):
    """Pixels added around an image: zeros, or repeated ones as by torch's ``reflect``, ``replicate`` and ``circular``.

    ``before`` and ``after`` count them for height and width.
    """

    op = "pad@1"
    source = "a pixel that appears m times counts m times: sqrt(max m) in l2, m counted in rows times columns"
    attrs = {"before": list_of(integer(0, 65536)), "after": list_of(integer(0, 65536)), "mode": one_of(*_PADDINGS)}

    def _places(self, call: Call) -> list[Array]:
        """For every row, and every column, of the result: where it comes from, counted from 1; 0 is padding."""
        mode, places = call.attrs["mode"], list[Array]()
        for size, *pads in zip(call.shapes[0][1:], call.attrs["before"], call.attrs["after"], strict=True):
            most = {"reflect": size - 1, "circular": size}.get(mode, 65536)
            need(max(pads) <= most, f"{mode!r} adds at most {most} pixels on either side of {size}, not {max(pads)}")
            places.append(np.pad(np.arange(1, size + 1), pads, mode=_PADDINGS[mode]))
        return places

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 3, f"pad takes an image, got sample shape {call.shapes[0]}")
        need(len(call.attrs["before"]) == len(call.attrs["after"]) == 2, "pad needs two numbers before, and two after")
        return (call.shapes[0][0], *map(len, self._places(call)))

    def apply(self, call: Call, *values: Array) -> Array:
        rows, columns = self._places(call)
        return np.pad(values[0], ((0, 0), (0, 0), (1, 0), (1, 0)))[:, :, rows[:, None], columns]

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        times = [int(np.bincount(places)[1:].max()) for places in self._places(call)]
        return (1.0 if geometry == "token_max" else sqrt_up(float(math.prod(times))),)


class Add(Rule):
    """x + y."""

    op = "add@1"
    source = "triangle inequality; one rounded addition an entry"
    arity = 2

    def shape(self, call: Call) -> Shape:
        need(call.shapes[0] == call.shapes[1], f"the branches have shapes {call.shapes[0]} and {call.shapes[1]}")
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        return values[0] + values[1]

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return 1.0, 1.0

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return mul_up(roundoff, add_up(*(each.total for each in incoming)))


class Concatenate(Rule):
    """x and y beside each other along one axis of the sample."""

    op = "concatenate@1"
    source = "|(x, y)|^2 = |x|^2 + |y|^2; along an axis of tokens, no token has entries of both"
    arity = 2
    attrs = {"axis": integer(0, 2)}

    def shape(self, call: Call) -> Shape:
        (first, second), axis = call.shapes, int(call.attrs["axis"])
        fits = axis < len(first) and (*first[:axis], *first[axis + 1 :]) == (*second[:axis], *second[axis + 1 :])
        need(fits and len(first) == len(second), f"shapes {first} and {second} do not fit along axis {axis}")
        return (*first[:axis], first[axis] + second[axis], *first[axis + 1 :])

    def apply(self, call: Call, *values: Array) -> Array:
        return np.concatenate(values, axis=call.attrs["axis"] + 1)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return 1.0, 1.0

    def lipschitz(self, call: Call, geometry: Geometry, incoming: tuple[float, ...]) -> float:
        apart = geometry == "token_max" and call.attrs["axis"] != _channel_axis(call.shapes[0])
        return max(incoming) if apart else norm_up(*incoming)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return 0.0


def _channel_axis(shape: Shape) -> int:
    """The axis of a sample along which the entries of one token run."""
    return 0 if len(shape) == 3 else len(shape) - 1


def gathered(source: Shape, result: Shape) -> int:
    """Bound how many tokens of ``source`` meet in one token of ``result``: the same entries in row-major order.

    Source an image of T pixels: entry e lies in pixel e mod T. A result's token takes entries at steps of S (the pixels
    of an image; else S = 1), which visit T / gcd(T, S) pixels in turn. Source and result tokens of d and w entries: a
    run of w entries that starts at a multiple of w. Otherwise, no more than there are tokens, or entries of a token.
    """
    count, width = tokens_of(source), width_of(result)
    if len(source) == 3:
        return min(width, count // math.gcd(count, tokens_of(result) if len(result) == 3 else 1))
    if len(source) == len(result) == 2 and source[1] % width == 0:
        return 1
    if len(source) == len(result) == 2:
        return width // source[1] if width % source[1] == 0 else min(count, (width - 2) // source[1] + 2)
    return min(count, width)


_MOVES = (PixelUnshuffle(), PixelShuffle(), Reshape(), Flatten(), Permute(), Slice(), Pad())
RULES: tuple[Rule, ...] = (Embedding(), *_MOVES, Add(), Concatenate(), *tokenwise.RULES)
