"""Formulas of movements of entries, branches, rotations and balls."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.second_checker.activation import least
from tests.second_checker.elementary import log
from tests.second_checker.exact import ONE, Interval, euclidean, exactly, larger, root_of, smaller
from tests.second_checker.formula import DOUBLE, Asked, Exact, Extent, Formula, Precision, Shape, every_token, tokens_in
from tests.second_checker.norms import frobenius
from tests.second_checker.structure import Rearrangement


class Embedding(Exact):
    """Any tokens no longer than the longest row plus the slack."""

    def shape(self, a: Asked) -> Shape:
        return a.attrs["length"], a.tensors["weight"].shape[1]

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        longest = larger(*(frobenius(row) for row in a.tensors["weight"]))
        return every_token(self.shape(a), longest + exactly(Fraction(a.attrs["slack"])))


class PixelUnshuffle(Rearrangement):
    """Every f x f pixels become channels, in (channel, row, column) order."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        f = a.attrs["factor"]
        return np.stack([x[c, i::f, j::f] for c in range(len(x)) for i in range(f) for j in range(f)])


class PixelShuffle(Rearrangement):
    """The inverse."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        f = a.attrs["factor"]
        result = np.zeros((len(x) // (f * f), x.shape[1] * f, x.shape[2] * f), dtype=x.dtype)
        for channel in range(len(x)):
            c, i, j = channel // (f * f), channel // f % f, channel % f
            result[c, i::f, j::f] = x[channel]
        return result


class Reshape(Rearrangement):
    """Row-major order stays."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        return x.reshape(a.attrs["shape"])


class Flatten(Rearrangement):
    """One token."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        return x.ravel()


class Permute(Rearrangement):
    """Axes in another order."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        return np.transpose(x, a.attrs["axes"])


class Slice(Rearrangement):
    """A part along one axis."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        return np.take(x, range(a.attrs["start"], a.attrs["stop"]), axis=a.attrs["axis"])


def _source(index: int, size: int, mode: str) -> int:
    """The pixel that a place outside the image shows; -1 for a zero."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return -1
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    return -index if index < 0 else 2 * (size - 1) - index


class Pad(Rearrangement):
    """Pixels around an image; a pixel that appears m times counts sqrt(m)."""

    def _places(self, a: Asked, axis: int) -> list[int]:
        size = a.shape[1 + axis]
        places = range(-a.attrs["before"][axis], size + a.attrs["after"][axis])
        return [_source(place, size, a.attrs["mode"]) for place in places]

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        rows, columns = self._places(a, 0), self._places(a, 1)
        return np.stack(
            [np.stack([np.full(len(x), -1) if -1 in (i, j) else x[:, i, j] for j in columns], axis=1) for i in rows],
            axis=1,
        )

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        if geometry == "token_max":
            return super().gains(a, geometry)
        numbers = self.moved(a, np.arange(a.shape[0] * a.shape[1] * a.shape[2]).reshape(a.shape))
        return [root_of(int(np.bincount(numbers[numbers >= 0]).max()))]


class Add(Formula):
    """x + y."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [ONE, ONE]

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(p.unit) * (incoming[0].total + incoming[1].total)


class Concatenate(Formula):
    """(x, y): Pythagoras, unless no token has entries of both."""

    def shape(self, a: Asked) -> Shape:
        axis = a.attrs["axis"]
        sides = [shape[axis] for shape in a.shapes]
        return (*a.shape[:axis], sum(sides), *a.shape[axis + 1 :])

    def lipschitz(self, a: Asked, geometry: str, incoming: Sequence[Interval]) -> Interval:
        channels = 0 if len(a.shape) == 3 else len(a.shape) - 1
        return larger(*incoming) if geometry == "token_max" and a.attrs["axis"] != channels else euclidean(incoming)

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(0)


class Rotation(Exact):
    """An isometry of every token; angles stray with the position."""

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        fine = min(p.unit, Fraction(1, 1 << 24))
        delta = exactly((a.shape[0] - 1) * fine) * (log(exactly(Fraction(a.attrs["base"]))) + exactly(16))
        return (smaller(delta, exactly(2)) + exactly(24 * p.unit)) * incoming[0].total


class Ball(Exact):
    """The closest point of a ball, for every head of every token."""

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        return least(incoming[0], every_token(a.shape, euclidean(a.spread("radius", a.attrs["heads"]))))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        heads = a.attrs["heads"]
        width = a.shape[-1] // heads
        lost = root_of(width) * exactly(Fraction(1, 1 << (500 if p == DOUBLE else 62)))
        strays = root_of(tokens_in(a.shape) * heads) * (a.strays["radius"] + lost)
        relative = p.sum(width) + p.gamma(8)
        return relative * (self.extent(a, incoming).total + strays) + strays


FORMULAS: dict[str, Formula] = {
    "embedding@1": Embedding(),
    "pixel_unshuffle@1": PixelUnshuffle(),
    "pixel_shuffle@1": PixelShuffle(),
    "reshape@1": Reshape(),
    "flatten@1": Flatten(),
    "permute@1": Permute(),
    "slice@1": Slice(),
    "pad@1": Pad(),
    "add@1": Add(),
    "concatenate@1": Concatenate(),
    "rotation@1": Rotation(),
    "ball@1": Ball(),
}
