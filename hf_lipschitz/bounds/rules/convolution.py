"""Convolutions of images: plain, followed by a BatchNorm, and transposed.

An image (C, H, W) holds one token a pixel. A kernel of three dimensions (one spatial axis) is read as one row high.
Every bound rests on the *taps* K_a, the matrices (out, in) of a kernel, one for each offset a, and on this: the
operator on images is a block (a crop) of one on all of Z^2, or for circular padding of one on a torus.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..rounding import Array, U, add_up, array_norm_up, gamma, largest, mul_up, sqrt_up
from ..rule import Call, Check, Geometry, Rule, Shape, Size, tokens_of
from ..spectral import NormBound, spectral_norm_upper
from .attributes import integer, list_of, need, one_of
from .convolution_norm import convolution_norm_upper
from .normalization import UNDERFLOW, AffineMap, BatchNorm, batch_norm_map, batch_normalized, need_vectors


def pair(least: int) -> Check:
    """Check for the two numbers of an attribute that counts pixels: along the height and along the width."""
    return lambda value: list_of(integer(least, 4096))(value) and len(value) == 2


class Convolution(Rule):
    """y[j] = sum_a K_a x[stride j + dilation a - padding] + bias: torch's conv2d, and conv1d on images one row high.

    ``l2``. With zero padding of any size, y is a crop of the operator on Z^2, whose norm is the supremum of its symbol
    (Parseval on the polyphase components of x). Dilation d and stride s along an axis: with g = gcd(d, s), only pixels
    of one residue modulo g are read, which leaves dilation d/g and stride s/g; a dilation prime to the stride permutes
    the s frequencies that alias, so that the supremum is that of the undilated kernel at stride s/g. Circular padding:
    if s divides the size n and 2 padding <= dilation (k - 1), the outputs are distinct ones among the n/s of a circular
    convolution, whose symbol is the same at finitely many frequencies; otherwise pixels are repeated: refused.

    ``token_max``. |sum_a K_a x_a| is at most sum_a |K_a| max_a |x_a|, and at most |(K_1 ... K_T)| sqrt(T) max_a |x_a|.

    Groups act on orthogonal subspaces: the maximum over them, of every norm of a matrix.
    """

    op = "convolution@1"
    source = "supremum of the symbol over all frequencies; triangle inequality over taps; see the docstring"
    attrs = {"stride": pair(1), "padding": pair(0), "dilation": pair(1), "groups": integer(1, 2**20)}
    attrs = {**attrs, "padding_mode": one_of("zeros", "circular")}
    tensors = {"weight": 0, "bias": 1}
    optional = frozenset({"bias"})

    def shape(self, call: Call) -> Shape:
        self._check(call, 1)
        axes = self._axes(call)
        for n, k, s, p, d in axes:
            need(n + 2 * p > d * (k - 1), f"a kernel that spans {d * (k - 1) + 1} pixels exceeds {n} + 2 x {p}")
            need(
                call.attrs["padding_mode"] == "zeros" or p == 0 or (2 * p <= d * (k - 1) and n % s == 0),
                f"circular padding of {p} on {n} pixels may use a pixel twice, which the norm of the kernel does not "
                f"bound, unless 2 padding <= dilation (kernel - 1) = {d * (k - 1)} and the stride {s} divides {n}: "
                f"pad with zeros, or by a circular pad@1 node before an unpadded convolution",
            )
        return len(call.tensors["weight"]), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    def _check(self, call: Call, side: int) -> None:
        """Refuse tensors that do not fit an input on side 0 (rows of the kernel) or 1 (its columns)."""
        shape, weight, groups = call.shapes[0], call.tensors["weight"].shape, call.attrs["groups"]
        need(len(shape) == 3, f"a convolution takes an image, got sample shape {shape}")
        fits = len(weight) in (3, 4) and weight[0] % groups == 0 and (weight[0], weight[1] * groups)[side] == shape[0]
        need(fits, f"tensor {call.names['weight']!r} of shape {weight} in {groups} groups does not fit {shape}")
        need_vectors(call, (weight[0], weight[1] * groups)[1 - side], "bias")

    def _axes(self, call: Call) -> list[tuple[int, int, int, int, int]]:
        """For height and width: size of the input, kernel, stride, padding, dilation."""
        pairs = (call.attrs[key] for key in ("stride", "padding", "dilation"))
        return list(zip(call.shapes[0][1:], self._stored(call).shape[2:], *pairs, strict=True))

    def _stored(self, call: Call) -> Array:
        weight = call.tensors["weight"]
        return weight if weight.ndim == 4 else weight[:, :, None]

    def _kernel(self, call: Call) -> tuple[Array, float]:
        """The kernel (rows, columns / groups, height, width) in float64, and a bound of the sum of the Frobenius norms
        of the taps of what it lacks; each norm taken here moves by no more than that.
        """
        return self._stored(call), 0.0

    def _taps(self, call: Call, kernel: Array) -> Array:
        """(groups, rows / groups, columns / groups, taps)."""
        return kernel.reshape(call.attrs["groups"], -1, kernel.shape[1], kernel.shape[2] * kernel.shape[3])

    def _phases(self, call: Call, taps: Array) -> list[Array]:
        """The taps by the residue, modulo the stride, of the pixels that they read (transposed: that they write)."""
        (_, h, s_h, _, d_h), (_, w, s_w, _, d_w) = self._axes(call)
        phase = (np.arange(h)[:, None] * d_h % s_h * s_w + np.arange(w) * d_w % s_w).ravel()
        return [taps[..., phase == each] for each in np.unique(phase)]

    def _seen(self, call: Call, image: Array, high: int, wide: int) -> Iterator[tuple[Array, Array]]:
        """Each tap, and its view of a padded image."""
        (_, h, s_h, _, d_h), (_, w, s_w, _, d_w) = self._axes(call)
        taps = self._taps(call, self._stored(call))
        for tap, (a, b) in enumerate(np.ndindex(h, w)):
            yield taps[..., tap], image[:, :, a * d_h :: s_h, b * d_w :: s_w][:, :, :high, :wide]

    def apply(self, call: Call, *values: Array) -> Array:
        (p_h, p_w), (out, high, wide), b = call.attrs["padding"], self.shape(call), len(values[0])
        mode = "wrap" if call.attrs["padding_mode"] == "circular" else "constant"
        x = np.pad(values[0], ((0, 0), (0, 0), (p_h, p_h), (p_w, p_w)), mode=mode)
        result = np.zeros((b, out, high, wide), dtype=x.dtype)
        for tap, seen in self._seen(call, x, high, wide):
            result += np.matmul(tap, seen.reshape(b, len(tap), -1, high * wide)).reshape(result.shape)
        return result + call.tensors.get("bias", np.zeros(1))[:, None, None]

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        kernel, slip = self._kernel(call)
        if geometry == "token_max":
            norm = call.norm_of("weight", "taps", lambda _: NormBound(self._token_gain(call, kernel), "taps"))
            return (add_up(norm, slip),)
        high, wide = (s // math.gcd(s, d) for _, _, s, _, d in self._axes(call))

        def bound(witness: float | None) -> NormBound:
            groups = call.attrs["groups"]
            return convolution_norm_upper(kernel, stride=(high, wide), groups=groups, witness=witness)

        return (add_up(call.norm_of("weight", "convolution", bound), slip),)

    def _token_gain(self, call: Call, kernel: Array) -> float:
        return _gathered(self._taps(call, kernel))

    def offset(self, call: Call) -> Size:
        return self._everywhere(call, array_norm_up(call.tensors.get("bias", np.zeros(1))))

    def _everywhere(self, call: Call, token: float) -> Size:
        """The size of a vector that stands at every pixel of the result."""
        return Size(token, mul_up(sqrt_up(float(tokens_of(self.shape(call)))), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        size = add_up(mul_up(self._absolute(call), incoming[0].total), self.offset(call).total)
        return mul_up(self._error(call, roundoff), size)

    def _error(self, call: Call, roundoff: float) -> float:
        """The relative error of one sum of products and a bias."""
        return call.dot(self._stored(call)[0].size + 1)

    def _absolute(self, call: Call) -> float:
        """Bound the l2 norm of the operator with the absolute values of the kernel: the symbol of its polyphase
        components is largest at frequency 0 (Perron), where taps of one phase add up.
        """
        kernel, slip = self._kernel(call)
        sums = [np.abs(taps).sum(axis=-1) for taps in self._phases(call, self._taps(call, kernel))]
        form, width = "absolute", 1.0 + 2.0 * gamma(kernel.shape[2] * kernel.shape[3])
        norm = call.norm_of("weight", form, lambda _: NormBound(_largest(np.concatenate(sums, axis=-1)), form))
        return add_up(mul_up(norm, width), slip)


class ConvolutionBatchNorm(Convolution):
    """A convolution and a BatchNorm in evaluation mode (slots ``gamma``, ``beta``, ``mean``, ``variance``) in one norm:
    that of the kernel K' with rows scale_c K_c, scale = gamma / sqrt(variance + eps), computed in float64.

    What the computed K' lacks, |K| (half the width of the enclosure of scale) + u |K'|, is bounded entry by entry. A
    kernel of T taps has sum_a |E_a|_F <= sqrt(T) |E|_F, which bounds what it adds to any norm here. The forward in
    question computes the convolution, then BatchNorm.
    """

    op = "convolution_batch_norm@1"
    source = "as convolution@1, with the kernel of the composition; |K'| <= |fl(K')| + |fl(K') - K'|"
    attrs = {**Convolution.attrs, **BatchNorm.attrs}
    tensors = {"weight": 0, "bias": 1, "gamma": 1, "beta": 1, "mean": 1, "variance": 1}
    optional = frozenset({"bias", "gamma", "beta"})

    def shape(self, call: Call) -> Shape:
        shape = super().shape(call)
        self._map(call)  # refuses vectors that do not fit
        return shape

    def _map(self, call: Call) -> AffineMap:
        return batch_norm_map(call, len(call.tensors["weight"]), "gamma", "beta", "bias")

    def apply(self, call: Call, *values: Array) -> Array:
        return batch_normalized(call, super().apply(call, *values), "gamma", "beta")

    @np.errstate(over="ignore", invalid="ignore")  # a kernel that overflows has no norm: refused there
    def _kernel(self, call: Call) -> tuple[Array, float]:
        stored, scale = self._stored(call), self._map(call).scale
        middle = scale.middle()[:, None, None, None]
        folded, width = middle * stored, np.maximum(scale.high - scale.middle(), scale.middle() - scale.low)
        lacks = np.abs(stored) * width[:, None, None, None] + 2.0 * U * np.abs(folded) + 2.0**-1070
        return folded, mul_up(sqrt_up(float(stored[0, 0].size)), array_norm_up(lacks), 1.0 + 16.0 * U)

    def offset(self, call: Call) -> Size:
        return self._everywhere(call, self._map(call).offset)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # with A = |K| |x| + |bias|, the convolution is off by dot A and its computed value at most (1 + dot) A; then
        # BatchNorm adds gamma_12 (|scale| (its value + |mean|) + |beta|): see batch_norm@1
        weight, fixed = call.tensors["weight"], self._everywhere(call, self._map(call).size).total
        crude = mul_up(sqrt_up(float(weight[0, 0].size)), array_norm_up(weight), incoming[0].total)
        bias = add_up(*(array_norm_up(call.tensors.get(slot, np.zeros(1))) for slot in ("bias", "mean")))
        raw = add_up(crude, self._everywhere(call, bias).total)
        if not raw <= largest(roundoff):  # the convolution itself may overflow, however small the scale
            return math.inf
        size = add_up(mul_up(self._absolute(call), incoming[0].total), fixed)
        dot, steps = self._error(call, roundoff), gamma(BatchNorm.steps, roundoff)
        return add_up(mul_up(add_up(dot, steps, mul_up(dot, steps)), size), mul_up(UNDERFLOW, raw))


class TransposedConvolution(Convolution):
    """The adjoint of a zero-padded convolution: torch's conv_transpose2d, weight (in, out / groups, height, width).

    Each input pixel i adds K_a^T x[i] to pixel stride i + dilation a - padding. Without padding this is the adjoint of
    a crop of the convolution on Z^2 with the kernel as stored, so that the norm of that bounds it; padding crops the
    result, and ``output_padding`` crops less at the end, where it may also append zeros. In ``token_max`` the taps
    that meet at one pixel are those of one residue of dilation a modulo the stride.

    Rounding: a library may round the products of one tap to the dtype, and add taps in it.
    """

    op = "transposed_convolution@1"
    source = "an operator and its adjoint have the same norm; a crop has norm 1; see the docstring"
    attrs = {**Convolution.attrs, "output_padding": pair(0), "padding_mode": one_of("zeros")}

    def shape(self, call: Call) -> Shape:
        self._check(call, 0)
        sizes = [full - 2 * p for full, p in zip(self._full(call), call.attrs["padding"], strict=True)]
        need(min(sizes) > 0, f"padding of {call.attrs['padding']} leaves nothing of {self._full(call)} pixels")
        return call.tensors["weight"].shape[1] * call.attrs["groups"], *sizes

    def _full(self, call: Call) -> list[int]:
        """Height and width before the padding is cropped."""
        more = call.attrs["output_padding"]
        return [(n - 1) * s + d * (k - 1) + 1 + e for (n, k, s, _, d), e in zip(self._axes(call), more, strict=True)]

    def apply(self, call: Call, *values: Array) -> Array:
        (p_h, p_w), (h, w), (b, _, n, m) = call.attrs["padding"], self._full(call), values[0].shape
        result = np.zeros((b, self.shape(call)[0], h, w), dtype=values[0].dtype)
        for tap, seen in self._seen(call, result, n, m):
            seen += np.matmul(tap.swapaxes(1, 2), values[0].reshape(b, len(tap), -1, n * m)).reshape(seen.shape)
        return result[:, :, p_h : h - p_h, p_w : w - p_w] + call.tensors.get("bias", np.zeros(1))[:, None, None]

    def _token_gain(self, call: Call, kernel: Array) -> float:
        return max(map(_gathered, self._phases(call, self._taps(call, kernel).swapaxes(1, 2))))

    def _error(self, call: Call, roundoff: float) -> float:
        taps = self._taps(call, self._stored(call))
        dot, sums = call.dot(taps[0, :, 0].size + 1), gamma(taps.shape[-1] + 1, roundoff)
        return add_up(dot, sums, mul_up(dot, sums))


def _gathered(taps: Array) -> float:
    """Bound |sum_a K_a x_a| for tokens x_a of norm at most 1, with taps (groups, out, in, number)."""
    alone = add_up(*(_largest(taps[..., each]) for each in range(taps.shape[-1])))
    return min(alone, mul_up(sqrt_up(float(taps.shape[-1])), _largest(taps.reshape(*taps.shape[:2], -1))))


def _largest(blocks: Array) -> float:
    """Bound the largest spectral norm of a stack of matrices; one whose entries are too small is not looked at."""
    best, reach = 0.0, np.abs(blocks).max(axis=(1, 2)) * (math.sqrt(blocks[0].size) * (1.0 + 4.0 * U))
    for index in np.argsort(-reach):
        if reach[index] > best:
            best = max(best, spectral_norm_upper(blocks[index]).value)
    return best


RULES: tuple[Rule, ...] = (Convolution(), ConvolutionBatchNorm(), TransposedConvolution())
