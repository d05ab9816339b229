"""Forms of attention without ball projections: of tokens that are known to be short, and of a stored memory."""

from __future__ import annotations

import math

import numpy as np

from ..rounding import Array, add_up, array_norm_up, gamma, mul_up, norm_up, sqrt_up, up
from ..rule import Call, Geometry, Rule, Shape, Size
from .attention_balls import Masked
from .attention_heads import (
    SLOTS,
    HeadAttention,
    head_count,
    head_width,
    projection_error,
    repeated,
    softmax_error,
    split_heads,
)
from .attributes import integer, need, one_of


class OpenAttention(Masked):
    """Self-attention of tokens of norm at most A, the size of the input: q = W_q x + b_q and so on, no projections.

    Scores are ``scale`` <q, k>. Derivation. As of ball_attention@1 with other radii: |q| <= Q = |W_q^h| A + |b_q^h|;
    and since a constant added to all keys changes scores by what is the same for all keys of a query, and one added to
    all values changes no covariance, |k| and |v| count without biases: K = |W_k^g| A, V = |W_v^g| A. So tau = scale Q
    K, and T is scale K V beside W_q, scale Q V beside W_k; |T W| is at most max(T) |W| and sqrt(sum_h T_h^2 |W^h|^2).
    Where A is infinite, so is the bound.
    """

    op = "open_attention@1"
    source = "derivation in the docstring, with that of ball_attention@1; it holds for inputs of the program's domain"
    attrs = {**Masked.attrs, "causal": one_of(True, False)}
    tensors = {**Masked.tensors, "query_bias": 1, "key_bias": 1, "value_bias": 1}
    optional = Masked.optional | {"query_bias", "key_bias", "value_bias"}
    scalars = ("scale",)

    def shape(self, call: Call) -> Shape:
        shape = super().shape(call)
        for slot in ("query", "key", "value"):
            bias, rows = call.tensors.get(f"{slot}_bias"), len(call.tensors[slot])
            need(
                bias is None or bias.shape == (rows,), f"tensor {call.names.get(f'{slot}_bias')!r} needs {rows} entries"
            )
        return shape

    def _projected(self, call: Call, *values: Array) -> tuple[Array, Array, Array]:
        q, k, v = (
            split_heads(
                values[0] @ call.tensors[slot].T + call.tensors.get(f"{slot}_bias", 0.0), head_count(call, slot)
            )
            for slot in SLOTS
        )
        return q, repeated(call, k), repeated(call, v)

    def _reach(self, call: Call, slot: str, token: float, biased: bool = True) -> list[float]:
        """For each query head, a bound of the norm of its projection of a token of the given norm."""
        count, rows = head_count(call, slot), head_width(call, slot)
        bias = call.tensors.get(f"{slot}_bias", np.zeros(1)) if biased else np.zeros(1)
        norms = [
            add_up(mul_up(self._head_norm(call, slot, g), token), array_norm_up(bias[g * rows : (g + 1) * rows]))
            for g in range(count)
        ]
        return [norm for norm in norms for _ in range(call.attrs["heads"] // count)]

    def _radii(self, call: Call) -> list[list[float]]:
        token = call.sizes[0].token if call.sizes else math.inf
        return [self._reach(call, slot, token, slot == "query") for slot in SLOTS]

    def _strengths(self, call: Call) -> tuple[list[float], list[float]]:
        (q, k, v), scale = self._radii(call), self._highs(call, "scale")
        return list(map(mul_up, scale, k, v)), list(map(mul_up, scale, q, v))

    def _column_root(self, call: Call) -> list[float]:
        q, k, _ = self._radii(call)
        return self._roots(call, np.asarray(list(map(mul_up, self._highs(call, "scale"), q, k))))

    def _norm(self, call: Call, slot: str, form: str, scale: list[float]) -> float:
        """Bound |diag(scale) W| without a matrix that depends on the input's size (labels do not name it)."""
        norms = [self._head_norm(call, slot, h) for h in range(len(scale))]
        return min(mul_up(max(scale), call.norm(slot)), norm_up(*map(mul_up, scale, norms)))

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        token = norm_up(*self._reach(call, "value", incoming[0].token))
        return Size(token, mul_up(sqrt_up(float(call.shapes[0][0])), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        """Errors of the projections carried through gains at the sizes that computed q, k, v may have, biases included,
        plus those of scores and weights as in softmax_attention@1, with tau' = scale' Q' K' and V' in place of r'.
        """
        errors = [projection_error(call, slot, incoming[0]) for slot in SLOTS]
        reaches = [
            [add_up(r, error) for r in self._reach(call, slot, incoming[0].token)]
            for slot, error in zip(SLOTS, errors, strict=True)
        ]
        q, k, v = reaches
        scale = [add_up(s, call.deviations["scale"]) for s in self._highs(call, "scale")]
        tau, stray = list(map(mul_up, scale, q, k)), mul_up(call.deviations["scale"], max(map(mul_up, q, k)))
        slopes = max(map(mul_up, scale, k, v)), max(map(mul_up, scale, q, v))
        if not all(map(math.isfinite, (*errors, *tau, *v))):
            return math.inf
        return self._local_error(call, roundoff, tau, slopes, v, errors, stray)


class MemoryAttention(HeadAttention):
    """softmax(tau K^h W^h x + b^h) V^h for each head h and token x, with M stored keys and values; heads concatenated.

    ``query`` (heads d_k, d), ``key`` (M, heads d_k), ``value`` (M, heads d_v), ``bias`` (heads, M).

    Derivation. do = Cov_p(ds, v) with ds_j = tau <k_j, dq>; for unit u, |Cov_p(ds, <u, v>)| is at most the product of
    two standard deviations, each at most half the range (Popoviciu 1935): tau diam(K) |dq| / 2 and diam(V) / 2. So with
    F = diag(tau_h diam(K^h) diam(V^h) / 4) over the heads' rows the map has the constant |F W|, token by token, in both
    geometries; no score needs a bound.
    """

    op = "memory_attention@1"
    source = "derivation in the docstring"
    attrs = {"heads": integer(1, 4096)}
    tensors = {"query": 2, "key": 2, "value": 2, "bias": 2}
    optional = frozenset({"bias"})
    scalars = ("temperature",)

    def shape(self, call: Call) -> Shape:
        rows, (memory, width) = len(call.tensors["query"]), call.tensors["value"].shape
        heads, shape, tau = call.attrs["heads"], call.shapes[0], call.scalars["temperature"].low
        expected = {
            "query": (rows, shape[-1]),
            "key": (memory, rows),
            "value": (memory, width),
            "bias": (heads, memory),
        }
        for slot, tensor in call.tensors.items():
            need(tensor.shape == expected[slot], f"tensor {call.names[slot]!r} must have shape {expected[slot]}")
        need(len(shape) <= 2, f"memory attention takes tokens, got sample shape {shape}")
        need(rows % heads == 0 and width % heads == 0, f"keys and values must be multiples of {heads} heads wide")
        need(memory <= 4096, f"a memory has at most 4096 entries, this one has {memory}")
        need(
            tau.shape in ((), (heads,)) and bool(np.all(tau >= 0.0)),
            f"'temperature' needs {heads} entries, none negative",
        )
        return (*shape[:-1], width)

    def apply(self, call: Call, *values: Array) -> Array:
        heads, tensors = call.attrs["heads"], call.tensors
        q = (values[0] @ tensors["query"].T).reshape(*values[0].shape[:-1], heads, -1)
        k, v = (tensors[slot].reshape(len(tensors[slot]), heads, -1) for slot in ("key", "value"))
        tau = np.broadcast_to(call.scalar("temperature"), (heads,))[:, None]
        scores = tau * np.einsum("...hd,mhd->...hm", q, k) + tensors.get("bias", 0.0)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("...hm,mhd->...hd", weights / weights.sum(axis=-1, keepdims=True), v)
        return mixed.reshape(*values[0].shape[:-1], -1)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        spans = [_diameters(call.tensors[slot], call.attrs["heads"]) for slot in ("key", "value")]
        factors = [mul_up(0.25, *each) for each in zip(self._highs(call, "temperature"), *spans, strict=True)]
        scaled = np.repeat(factors, len(call.tensors["query"]) // len(factors))[:, None] * call.tensors["query"]
        norm = call.norm("query", "memory", lambda: scaled)
        return (add_up(norm, mul_up(gamma(2), array_norm_up(scaled)), scaled.size * 2.0**-1074),)  # products underflow

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        token = norm_up(*_longest(call.tensors["value"], call.attrs["heads"]))
        return Size(token, mul_up(sqrt_up(float(math.prod(call.shapes[0][:-1]))), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        """The projection's error carried through the gain of what follows, then scores and weights as in softmax."""
        heads, (memory, width), tensors = call.attrs["heads"], call.tensors["key"].shape, call.tensors
        projected, tau = projection_error(call, "query", incoming[0]), self._highs(call, "temperature")
        keys, values = (_longest(tensors[slot], heads) for slot in ("key", "value"))
        strength = max(map(mul_up, tau, keys, values))  # diam / 2 <= longest
        stray = call.deviations["temperature"]
        length = add_up(mul_up(call.norm("query"), incoming[0].token), projected)
        most = mul_up(add_up(max(tau), stray), length, max(keys))
        score = add_up(mul_up(most, gamma(width // heads + 4, roundoff)), mul_up(stray, length, max(keys)))
        most = add_up(most, float(np.max(np.abs(tensors.get("bias", np.zeros(1))))))
        weights = add_up(score, mul_up(gamma(2, roundoff), most), softmax_error(most, memory, roundoff))
        return add_up(mul_up(strength, projected), mul_up(self.size(call, incoming).total, weights))


def _by_head(stored: Array, heads: int) -> Array:
    return stored.reshape(len(stored), heads, -1).transpose(1, 0, 2)


def _longest(stored: Array, heads: int) -> list[float]:
    """For each head, a bound of the norm of its longest stored vector."""
    return [max(map(array_norm_up, rows)) for rows in _by_head(stored, heads)]


def _diameters(stored: Array, heads: int) -> list[float]:
    """For each head, a bound of the largest distance of two of its stored vectors (see array_norm_up)."""
    exponent = math.frexp(float(np.max(np.abs(stored))))[1]
    lost, found = stored.size * 2.0**-500, list[float]()
    for rows in _by_head(np.ldexp(stored, -exponent), heads):
        square = max(float(np.max(np.sum((rows[i:] - rows[i]) ** 2, axis=-1))) for i in range(len(rows)))
        root = up(math.sqrt(square) * (1.0 + 2.0 * gamma(rows.shape[1] + 6)))
        found.append(up(float(np.ldexp(up(root + lost), exponent))))
    return found


RULES: tuple[Rule, ...] = (OpenAttention(), MemoryAttention())
