"""Formulas of attention with ball projections: softmax in its forms, cross, unnormalised, and Sinkhorn.

A query head h reads the key/value head g(h). What a form says differently: its column sums (``column``, the root of the
largest sum over queries of what one key gets), what scores of queries and keys count (``strengths``), and how weights
stray. The rounding follows the derivation in the rule's docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.second_checker.elementary import exp, tanh
from tests.second_checker.exact import (
    INFINITE,
    ONE,
    ZERO,
    Interval,
    euclidean,
    exactly,
    larger,
    root_of,
    smaller,
    total,
)
from tests.second_checker.formula import DOUBLE, Asked, Extent, Formula, Precision, Shape, every_token
from tests.second_checker.norms import Matrix, scaled_rows_norm, spectral_norm


def column_root(tau: Interval, queries: int, keys: int) -> Interval:
    """Every p <= 1 / (1 + (N_k - 1) e^{-2 tau}), and N_q queries add up."""
    visible = ONE + exactly(keys - 1) * exp(exactly(-2) * tau)
    return smaller((exactly(queries) / visible).sqrt(), root_of(queries))


def softmax_error(p: Precision, reach: Interval, keys: int) -> Interval:
    """(8 reach + 16) u + 3 gamma_{N+4}: how far softmax weights and their average stray."""
    return (exactly(8) * reach + exactly(16)) * exactly(p.unit) + exactly(3) * p.gamma(keys + 4)


class HeadAttention(Formula):
    """Head h: q = P_1(W_q^h x), k = P_1(W_k^g y), v = P_{r_g}(W_v^g y), scores tau_h <q, k>."""

    def heads(self, a: Asked, slot: str = "query") -> int:
        heads = a.attrs["heads"]
        return a.attrs.get("kv_heads", heads) if slot in ("key", "value", "radius") else heads

    def share(self, a: Asked) -> int:
        return self.heads(a) // self.heads(a, "key")

    def width(self, a: Asked, slot: str) -> int:
        return len(a.tensors[slot]) // self.heads(a, slot)

    def shape(self, a: Asked) -> Shape:
        return a.shape[0], self.heads(a) * self.width(a, "value")

    def per_query_head(self, a: Asked, slot: str) -> list[Interval]:
        given = a.spread(slot, self.heads(a, slot))
        return [value for value in given for _ in range(self.heads(a) // len(given))]

    def split(self, a: Asked, slot: str) -> list[Matrix]:
        return np.split(a.tensors[slot], self.heads(a, slot))

    def column(self, a: Asked, reach: Sequence[Interval]) -> list[Interval]:
        """For each query head, the root of the largest column sum."""
        return [column_root(each, a.shapes[0][0], a.shapes[-1][0]) for each in reach]

    def strengths(self, a: Asked) -> tuple[list[Interval], list[Interval]]:
        """What a move of a query and of a key counts, for each query head: tau r."""
        pairs = zip(self.per_query_head(a, "temperature"), self.per_query_head(a, "radius"), strict=True)
        strength = [tau * radius for tau, radius in pairs]
        return strength, strength

    def scores(self, a: Asked) -> list[Interval]:
        return self.per_query_head(a, "temperature")

    def scaled(self, a: Asked, slot: str, per_head: Sequence[Interval]) -> Interval:
        """|diag W| with one factor for each of the tensor's heads."""
        weight = a.tensors[slot]
        rows = [factor for factor in per_head for _ in range(len(weight) // len(per_head))]
        return scaled_rows_norm(rows, weight)

    def grouped(self, a: Asked, terms: Sequence[Interval]) -> list[Interval]:
        """Query heads that share a key/value head add up as squares."""
        share = self.share(a)
        return [euclidean(terms[i : i + share]) for i in range(0, len(terms), share)]

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        (of_query, of_key), column, share = self.strengths(a), self.column(a, self.scores(a)), self.share(a)
        query = self.scaled(a, "query", of_query)
        if geometry == "l2":
            both = [s * c for s, c in zip(of_key, column, strict=True)]
            rest = self.scaled(a, "value", self.grouped(a, column)) + self.scaled(a, "key", self.grouped(a, both))
        else:
            values, keys = self.split(a, "value"), self.split(a, "key")
            rest = euclidean(
                spectral_norm(values[h // share]) + of_key[h] * spectral_norm(keys[h // share])
                for h in range(self.heads(a))
            )
        return [query, rest] if len(a.shapes) == 2 else [query + rest]

    def extent(self, a: Asked, incoming: Sequence[Extent]) -> Extent:
        """A token is the concatenation of averages of values in balls."""
        return every_token(self.shape(a), euclidean(self.per_query_head(a, "radius")))

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        heads, queries, keys = self.heads(a), a.shapes[0][0], a.shapes[-1][0]
        ball = p.gamma(max(self.width(a, slot) for slot in ("query", "key", "value")) + 8)
        tau = [t * (ONE + ball) * (ONE + ball) + a.strays["temperature"] for t in self.per_query_head(a, "temperature")]
        radius = [r * (ONE + ball) + a.strays["radius"] for r in self.per_query_head(a, "radius")]
        column = larger(*self.column(a, tau)) * root_of(self.share(a))
        strength = larger(*(t * r for t, r in zip(tau, radius, strict=True)))
        radii, every = euclidean(radius), root_of(heads)
        query, key, value = (self.projection(a, p, slot, incoming) for slot in ("query", "key", "value"))
        turned = ball + exactly(16 * (keys + 1) * p.unit) if a.attrs.get("rotary") else ball
        vanished = root_of(self.width(a, "value")) * exactly(Fraction(1, 1 << (500 if p == DOUBLE else 62)))
        value = value + root_of(keys) * (ball * radii + every * (a.strays["radius"] + vanished))
        query = query + turned * root_of(queries) * every
        key = key + turned * root_of(keys) * every
        carried = column * value + strength * query + strength * column * key
        reach = larger(*tau)
        scores = reach * p.gamma(self.width(a, "query") + 2) + exactly(2) * a.strays["temperature"]
        if "bias" in a.tensors:
            reach = reach + exactly(max(abs(a.tensors["bias"].ravel())))
            scores = scores + p.gamma(2) * reach
        return carried + root_of(queries) * radii * (scores + self.weight_error(a, p, reach))

    def projection(self, a: Asked, p: Precision, slot: str, incoming: Sequence[Extent]) -> Interval:
        """Of one product with a stored matrix."""
        weight = a.tensors[slot]
        size = incoming[0 if slot == "query" else -1].total
        return p.dot(weight.shape[1] + 1) * spectral_norm(abs(weight)) * size

    def weight_error(self, a: Asked, p: Precision, reach: Interval) -> Interval:
        return softmax_error(p, reach, a.shapes[-1][0])


class Masked(HeadAttention):
    """A weight is at most e^b / (e^b + e^{-2 tau} sum of the others' e^b): columns summed over the queries that see."""

    def column(self, a: Asked, reach: Sequence[Interval]) -> list[Interval]:
        queries, keys = a.shapes[0][0], a.shapes[-1][0]
        bias, causal = a.tensors.get("bias"), a.attrs.get("causal", False)
        if bias is None and not causal:
            return super().column(a, reach)
        found = []
        for head, each in enumerate(reach):
            decay = exp(exactly(-2) * each)
            power = [[exp(exactly(b)) for b in row] for row in bias[head]] if bias is not None else None
            sums = [ZERO] * keys
            for n in range(queries):
                seen = range(n + 1) if causal else range(keys)
                row = power[n] if power else [ONE] * keys
                for m in seen:
                    others = total(row[j] for j in seen if j != m)
                    sums[m] = sums[m] + row[m] / (row[m] + decay * others)
            found.append(smaller(larger(*sums), exactly(queries)).sqrt())
        return found


class KernelAttention(HeadAttention):
    """Weights e^{s - tau} / N: as softmax with column sums of one, but weights may exceed 1/N when computed."""

    def column(self, a: Asked, reach: Sequence[Interval]) -> list[Interval]:
        return [ONE for _ in reach]

    def rounding(self, a: Asked, p: Precision, incoming: Sequence[Extent]) -> Interval:
        ball, hottest = p.gamma(self.width(a, "query") + 16), larger(*self.scores(a))
        excess = hottest * (ball + ball + ball * ball) + exactly(4) * a.strays["temperature"]
        return exp(excess + p.gamma(8)) * super().rounding(a, p, incoming)


class SinkhornAttention(HeadAttention):
    """max over s of |W_v| sqrt(1 - (1 - t^2) s^2) + (|T W_q| + |T W_k|) s, t = tanh of the largest tau."""

    def column(self, a: Asked, reach: Sequence[Interval]) -> list[Interval]:
        return [ONE for _ in reach]

    def gains(self, a: Asked, geometry: str) -> list[Interval]:
        strength, tau = self.strengths(a)[0], self.scores(a)
        query = self.scaled(a, "query", strength)
        if geometry == "l2":
            moved = query + self.scaled(a, "key", strength)
            return [_steepest(spectral_norm(a.tensors["value"]), moved, tanh(larger(*tau)))]
        parts = zip(*(map(spectral_norm, self.split(a, slot)) for slot in ("query", "key", "value")), strict=True)
        terms = []
        for (q, k, v), s, t in zip(parts, strength, tau, strict=True):
            slow = ONE / (ONE - tanh(t))
            terms.append(v + s * ((ONE + slow) * k + slow * q))
        return [euclidean(terms) + query]

    def weight_error(self, a: Asked, p: Precision, reach: Interval) -> Interval:
        """The distance of a stopped scaling from its limit, and the rounding of its scalings."""
        n, sums = a.shape[0], Precision(p.sums, p.sums)
        reach = reach * (ONE + p.gamma(self.width(a, "query") + 8)) + exactly(8 * p.unit)
        if reach.infinite or reach.low > 10:
            return INFINITE
        t = tanh(reach)
        stopped = exactly(2) * sums.gamma(2 * n + 80) / (ONE - t.square())
        last = exactly(4) * reach
        for _ in range(2 * a.attrs["iterations"] - 1):
            last = last * t
        distance = larger(stopped, last + exactly(2) * sums.gamma(n + 3) / (ONE - t))
        if distance.infinite or distance.low >= 700:
            return INFINITE
        grown = exp(distance)
        entries = sums.gamma(n + 6) + p.gamma(4) + p.sum(n)
        return (exactly(2) * reach + exactly(8)) * exactly(p.unit) + (grown - ONE) + exactly(2) * grown * entries


def _steepest(value: Interval, slope: Interval, t: Interval) -> Interval:
    flat = ONE - t.square()
    rising = slope * t - value * flat
    end, inside = value * t + slope, (value.square() + slope.square() / flat).sqrt()
    if rising.low >= 0:
        return end
    return inside if rising.high < 0 else Interval(min(end.low, inside.low), max(end.high, inside.high))


FORMULAS: dict[str, Formula] = {
    "softmax_attention@1": HeadAttention(),
    "ball_attention@1": Masked(),
    "cross_attention@1": Masked(),
    "kernel_attention@1": KernelAttention(),
    "sinkhorn_attention@1": SinkhornAttention(),
}
