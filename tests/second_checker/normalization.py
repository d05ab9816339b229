"""Formulas of normalisation layers: BatchNorm with stored statistics, RMSNorm and LayerNorm."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tests.second_checker.activation import least
from tests.second_checker.exact import INFINITE, ONE, Interval, euclidean, exactly, larger, root_of
from tests.second_checker.formula import Asked, Extent, Formula, Precision, every_token, tokens_in
from tests.second_checker.norms import frobenius

STEPS = 12  # roundings of a BatchNorm, see the rule
VANISHED = exactly(Fraction(1, 1 << 120))  # what underflows in a factor of float32


def batch_norm_scale(a: Asked, weight: str) -> list[Interval]:
    """weight / sqrt(variance + eps), channel by channel."""
    eps, count = Fraction(a.attrs["eps"]), len(a.tensors["variance"])
    factors = a.tensors.get(weight, [Fraction(1)] * count)
    roots = [exactly(variance + eps).sqrt() for variance in a.tensors["variance"]]
    return [exactly(factor) / root for factor, root in zip(factors, roots, strict=True)]


def batch_norm_offset(a: Asked, weight: str, bias: str) -> list[Interval]:
    """bias - mean scale."""
    scale = batch_norm_scale(a, weight)
    biases = a.tensors.get(bias, [Fraction(0)] * len(scale))
    means = a.tensors["mean"]
    return [exactly(b) - exactly(m) * s for b, m, s in zip(biases, means, scale, strict=True)]


def vector_norm(a: Asked, slot: str) -> Interval:
    """|v| of a stored vector; zero if it is absent."""
    return frobenius(a.tensors[slot]) if slot in a.tensors else exactly(0)


class BatchNorm(Formula):
    """A diagonal map and a translation."""

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [larger(*(abs(each) for each in batch_norm_scale(a, "weight")))]

    def at_zero(self, a: Asked) -> Extent:
        return every_token(a.shape, euclidean(batch_norm_offset(a, "weight", "bias")))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        root, scale, x = root_of(tokens_in(a.shape)), batch_norm_scale(a, "weight"), incoming[0].total
        mean = euclidean(exactly(m) * s for m, s in zip(a.tensors["mean"], scale, strict=True))
        size = self.gains(a, "l2")[0] * x + root * (mean + vector_norm(a, "bias"))
        return p.gamma(STEPS) * size + VANISHED * (x + root * vector_norm(a, "mean"))


class RMSNorm(Formula):
    """x / sqrt(mean x^2 + eps) w + b: steepest at 0, and never longer than sqrt(d) max |w| + |b|."""

    def _peak(self, a: Asked) -> Interval:
        return exactly(max(map(abs, a.tensors["weight"]))) if "weight" in a.tensors else ONE

    def _farthest(self, a: Asked) -> Interval:
        return root_of(a.shape[-1]) * self._peak(a) + vector_norm(a, "bias")

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [self._peak(a) / exactly(Fraction(a.attrs["eps"])).sqrt()]

    def at_zero(self, a: Asked) -> Extent:
        return every_token(a.shape, vector_norm(a, "bias"))

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        return least(super().extent(a, incoming), every_token(a.shape, self._farthest(a)))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        relative = (p.sum(a.shape[-1]) + p.gamma(16)) * (ONE + p.gamma(16))
        return relative * self.extent(a, incoming).total


class LayerNorm(RMSNorm):
    """RMSNorm after an orthogonal projection; centring cancels, so errors count against sqrt(eps)."""

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        d, eps, x = a.shape[-1], exactly(Fraction(a.attrs["eps"])), incoming[0].token
        g, rest = p.sum(d + 2) + p.gamma(3), p.gamma(24)
        variance = exactly(4) * g * x.square() / exactly(d) * (ONE + rest)
        if variance.infinite or rest.infinite or 2 * variance.low > eps.high or rest.low >= Fraction(1, 4):
            return INFINITE
        moved = root_of(d) * variance / eps + exactly(4) * g * x / eps.sqrt()
        token = self._peak(a) * moved * (ONE + rest) + rest * self._farthest(a)
        return root_of(tokens_in(a.shape)) * token


FORMULAS: dict[str, Formula] = {"batch_norm@1": BatchNorm(), "rms_norm@1": RMSNorm(), "layer_norm@1": LayerNorm()}
