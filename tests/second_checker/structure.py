"""Formulas of inputs, rearrangements, mixing of tokens, offsets, scales and residual sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.second_checker.exact import INFINITE, ONE, Interval, exactly, larger, root_of, smaller
from tests.second_checker.formula import Asked, Exact, Extent, Formula, Precision, Shape, channels_in, every_token
from tests.second_checker.norms import frobenius, largest_row_sum, spectral_norm


class Input(Exact):
    """A vector of n entries in [0, 1] has norm at most sqrt(n); other spaces promise nothing."""

    def shape(self, a: Asked) -> Shape:
        return tuple(a.attrs["shape"])

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        if a.attrs["space"] != "pixels[0,1]":
            return Extent(INFINITE, INFINITE)
        shape = self.shape(a)
        return Extent(root_of(channels_in(shape)), root_of(math.prod(shape)))


class Rearrangement(Exact):
    """A permutation of entries. Source tokens of every output token are counted on an array of token numbers."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        """The operation on an array of one sample."""
        raise LookupError("no meaning")

    def shape(self, a: Asked) -> Shape:
        return self.moved(a, np.zeros(a.shape, dtype=int)).shape

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        if geometry == "l2":
            return [ONE]
        moved = tokens_first(self.moved(a, token_numbers(a.shape)))
        return [root_of(max(len({*row.tolist()} - {-1}) for row in moved))]


def token_numbers(shape: Shape) -> np.ndarray:
    """Every entry of a sample replaced by the number of its token."""
    if len(shape) == 1:
        return np.zeros(shape, dtype=int)
    if len(shape) == 2:
        return np.repeat(np.arange(shape[0])[:, None], shape[1], axis=1)
    return np.repeat(np.arange(shape[1] * shape[2]).reshape(1, *shape[1:]), shape[0], axis=0)


def tokens_first(value: np.ndarray) -> np.ndarray:
    """A sample as (tokens, width)."""
    if value.ndim == 3:
        return value.reshape(value.shape[0], -1).T
    return value.reshape(-1, value.shape[-1])


class Patchify(Rearrangement):
    """Patches in row-major order, entries in (channel, row, column) order."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        p = a.attrs["patch"]
        corners = [(i, j) for i in range(0, x.shape[1], p) for j in range(0, x.shape[2], p)]
        return np.stack([x[:, i : i + p, j : j + p].ravel() for i, j in corners])


class PatchMerge(Rearrangement):
    """f x f neighbouring tokens become one."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        f, grid = a.attrs["factor"], x.reshape(a.attrs["height"], a.attrs["width"], -1)
        corners = [(i, j) for i in range(0, grid.shape[0], f) for j in range(0, grid.shape[1], f)]
        return np.stack([grid[i : i + f, j : j + f].ravel() for i, j in corners])


class Shift(Rearrangement):
    """Four groups of channels move by one cell of a grid, around its edges."""

    def moved(self, a: Asked, x: np.ndarray) -> np.ndarray:
        h, w, m = (a.attrs[key] for key in ("height", "width", "moved"))
        result, grid = x.reshape(h, w, -1).copy(), x.reshape(h, w, -1)
        for i in range(h):
            for j in range(w):
                for group, (k, n) in enumerate(((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))):
                    channels = slice(group * m, (group + 1) * m)
                    result[i, j, channels] = grid[k % h, n % w, channels]
        return result.reshape(x.shape)


class TokenMixing(Formula):
    """Y = U X: sigma_max(U); the largest absolute row sum in token_max."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        weight = a.tensors["weight"]
        return [spectral_norm(weight) if geometry == "l2" else largest_row_sum(weight)]

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return p.dot(a.shape[0]) * spectral_norm(abs(a.tensors["weight"])) * incoming[0].total


class Offset(Formula):
    """x + t: a translation, and one rounded addition an entry."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [ONE]

    def at_zero(self, a: Asked) -> Extent:
        offset = a.tensors["offset"]
        if a.attrs["axis"] == "channel":
            return every_token(a.shape, frobenius(offset))
        if a.attrs["axis"] == "entry":
            # an image's largest pixel is bounded by the whole; tokens are read one by one
            rows = list(offset.reshape(a.shape)) if len(a.shape) == 2 else [offset]
            return Extent(larger(*(frobenius(row) for row in rows)), frobenius(offset))
        width = root_of(channels_in(a.shape))
        return Extent(width * exactly(max(abs(offset))), width * frobenius(offset))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return exactly(p.unit) * (incoming[0].total + self.at_zero(a).total)


class Scale(Formula):
    """s x; the float factor strays from s, and the product is rounded."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [abs(a.scalars["factor"][0])]

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        stray = a.strays["factor"]
        factor = abs(a.scalars["factor"][0]) + stray
        return (exactly(p.unit) * factor + stray) * incoming[0].total


class Residual(Formula):
    """(1 - a) x + a y; for 0 <= a <= 1 also at most the larger branch."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        weight = a.scalars["weight"][0]
        return [abs(ONE - weight), abs(weight)]

    def lipschitz(self, a: Asked, geometry: str, incoming: Sequence[Interval]) -> Interval:
        summed, weight = super().lipschitz(a, geometry, incoming), a.scalars["weight"][0]
        return smaller(summed, larger(*incoming)) if weight.low >= 0 and weight.high <= 1 else summed

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        stray = a.strays["weight"]
        keep, take = (gain + stray for gain in self.gains(a, "l2"))
        x, y = (each.total for each in incoming)
        return p.gamma(3) * (keep * x + take * y) + stray * (x + y)


class Normalize(Formula):
    """(x - mean) / std on every channel: 1 / min std."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [exactly(1 / min(Fraction(value) for value in a.attrs["std"]))]

    def at_zero(self, a: Asked) -> Extent:
        pairs = zip(a.attrs["mean"], a.attrs["std"], strict=True)
        ratios = np.array([Fraction(mean) / Fraction(std) for mean, std in pairs], dtype=object)
        return every_token(a.shape, frobenius(ratios))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        mean = every_token(a.shape, frobenius(np.array([Fraction(m) for m in a.attrs["mean"]], dtype=object)))
        return self.gains(a, "l2")[0] * p.gamma(6) * (incoming[0].total + mean.total)


FORMULAS: dict[str, Formula] = {
    "input@1": Input(),
    "patchify@1": Patchify(),
    "patch_merge@1": PatchMerge(),
    "shift@1": Shift(),
    "token_mixing@1": TokenMixing(),
    "offset@1": Offset(),
    "scale@1": Scale(),
    "residual@1": Residual(),
    "normalize@1": Normalize(),
}
