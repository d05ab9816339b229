"""Pooling: over all tokens, (N, d) -> (d,), and over windows of an image, channel by channel."""

from __future__ import annotations

import math

import numpy as np

from ..rounding import Array, add_up, div_up, gamma, mul_up, sqrt_up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of
from .attributes import need, number, one_of
from .convolution import pair


class _Pool(Rule):
    """A pool that is 1-Lipschitz from all tokens together; N tokens that each move by one move sqrt(N) together."""

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 2, f"pooling takes tokens, got sample shape {call.shapes[0]}")
        return (call.shapes[0][1],)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0 if geometry == "l2" else sqrt_up(float(tokens_of(call.shapes[0]))),)


class L2Pool(_Pool):
    """y_c = sqrt(sum_n x_nc^2 + eps): the norm of the vector (x_1c, ..., x_Nc, sqrt(eps)), so 1-Lipschitz channel by
    channel.
    """

    op = "l2_pool@1"
    source = "reverse triangle inequality, channel by channel"
    attrs = {"eps": number(1e-12, 1.0)}

    def apply(self, call: Call, *values: Array) -> Array:
        return np.sqrt(np.sum(values[0] * values[0], axis=1) + call.attrs["eps"])

    def offset(self, call: Call) -> Size:
        size = sqrt_up(mul_up(float(call.shapes[0][1]), call.attrs["eps"]))
        return Size(size, size)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # N squares, N additions, eps rounded, a root: relative error below gamma_{N+4} of the exact pool of the
        # computed input; a square that underflows moves a root of at least sqrt(eps) by far less than the engine's
        # underflow term
        return mul_up(
            gamma(tokens_of(call.shapes[0]) + 4, roundoff), add_up(incoming[0].total, self.offset(call).total)
        )


class SumPool(_Pool):
    """y_c = sum_n x_nc / sqrt(N): the product with a unit vector."""

    op = "sum_pool@1"
    source = "Cauchy-Schwarz: |sum_n x_n| <= sqrt(N) |X|_F"

    def apply(self, call: Call, *values: Array) -> Array:
        return np.sum(values[0], axis=1) / np.sqrt(float(values[0].shape[1]))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # N - 1 additions, sqrt(N) rounded, a division: gamma_{N+2} sum_n |x_nc| / sqrt(N) <= gamma_{N+2} |x_c|
        return mul_up(gamma(tokens_of(call.shapes[0]) + 2, roundoff), incoming[0].total)


class MeanPool(Rule):
    """The mean of all N tokens, or of all pixels of an image, channel by channel: one token."""

    op = "mean_pool@1"
    source = "|sum_n x_n| / N <= |X|_F / sqrt(N) (Cauchy-Schwarz), and <= max_n |x_n|"

    def shape(self, call: Call) -> Shape:
        shape = call.shapes[0]
        need(len(shape) > 1, f"a mean pool takes tokens or an image, got sample shape {shape}")
        return (shape[0 if len(shape) == 3 else 1],)

    def apply(self, call: Call, *values: Array) -> Array:
        return np.mean(values[0], axis=(2, 3) if values[0].ndim == 4 else 1)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.0 if geometry == "token_max" else sqrt_up(div_up(1.0, float(tokens_of(call.shapes[0])))),)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # a sum, and a quotient by N or a product with 1/N: relative to sum_n |x_nc| / N
        error = add_up(call.arithmetic.total(tokens_of(call.shapes[0])), gamma(3, roundoff))
        return mul_up(error, 1.0 + gamma(3, roundoff), self.gains(call, "l2")[0], incoming[0].total)


class _WindowPool(Rule):
    """A pool over windows of an image that are products of an interval of rows and one of columns, so that it works
    along one axis, then along the other. Padding never counts as an input, so a window must hold at least one.
    """

    attrs = {"kernel": pair(1), "stride": pair(1), "padding": pair(0), "ceil": one_of(True, False)}

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 3, f"a pool over windows takes an image, got sample shape {call.shapes[0]}")
        return call.shapes[0][0], len(self._windows(call, 0)), len(self._windows(call, 1))

    def _windows(self, call: Call, axis: int) -> list[Array]:
        """The inputs that each window along one axis (0 the height) holds; as in torch, with ``ceil`` the last window
        may hang over the end, but must start before the padding there.
        """
        n, (k, s, p) = call.shapes[0][1 + axis], (call.attrs[key][axis] for key in ("kernel", "stride", "padding"))
        d = call.attrs.get("dilation", (1, 1))[axis]
        room = n + 2 * p - d * (k - 1) - 1
        need(room >= 0, f"a window that spans {d * (k - 1) + 1} pixels exceeds {n} + 2 x {p}")
        count = (room + (s - 1 if call.attrs["ceil"] else 0)) // s + 1
        count -= (count - 1) * s >= n + p
        need(count <= 2**14 and count * k <= 2**20, f"{count} windows of {k} pixels are too many")
        spans: list[Array] = [np.arange(start, start + d * k, d) for start in range(-p, count * s - p, s)]
        held: list[Array] = [span[(span >= 0) & (span < n)] for span in spans]
        need(all(each.size for each in held), f"a window of {k} pixels holds padding alone: use less than {p}")
        return held


