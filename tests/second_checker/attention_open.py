"""Formulas of attention without ball projections: of tokens known to be short, and of a stored memory."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.second_checker.attention import Masked, softmax_error
from tests.second_checker.exact import INFINITE, ZERO, Interval, euclidean, exactly, larger, root_of, smaller
from tests.second_checker.formula import Asked, Extent, Formula, Precision, Shape, every_token, tokens_in
from tests.second_checker.norms import Matrix, frobenius, scaled_rows_norm, spectral_norm


def _times(*factors: Sequence[Interval]) -> list[Interval]:
    result = []
    for each in zip(*factors, strict=True):
        product = each[0]
        for factor in each[1:]:
            product = product * factor
        result.append(product)
    return result


class OpenAttention(Masked):
    """Q = |W_q^h| A + |b_q^h|, K = |W_k^g| A, V = |W_v^g| A take the places of 1, 1 and r; A bounds tokens."""

    def _reach(self, a: Asked, slot: str, token: Interval, biased: bool) -> list[Interval]:
        norms = [spectral_norm(part) * token for part in self.split(a, slot)]
        if biased and f"{slot}_bias" in a.tensors:
            biases = np.split(a.tensors[f"{slot}_bias"], len(norms))
            norms = [norm + frobenius(bias) for norm, bias in zip(norms, biases, strict=True)]
        return [norm for norm in norms for _ in range(self.heads(a) // len(norms))]

    def _radii(self, a: Asked) -> tuple[list[Interval], list[Interval], list[Interval]]:
        token = a.sizes[0].token if a.sizes else INFINITE
        keys, values = (self._reach(a, slot, token, False) for slot in ("key", "value"))
        return self._reach(a, "query", token, True), keys, values

    def strengths(self, a: Asked) -> tuple[list[Interval], list[Interval]]:
        q, k, v = self._radii(a)
        scale = self.per_query_head(a, "scale")
        return _times(scale, k, v), _times(scale, q, v)

    def scores(self, a: Asked) -> list[Interval]:
        q, k, _ = self._radii(a)
        return _times(self.per_query_head(a, "scale"), q, k)

    def column(self, a: Asked, reach: Sequence[Interval]) -> list[Interval]:
        return [root_of(a.shape[0])] * len(reach) if any(r.infinite for r in reach) else super().column(a, reach)

    def scaled(self, a: Asked, slot: str, per_head: Sequence[Interval]) -> Interval:
        """|diag W| is at most max |W| and the Euclidean norm of the heads' products."""
        whole = larger(*per_head) * spectral_norm(a.tensors[slot])
        return smaller(whole, euclidean(_times(per_head, [spectral_norm(part) for part in self.split(a, slot)])))

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        return every_token(self.shape(a), euclidean(self._reach(a, "value", incoming[0].token, True)))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        n, errors, reach = a.shape[0], dict[str, Interval](), dict[str, list[Interval]]()
        for slot in ("query", "key", "value"):
            bias = frobenius(a.tensors[f"{slot}_bias"]) if f"{slot}_bias" in a.tensors else ZERO
            errors[slot] = self.projection(a, p, slot, incoming) + p.dot(a.shape[1] + 1) * root_of(n) * bias
            reach[slot] = [r + errors[slot] for r in self._reach(a, slot, incoming[0].token, True)]
        if any(r.infinite for each in reach.values() for r in each):
            return INFINITE
        stray = a.strays["scale"]
        scale = [s + stray for s in self.per_query_head(a, "scale")]
        q, k, v = (reach[slot] for slot in ("query", "key", "value"))
        tau = _times(scale, q, k)
        column = larger(*self.column(a, tau)) * root_of(self.share(a))
        of_query, of_key = larger(*_times(scale, k, v)), larger(*_times(scale, q, v))
        carried = column * errors["value"] + of_query * errors["query"] + of_key * column * errors["key"]
        most = larger(*tau)
        score = most * p.gamma(self.width(a, "query") + 2) + stray * larger(*_times(q, k))
        if "bias" in a.tensors:
            most = most + exactly(max(abs(a.tensors["bias"].ravel())))
            score = score + p.gamma(2) * most
        return carried + root_of(n) * euclidean(v) * (score + softmax_error(p, most, n))


class MemoryAttention(Formula):
    """softmax(tau K W x + b) V: |diag(tau diam(K) diam(V) / 4) W|, token by token (Popoviciu)."""

    def shape(self, a: Asked) -> Shape:
        return (*a.shape[:-1], a.tensors["value"].shape[1])

    def _split(self, a: Asked, slot: str) -> list[Matrix]:
        return np.split(a.tensors[slot], a.attrs["heads"], axis=1)

    def _longest(self, a: Asked, slot: str) -> list[Interval]:
        return [larger(*(frobenius(row) for row in part)) for part in self._split(a, slot)]

    def _diameters(self, a: Asked, slot: str) -> list[Interval]:
        return [larger(*(frobenius(x - y) for x in part for y in part)) for part in self._split(a, slot)]

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        heads, query = a.attrs["heads"], a.tensors["query"]
        factors = _times(a.spread("temperature", heads), self._diameters(a, "key"), self._diameters(a, "value"))
        rows = [factor * exactly(Fraction(1, 4)) for factor in factors for _ in range(len(query) // heads)]
        return [scaled_rows_norm(rows, query)]

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        return every_token((tokens_in(a.shape), 1), euclidean(self._longest(a, "value")))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        heads, query, (memory, width) = a.attrs["heads"], a.tensors["query"], a.tensors["key"].shape
        projected = p.dot(query.shape[1] + 1) * spectral_norm(abs(query)) * incoming[0].total
        tau, keys, values = a.spread("temperature", heads), self._longest(a, "key"), self._longest(a, "value")
        stray, length = a.strays["temperature"], spectral_norm(query) * incoming[0].token + projected
        most = (larger(*tau) + stray) * length * larger(*keys)
        score = most * p.gamma(width // heads + 4) + stray * length * larger(*keys)
        most = most + exactly(max(abs(a.tensors["bias"].ravel())) if "bias" in a.tensors else 0)
        weights = score + p.gamma(2) * most + softmax_error(p, most, memory)
        return larger(*_times(tau, keys, values)) * projected + self.extent(a, incoming).total * weights


FORMULAS: dict[str, Formula] = {"open_attention@1": OpenAttention(), "memory_attention@1": MemoryAttention()}
