"""Formulas of pools: over all tokens, and over windows of an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from tests.second_checker.exact import ONE, Interval, exactly, root_of
from tests.second_checker.formula import Asked, Exact, Extent, Formula, Precision, Shape, channels_in, tokens_in


class TokenPool(Formula):
    """(N, d) -> (d,), 1-Lipschitz from all tokens together: sqrt(N) if each may move by one."""

    def shape(self, a: Asked) -> Shape:
        return (a.shape[1],)

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [ONE if geometry == "l2" else root_of(a.shape[0])]


class L2Pool(TokenPool):
    """y_c = sqrt(sum_n x_nc^2 + eps)."""

    def at_zero(self, a: Asked) -> Extent:
        size = exactly(a.shape[1] * Fraction(a.attrs["eps"])).sqrt()
        return Extent(size, size)

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return p.gamma(tokens_in(a.shape) + 4) * (incoming[0].total + self.at_zero(a).total)


class SumPool(TokenPool):
    """y_c = sum_n x_nc / sqrt(N)."""

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return p.gamma(tokens_in(a.shape) + 2) * incoming[0].total


class MeanPool(Formula):
    """The mean of all tokens or pixels."""

    def shape(self, a: Asked) -> Shape:
        return (channels_in(a.shape),)

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [ONE if geometry == "token_max" else ONE / root_of(tokens_in(a.shape))]

    def _terms(self, a: Asked) -> int:
        return tokens_in(a.shape)

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        relative = (p.sum(self._terms(a)) + p.gamma(3)) * (ONE + p.gamma(3))
        return relative * self.gains(a, "l2")[0] * incoming[0].total


def windows(a: Asked, axis: int) -> list[tuple[int, list[int]]]:
    """(start, pixels of the image) of every window along an axis; a last one in the padding at the end is dropped."""
    n = a.shape[1 + axis]
    kernel, stride, padding = (a.attrs[key][axis] for key in ("kernel", "stride", "padding"))
    dilation = a.attrs.get("dilation", [1, 1])[axis]
    found, start = [], -padding
    while True:
        last = start + dilation * (kernel - 1)
        overhang = last - (n + padding - 1)
        if overhang > (stride - 1 if a.attrs["ceil"] else 0) or (found and start >= n):
            return found
        found.append((start, [i for i in range(start, last + 1, dilation) if 0 <= i < n]))
        start += stride


class WindowPool(Formula):
    """A pool over windows; its shape is the number of windows along each axis."""

    def shape(self, a: Asked) -> Shape:
        return (a.shape[0], len(windows(a, 0)), len(windows(a, 1)))


class MaxPool(WindowPool, Exact):
    """An input counts once for each window that holds it; a window's tokens, or the channels, count in token_max."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        both = [[held for _, held in windows(a, axis)] for axis in (0, 1)]
        if geometry == "l2":
            times = [max(Counter(i for held in axis for i in held).values()) for axis in both]
            return [root_of(times[0] * times[1])]
        largest = [max(len(held) for held in axis) for axis in both]
        return [root_of(min(largest[0] * largest[1], a.shape[0]))]


class AveragePool(WindowPool, MeanPool):
    """A Kronecker product of two non-negative matrices: Schur's test on each."""

    def shape(self, a: Asked) -> Shape:
        return WindowPool.shape(self, a)

    def _divisor(self, a: Asked, axis: int, start: int, held: list[int]) -> int:
        if not a.attrs["count_padding"]:
            return len(held)
        end = min(start + a.attrs["kernel"][axis], a.shape[1 + axis] + a.attrs["padding"][axis])
        return end - start

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        gain = ONE
        for axis in (0, 1):
            shares = Counter[int]()
            sums = list[Fraction]()
            for start, held in windows(a, axis):
                share = Fraction(1, self._divisor(a, axis, start, held))
                sums.append(len(held) * share)
                for i in held:
                    shares[i] += share  # type: ignore[assignment]
            row, column = max(sums), Fraction(max(shares.values()))
            gain = gain * (exactly(row) if geometry == "token_max" else exactly(row * column).sqrt())
        return [gain]

    def _terms(self, a: Asked) -> int:
        return a.attrs["kernel"][0] * a.attrs["kernel"][1]


FORMULAS: dict[str, Formula] = {
    "l2_pool@1": L2Pool(),
    "sum_pool@1": SumPool(),
    "mean_pool@1": MeanPool(),
    "max_pool@1": MaxPool(),
    "average_pool@1": AveragePool(),
}