class MaxPool(_WindowPool):
    """The largest entry of each window, channel by channel; padding counts as -inf.

    y_w - y'_w is at most the largest |x - x'| in window w. ``l2``: the square is at most the sum of squares there, and
    an input is counted once for each window that holds it. ``token_max``: a channel moves by at most its largest move
    in the window, so |y - y'|^2 is at most C squares of tokens, and at most the sum over the pixels of the window.
    """

    op = "max_pool@1"
    source = "|max x - max x'| <= max |x - x'|; windows that hold an input, and min(pixels of a window, channels)"
    attrs = {**_WindowPool.attrs, "dilation": pair(1)}

    def apply(self, call: Call, *values: Array) -> Array:
        rows, columns = self._windows(call, 0), self._windows(call, 1)
        y = np.stack([values[0][:, :, held].max(axis=2) for held in rows], axis=2)
        return np.stack([y[..., held].max(axis=3) for held in columns], axis=3)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        windows = [self._windows(call, axis) for axis in (0, 1)]
        if geometry == "token_max":
            return (sqrt_up(float(min(math.prod(max(map(len, held)) for held in windows), call.shapes[0][0]))),)
        return (sqrt_up(float(math.prod(int(np.bincount(np.concatenate(held)).max()) for held in windows))),)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return 0.0


class AveragePool(_WindowPool):
    """The mean of each window, channel by channel: of the inputs it holds, or with ``count_padding`` their sum divided
    by the pixels of the window inside the padded image.

    The operator is a Kronecker product of two non-negative matrices, one an axis, with entries 1 / divisor. The norm of
    each is at most sqrt(largest row sum x largest column sum) (Schur), in ``token_max`` at most the largest row sum.
    """

    op = "average_pool@1"
    source = "Schur's test on each axis; a mean of tokens is no longer than the longest"
    attrs = {**_WindowPool.attrs, "count_padding": one_of(True, False)}

    def _matrix(self, call: Call, axis: int) -> list[tuple[Array, int]]:
        """For each window along one axis: the inputs it holds, and the divisor."""
        windows = self._windows(call, axis)
        if not call.attrs["count_padding"]:
            return [(held, len(held)) for held in windows]
        k, s, p = (call.attrs[key][axis] for key in ("kernel", "stride", "padding"))
        return [(held, min(k, call.shapes[0][1 + axis] + 2 * p - i * s)) for i, held in enumerate(windows)]

    def apply(self, call: Call, *values: Array) -> Array:
        y = np.stack([values[0][:, :, held].sum(axis=2) / d for held, d in self._matrix(call, 0)], axis=2)
        return np.stack([y[..., held].sum(axis=3) / d for held, d in self._matrix(call, 1)], axis=3)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        gain = 1.0
        for matrix in (self._matrix(call, axis) for axis in (0, 1)):
            row = max(div_up(float(len(held)), float(divisor)) for held, divisor in matrix)
            inputs = np.concatenate([held for held, _ in matrix])
            shares = np.repeat([1.0 / divisor for _, divisor in matrix], [len(held) for held, _ in matrix])
            column = mul_up(float(np.bincount(inputs, shares).max()), 1.0 + 2.0 * gamma(len(matrix) + 1))
            gain = mul_up(gain, row if geometry == "token_max" else sqrt_up(mul_up(row, column)))
        return (gain,)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # as mean_pool@1, with the sum over one window
        error = add_up(call.arithmetic.total(math.prod(call.attrs["kernel"])), gamma(3, roundoff))
        return mul_up(error, 1.0 + gamma(3, roundoff), self.gains(call, "l2")[0], incoming[0].total)


RULES: tuple[Rule, ...] = (L2Pool(), SumPool(), MeanPool(), MaxPool(), AveragePool())
