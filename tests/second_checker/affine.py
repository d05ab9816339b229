"""Formulas of matrix products: linear layers and the head with rows of unit norm."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tests.second_checker.exact import Interval, euclidean, exactly, larger
from tests.second_checker.formula import Asked, Extent, Formula, Precision, Shape, compounded, every_token
from tests.second_checker.norms import frobenius, scaled_rows_norm, spectral_norm


class Linear(Formula):
    """x W^T + b on the last axis; x W + b if ``transpose``."""

    def shape(self, a: Asked) -> Shape:
        return (*a.shape[:-1], a.tensors["weight"].shape[1 if a.attrs["transpose"] else 0])

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [spectral_norm(a.tensors["weight"])]

    def at_zero(self, a: Asked) -> Extent:
        return every_token(a.shape, bias_norm(a))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        absolute = spectral_norm(abs(a.tensors["weight"]))
        return p.dot(a.shape[-1] + 1) * (absolute * incoming[0].total + self.at_zero(a).total)


def bias_norm(a: Asked) -> Interval:
    """|b|, zero without a bias."""
    return frobenius(a.tensors["bias"]) if "bias" in a.tensors else exactly(0)


class NormalizedLinear(Formula):
    """Rows v_i / max(|v_i|, eps): a positive factor for every row of the stored matrix."""

    def shape(self, a: Asked) -> Shape:
        return (a.tensors["weight"].shape[0],)

    def _factors(self, a: Asked) -> list[Interval]:
        least = exactly(Fraction(a.attrs["eps"]))
        return [exactly(1) / larger(frobenius(row), least) for row in a.tensors["weight"]]

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        return [scaled_rows_norm(self._factors(a), a.tensors["weight"])]

    def at_zero(self, a: Asked) -> Extent:
        return Extent(bias_norm(a), bias_norm(a))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        # rows: the error of a sum of squares (halved by the root, not used) and eight more roundings; then a product
        d, rows = a.shape[0], zip(self._factors(a), a.tensors["weight"], strict=True)
        norm = euclidean(factor * frobenius(row) for factor, row in rows)
        relative = compounded(p.sum(d) + p.gamma(8), p.dot(d + 1))
        return relative * (norm * incoming[0].total + bias_norm(a))


FORMULAS: dict[str, Formula] = {"linear@1": Linear(), "normalized_linear@1": NormalizedLinear()}
