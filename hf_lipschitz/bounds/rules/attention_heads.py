"""What all forms of attention with ball projections share: heads, projections, column sums, norms, rounding."""

from __future__ import annotations

import numpy as np

from ..rounding import Array, Enclosure, U, add_up, array_norm_up, gamma, mul_up, norm_up, sqrt_up, up
from ..rule import Call, Geometry, Rule, Shape, Size
from .attributes import integer, need

SLOTS = ("query", "key", "value")


class HeadAttention(Rule):
    """Head h: q = P_1(W_q^h x), k = P_1(W_k^g y), v = P_{r_g}(W_v^g y), output sum_m p_nm v_m, heads concatenated.

    P_rho(z) = z min(1, rho / |z|) is 1-Lipschitz (projection on a convex set). y is x in self-attention. With fewer
    key/value heads than query heads, g = floor(h kv_heads / heads) serves several h. Subclasses say what p is.
    """

    attrs = {"heads": integer(1, 4096)}
    tensors = {"query": 2, "key": 2, "value": 2}
    scalars = ("temperature", "radius")

    def shape(self, call: Call) -> Shape:
        heads, shared = call.attrs["heads"], head_count(call, "key")
        for shape in call.shapes:
            need(len(shape) == 2, f"attention takes tokens, got sample shape {shape}")
        need(heads % shared == 0, f"{heads} query heads cannot share {shared} key/value heads evenly")
        for slot in SLOTS:
            (rows, columns), count = call.tensors[slot].shape, head_count(call, slot)
            width = call.shapes[0 if slot == "query" else -1][1]
            need(columns == width, f"tensor {call.names[slot]!r} takes {columns} channels, it is given {width}")
            need(rows % count == 0, f"tensor {call.names[slot]!r} has {rows} rows, not a multiple of {count} heads")
        need(head_width(call, "query") == head_width(call, "key"), "query and key weights differ in shape")
        for slot in self.scalars:
            value, count = call.scalars[slot], head_count(call, slot)
            need(value.low.shape in ((), (count,)), f"scalar {slot!r} needs one entry a head ({count})")
            need(bool(np.all(value.low >= 0.0)), f"scalar {slot!r} must not be negative")
        if (bias := call.tensors.get("bias")) is not None:
            fits = bias.shape == (heads, call.shapes[0][0], call.shapes[-1][0]) and np.max(np.abs(bias)) <= 300.0
            need(bool(fits), f"tensor {call.names['bias']!r} needs shape (heads, queries, keys) and entries within 300")
        return call.shapes[0][0], heads * head_width(call, "value")

    def apply(self, call: Call, *values: Array) -> Array:
        q, k, v = self._projected(call, *values)
        scores = _spread(call, self.scalars[0]) * (q @ k.transpose(0, 1, 3, 2))
        if "bias" in call.tensors:
            scores = scores + call.tensors["bias"]
        if call.attrs.get("causal"):
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        mixed = self._weights(call, scores) @ v
        return mixed.transpose(0, 2, 1, 3).reshape(mixed.shape[0], mixed.shape[2], -1)

    def _projected(self, call: Call, *values: Array) -> tuple[Array, Array, Array]:
        """q, k, v of shape (B, heads, N, d_h)."""
        q, k, v = (
            split_heads(values[0 if slot == "query" else -1] @ call.tensors[slot].T, head_count(call, slot))
            for slot in SLOTS
        )
        v = _ball(v, _spread(call, "radius"))
        q, k = (_rotated(_ball(each, 1.0), call.attrs.get("rotary", 0)) for each in (q, k))
        return q, repeated(call, k), repeated(call, v)

    def _weights(self, call: Call, scores: Array) -> Array:
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        (of_query, of_key), column = self._strengths(call), self._column_root(call)
        query = self._norm(call, "query", "tr", of_query)
        if geometry == "l2":
            value = self._norm(call, "value", "c", _grouped(call, column))
            key = self._norm(call, "key", "trc", _grouped(call, list(map(mul_up, of_key, column))))
            return (add_up(value, query, key),) if self.arity == 1 else (query, add_up(value, key))
        share = call.attrs["heads"] // head_count(call, "key")
        terms = [
            add_up(self._head_norm(call, "value", h // share), mul_up(s, self._head_norm(call, "key", h // share)))
            for h, s in enumerate(of_key)
        ]
        return (add_up(norm_up(*terms), query),) if self.arity == 1 else (query, norm_up(*terms))

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        token = array_norm_up(np.asarray(self._highs(call, "radius")))
        return Size(token, mul_up(sqrt_up(float(call.shapes[0][0])), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        """Errors of the projections carried through the heads' gains, plus those of scores, weights and average.

        A projected q, k or v strays by gamma_{d+8} (norm: d/2 + 1 roundings relatively, then a quotient, a minimum and
        a product; for v, whose ball may be tiny, also by what underflows in the norm), so scores stay in [-t', t'] with
        t' = tau (1 + gamma_{d_h+8})^2 + the deviation of tau. A rotation adds 16 (N + 1) u: angles of at most N are
        assumed to be within 16 units in the last place. How weights stray is said in ``_weight_error``.
        """
        heads, (queries, keys) = call.attrs["heads"], (call.shapes[0][0], call.shapes[-1][0])
        ball = gamma(max(head_width(call, slot) for slot in SLOTS) + 8, roundoff)
        stray, shorter, longer = call.deviations["temperature"], call.deviations["radius"], up(1.0 + ball)
        tau = [add_up(mul_up(t, longer, longer), stray) for t in self._highs(call, "temperature")]
        radius = [add_up(mul_up(r, longer), shorter) for r in self._highs(call, "radius")]
        turned = add_up(ball, mul_up(16.0 * (keys + 1), roundoff)) if call.attrs.get("rotary") else ball
        # squares that underflow move a norm by at most sqrt(width) times the root of the least normal number, or less
        lost = mul_up(sqrt_up(float(head_width(call, "value"))), 2.0**-500 if roundoff == U else 2.0**-62)
        root, all_radii = sqrt_up(float(heads)), array_norm_up(np.asarray(radius))
        shrunk = add_up(mul_up(ball, all_radii), mul_up(root, add_up(shorter, lost)))
        root_q, root_k = sqrt_up(float(queries)), sqrt_up(float(keys))
        errors = [
            add_up(projection_error(call, "query", incoming[0]), mul_up(turned, root_q, root)),
            add_up(projection_error(call, "key", incoming[-1]), mul_up(turned, root_k, root)),
            add_up(projection_error(call, "value", incoming[-1]), mul_up(root_k, shrunk)),
        ]
        strength = max(map(mul_up, tau, radius))
        return self._local_error(call, roundoff, tau, (strength, strength), radius, errors, mul_up(2.0, stray))

    def _local_error(
        self,
        call: Call,
        roundoff: float,
        tau: list[float],
        slopes: tuple[float, float],
        radius: list[float],
        errors: list[float],
        stray: float,
    ) -> float:
        """Carry the errors of q, k, v through the gains for such reaches of scores and values, and add those of scores
        and weights.
        """
        share, reach = call.attrs["heads"] // head_count(call, "key"), max(tau)
        column = mul_up(max(self._roots(call, np.asarray(tau))), sqrt_up(float(share)))
        score = add_up(mul_up(reach, gamma(head_width(call, "query") + 2, roundoff)), stray)
        if "bias" in call.tensors:
            reach = add_up(reach, float(np.max(np.abs(call.tensors["bias"]))))
            score = add_up(score, mul_up(gamma(2, roundoff), reach))
        carried = add_up(mul_up(column, errors[2]), mul_up(slopes[0], errors[0]), mul_up(slopes[1], column, errors[1]))
        spread = mul_up(sqrt_up(float(call.shapes[0][0])), array_norm_up(np.asarray(radius)))
        return add_up(carried, mul_up(spread, add_up(score, self._weight_error(call, reach, roundoff))))

    def _weight_error(self, call: Call, reach: float, roundoff: float) -> float:
        return softmax_error(reach, call.shapes[-1][0], roundoff)

    def _highs(self, call: Call, slot: str) -> list[float]:
        """Upper bounds of a scalar, one for each query head."""
        count = head_count(call, slot)
        values = np.broadcast_to(call.scalars[slot].high, (count,))
        return [float(v) for v in np.repeat(values, call.attrs["heads"] // count)]

    def _strength(self, call: Call) -> list[float]:
        return list(map(mul_up, self._highs(call, "temperature"), self._highs(call, "radius")))

    def _strengths(self, call: Call) -> tuple[list[float], list[float]]:
        """For each query head, what a query's and a key's move count: the score's slope times the reach of v."""
        strength = self._strength(call)
        return strength, strength

    def _column_root(self, call: Call) -> list[float]:
        return self._roots(call, np.asarray(self._highs(call, "temperature")))

    def _roots(self, call: Call, reach: Array) -> list[float]:
        """Upper bounds of the root of a column sum of p, for each query head, increasing in the reach of scores."""
        return column_roots(reach, call.shapes[0][0], call.shapes[-1][0])

    def _norm(self, call: Call, slot: str, form: str, scale: list[float]) -> float:
        """Bound |diag(scale) W| (monotone in the scale); float64 products err by u of their size, or underflow."""
        rows = np.repeat(np.asarray(scale), call.tensors[slot].shape[0] // len(scale))[:, None]
        norm, scaled = call.norm(slot, form, lambda: rows * call.tensors[slot]), rows * call.tensors[slot]
        return add_up(norm, mul_up(gamma(2), array_norm_up(scaled)), scaled.size * 2.0**-1074)

    def _head_norm(self, call: Call, slot: str, head: int) -> float:
        # one tensor may serve as queries of many heads and as values of few: the label says which rows a head has
        rows, count = head_width(call, slot), head_count(call, slot)
        form = f"head{head}" if count == call.attrs["heads"] else f"head{head}of{count}"
        return call.norm(slot, form, lambda: call.tensors[slot][head * rows : (head + 1) * rows])


def softmax_error(reach: float, keys: int, roundoff: float) -> float:
    """How far computed softmax weights stray (sum over keys, relative to 1) for scores of at most ``reach``.

    An exponential errs by (2 reach + 4) u, the normalised weight by twice that plus gamma_N; blockwise softmax rescales
    by factors whose arguments telescope to at most 2 reach, one factor in 16 keys. Together, and with the average of
    values, at most (8 reach + 16) u + 3 gamma_{N+4}. Exponentials of the library are assumed to be within 4 units in
    the last place.
    """
    return add_up(mul_up(add_up(mul_up(8.0, reach), 16.0), roundoff), mul_up(3.0, gamma(keys + 4, roundoff)))


def column_roots(reach: Array, queries: int, keys: int) -> list[float]:
    """Upper bounds of sqrt(N_q / (1 + (N_k-1) e^{-2 reach})), increasing in the reach."""
    top = Enclosure.exactly(np.minimum(reach, 1e300))
    decay = (Enclosure.exactly(-2.0) * top).exp()
    one, others = Enclosure.exactly(1.0), Enclosure.exactly(float(keys - 1))
    roots = (Enclosure.exactly(float(queries)) / (one + others * decay)).sqrt()
    return [float(v) for v in np.minimum(np.atleast_1d(roots.high), sqrt_up(float(queries)))]


def projection_error(call: Call, slot: str, size: Size) -> float:
    """The l2 error of a computed projection (with a bias, if it has one) of an input of the given size."""
    tensor, bias = call.tensors[slot], array_norm_up(call.tensors.get(f"{slot}_bias", np.zeros(1)))
    absolute, dot = call.norm(slot, "abs", lambda: np.abs(tensor)), call.dot(tensor.shape[1] + 1)
    return add_up(mul_up(dot, absolute, size.total), mul_up(dot, sqrt_up(float(call.shapes[0][0])), bias))


def head_count(call: Call, slot: str) -> int:
    """The number of heads that a tensor or scalar has."""
    heads = call.attrs["heads"]
    return call.attrs.get("kv_heads", heads) if slot in ("key", "value", "radius") else heads


def head_width(call: Call, slot: str) -> int:
    """The number of rows that a tensor has for each head."""
    return call.tensors[slot].shape[0] // head_count(call, slot)


def _grouped(call: Call, terms: list[float]) -> list[float]:
    """For each key/value head, the Euclidean norm of the terms of the query heads that it serves."""
    share = call.attrs["heads"] // head_count(call, "key")
    return [norm_up(*terms[i : i + share]) for i in range(0, len(terms), share)]


def split_heads(x: Array, heads: int) -> Array:
    """(B, N, H d) -> (B, H, N, d)."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)


def _spread(call: Call, slot: str) -> Array:
    return np.broadcast_to(call.scalar(slot), (head_count(call, slot),))[:, None, None]


def repeated(call: Call, x: Array) -> Array:
    """Every key/value head, once for each query head that it serves."""
    return np.repeat(x, call.attrs["heads"] // x.shape[1], axis=1)


def _ball(x: Array, radius: Array | float) -> Array:
    norm = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return x * np.minimum(1.0, radius / np.maximum(norm, 1e-300))


def _rotated(x: Array, base: float) -> Array:
    """Turn entries i and i + d/2 of the n-th token by the angle n base^(-2i/d), an isometry; base 0: as it is."""
    if not base:
        return x
    half = x.shape[-1] // 2
    places, pairs = (np.arange(count, dtype=np.float64) for count in (x.shape[-2], half))
    angles = places[:, None] * np.power(float(base), -pairs / half)
    c, s, a, b = np.cos(angles), np.sin(angles), x[..., :half], x[..., half:]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
