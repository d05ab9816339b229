"""Formulas of convolutions: the symbol at a rational point of the circle, and norms of taps.

The kernel's bound of the l2 norm is the supremum over all frequencies of sigma_max of the symbol, plus a stated slack
(``SLACK``). Here the supremum is bounded from below: a frequency near the maximum is looked for in floats, replaced by
a point of the circle with rational cosine and sine (t -> ((1 - t^2), 2 t) / (1 + t^2)), and the symbol there, a matrix
of complex rationals, has an exact norm. A search that missed the maximum would show as a kernel that is above by more
than its slack; a kernel that is too low shows at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tests.second_checker.exact import ONE, ZERO, Interval, euclidean, exactly, larger, root_of, smaller, total
from tests.second_checker.formula import Asked, Extent, Formula, Precision, Shape, compounded, every_token, tokens_in
from tests.second_checker.normalization import (
    STEPS,
    VANISHED,
    batch_norm_offset,
    batch_norm_scale,
    vector_norm,
)
from tests.second_checker.norms import Matrix, frobenius, scaled_rows_norm, spectral_norm

SLACK = 1.01e-4  # how far above the supremum the kernel says that its bound may lie
_GRID, _ROUNDS, _KEPT = 48, 12, 8


@dataclass(frozen=True)
class Taps:
    """A kernel of one group with non-negative factors of its rows (the sign of a row changes no norm)."""

    kernel: Matrix  # (out, in, height, width)
    rows: tuple[Interval, ...]

    def norm(self, matrix: Matrix) -> Interval:
        """sigma_max of diag(rows) (out, n)."""
        plain = all(factor == ONE for factor in self.rows)
        return spectral_norm(matrix) if plain else scaled_rows_norm(self.rows, matrix)

    def each(self) -> list[Matrix]:
        """The matrices (out, in), tap by tap."""
        return [self.kernel[:, :, i, j] for i in range(self.kernel.shape[2]) for j in range(self.kernel.shape[3])]


def phases(count: int, step: int, modulus: int) -> list[int]:
    """The residue of every tap along one axis."""
    return [i * step % modulus for i in range(count)]


def symbol_norm(taps: Taps, stride: tuple[int, int]) -> Interval:
    """sigma_max of the symbol, polyphase components of the stride beside each other, near its largest frequency."""
    point = _best_frequency(taps, stride)
    turns = [
        _circle(angle, 1 + (size - 1) // s) for angle, size, s in zip(point, taps.kernel.shape[2:], stride, strict=True)
    ]
    out, into, high, wide = taps.kernel.shape
    real = np.full((out, stride[0] * stride[1] * into), Fraction(0), dtype=object)
    imaginary = real.copy()
    for i in range(high):
        for j in range(wide):
            (a, b), (c, d) = turns[0][i // stride[0]], turns[1][j // stride[1]]
            phase = (i % stride[0]) * stride[1] + j % stride[1]
            columns = slice(phase * into, (phase + 1) * into)
            real[:, columns] += (a * c - b * d) * taps.kernel[:, :, i, j]
            imaginary[:, columns] += (a * d + b * c) * taps.kernel[:, :, i, j]
    embedded = np.block([[real, -imaginary], [imaginary, real]])
    return Taps(taps.kernel, taps.rows * 2).norm(embedded)


def _circle(angle: float, count: int) -> list[tuple[Fraction, Fraction]]:
    """Powers 0 to count - 1 of a rational point of the circle near ``angle``, as (cosine, sine)."""
    t = Fraction(math.tan(angle / 2.0)).limit_denominator(1 << 20)
    c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    powers = [(Fraction(1), Fraction(0))]
    for _ in range(count - 1):
        a, b = powers[-1]
        powers.append((a * c - b * s, a * s + b * c))
    return powers


def _best_frequency(taps: Taps, stride: tuple[int, int]) -> tuple[float, float]:
    """Floats: only where to look."""
    rows = np.array([float(factor.high) for factor in taps.rows])
    kernel = rows[:, None, None, None] * taps.kernel.astype(np.float64)
    reach = [0.0 if size <= s else math.pi for size, s in zip(kernel.shape[2:], stride, strict=True)]
    first = [side * np.linspace(-1.0, 1.0, _GRID + 1) if side else np.zeros(1) for side in reach]
    centres = _mesh(first[0], first[1])
    width = 2.0 * math.pi / _GRID
    for _ in range(_ROUNDS):
        centres = centres[np.argsort(-_float_symbols(kernel, stride, centres))[:_KEPT]]
        steps = [width * np.linspace(-1.0, 1.0, 5) if side else np.zeros(1) for side in reach]
        centres = (centres[:, None] + _mesh(steps[0], steps[1])[None]).reshape(-1, 2)
        width /= 2.0
    best = centres[_float_symbols(kernel, stride, centres).argmax()]
    return float(best[0]), float(best[1])


def _mesh(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def _float_symbols(kernel: np.ndarray, stride: tuple[int, int], points: np.ndarray) -> np.ndarray:
    """sigma_max of the symbol at many frequencies (P, 2), in floats."""
    (h, w), (s, t) = kernel.shape[2:], stride
    turns = np.exp(
        1j * (np.arange(h)[:, None] // s * points[:, 0, None, None] + np.arange(w) // t * points[:, 1, None, None])
    )
    blocks = [
        np.einsum("oihw,phw->poi", kernel[:, :, i::s, j::t], turns[:, i::s, j::t])
        for i in range(min(s, h))
        for j in range(min(t, w))
    ]
    return np.linalg.norm(np.concatenate(blocks, axis=2), 2, axis=(1, 2))


class Convolution(Formula):
    """torch's conv2d, and conv1d on images one row high."""

    slack = SLACK
    why = "the supremum over all frequencies is met by a grid and a factor sec"

    def kernel(self, a: Asked) -> Matrix:
        weight = a.tensors["weight"]
        return weight if weight.ndim == 4 else weight[:, :, None, :]

    def factors(self, a: Asked) -> list[Interval]:
        """One factor a row of the kernel."""
        return [ONE] * len(self.kernel(a))

    def groups(self, a: Asked) -> list[Taps]:
        count, factors = a.attrs["groups"], self.factors(a)
        rows = len(factors) // count
        kernels = np.split(self.kernel(a), count)
        return [Taps(k, tuple(factors[i * rows : (i + 1) * rows])) for i, k in enumerate(kernels)]

    def _geometry(self, a: Asked) -> list[tuple[int, int, int, int, int]]:
        sides = (a.attrs[key] for key in ("stride", "padding", "dilation"))
        return list(zip(a.shape[1:], self.kernel(a).shape[2:], *sides, strict=True))

    def shape(self, a: Asked) -> Shape:
        sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in self._geometry(a)]
        return (len(self.kernel(a)), *sizes)

    def residues(self, a: Asked) -> list[tuple[int, int]]:
        """For every tap, the residues modulo the stride that it reads."""
        rows, columns = (phases(k, d, s) for _, k, s, _, d in self._geometry(a))
        return [(i, j) for i in rows for j in columns]

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        if geometry == "token_max":
            return [self.gathered(a)]
        strides = [s // math.gcd(s, d) for _, _, s, _, d in self._geometry(a)]
        return [larger(*(symbol_norm(taps, (strides[0], strides[1])) for taps in self.groups(a)))]

    def gathered(self, a: Asked) -> Interval:
        """|sum_a K_a x_a| over tokens of norm one: the sum of the taps' norms, or that of all beside each other."""
        return beside(self.groups(a), [taps.each() for taps in self.groups(a)])

    def bias(self, a: Asked) -> Interval:
        return vector_norm(a, "bias")

    def at_zero(self, a: Asked) -> Extent:
        return every_token(self.shape(a), self.bias(a))

    def absolute(self, a: Asked) -> Interval:
        """The norm with absolute values of the kernel: frequency zero, where taps of one residue add up."""
        residues = self.residues(a)
        found = []
        for taps in self.groups(a):
            sums: dict[tuple[int, int], Any] = {}
            for residue, tap in zip(residues, taps.each(), strict=True):
                sums[residue] = sums.get(residue, 0) + abs(tap)
            found.append(taps.norm(np.concatenate(list(sums.values()), axis=1)))
        return larger(*found)

    def error(self, a: Asked, p: Precision) -> Interval:
        """Of one sum of products and a bias."""
        return p.dot(math.prod(self.kernel(a).shape[1:]) + 1)

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        return self.error(a, p) * (self.absolute(a) * incoming[0].total + self.at_zero(a).total)


def beside(groups: Sequence[Taps], taps: Sequence[Sequence[Matrix]]) -> Interval:
    """min(sum_a |K_a|, sqrt(T) |(K_1 ... K_T)|), every norm the largest over groups."""
    apart = total(
        larger(*(group.norm(each) for group, each in zip(groups, tap, strict=True))) for tap in zip(*taps, strict=True)
    )
    together = larger(
        *(group.norm(np.concatenate(list(each), axis=1)) for group, each in zip(groups, taps, strict=True))
    )
    return smaller(apart, root_of(len(taps[0])) * together)


class ConvolutionBatchNorm(Convolution):
    """Rows scaled by gamma / sqrt(variance + eps)."""

    def factors(self, a: Asked) -> list[Interval]:
        return [abs(each) for each in batch_norm_scale(a, "gamma")]

    def _held(self, a: Asked, slot: str) -> list[Interval]:
        count = len(self.kernel(a))
        return [exactly(abs(value)) for value in a.tensors.get(slot, [Fraction(0)] * count)]

    def at_zero(self, a: Asked) -> Extent:
        """scale (bias - mean) + beta."""
        biases = a.tensors.get("bias", [Fraction(0)] * len(self.kernel(a)))
        parts = zip(batch_norm_offset(a, "gamma", "beta"), batch_norm_scale(a, "gamma"), biases, strict=True)
        return every_token(self.shape(a), euclidean(o + s * exactly(b) for o, s, b in parts))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        kernel, x, scale = self.kernel(a), incoming[0].total, self.factors(a)
        root = root_of(tokens_in(self.shape(a)))
        raw = root_of(kernel.shape[2] * kernel.shape[3]) * frobenius(kernel) * x
        raw = raw + root * (vector_norm(a, "bias") + vector_norm(a, "mean"))
        weighed = [
            euclidean(s * each for s, each in zip(scale, self._held(a, slot), strict=True)) for slot in ("bias", "mean")
        ]
        fixed = weighed[0] + weighed[1] + vector_norm(a, "beta")
        relative = compounded(self.error(a, p), p.gamma(STEPS))
        return relative * (self.absolute(a) * x + root * fixed) + VANISHED * raw


class TransposedConvolution(Convolution):
    """The adjoint of the convolution with the kernel as stored, cropped."""

    def shape(self, a: Asked) -> Shape:
        more = a.attrs["output_padding"]
        sizes = [
            (n - 1) * s + d * (k - 1) + 1 + e - 2 * p
            for (n, k, s, p, d), e in zip(self._geometry(a), more, strict=True)
        ]
        return (self.kernel(a).shape[1] * a.attrs["groups"], *sizes)

    def gathered(self, a: Asked) -> Interval:
        """Taps of one residue meet at one pixel."""
        residues, found = self.residues(a), []
        turned = [Taps(taps.kernel, (ONE,) * taps.kernel.shape[1]) for taps in self.groups(a)]
        for residue in sorted(set(residues)):
            chosen = [
                [tap.T for at, tap in zip(residues, taps.each(), strict=True) if at == residue]
                for taps in self.groups(a)
            ]
            found.append(beside(turned, chosen))
        return larger(ZERO, *found)

    def error(self, a: Asked, p: Precision) -> Interval:
        rows, _, high, wide = self.kernel(a).shape
        products = p.dot(rows // a.attrs["groups"] * high * wide + 1)
        return compounded(products, p.gamma(high * wide + 1))


FORMULAS: dict[str, Formula] = {
    "convolution@1": Convolution(),
    "convolution_batch_norm@1": ConvolutionBatchNorm(),
    "transposed_convolution@1": TransposedConvolution(),
}
