"""Softmax attention with bounded scores."""

from __future__ import annotations

import numpy as np

from ..rounding import Array, Enclosure, U, add_up, array_norm_up, gamma, mul_up, norm_up, sqrt_up, up
from ..rule import Call, Geometry, Rule, Shape, Size
from .attributes import integer, need


class SoftmaxAttention(Rule):
    """Multi-head attention, all keys visible, with a ball projection of every head's query, key and value.

    Head h: q = P_1(W_q^h x), k = P_1(W_k^h x), v = P_{r_h}(W_v^h x), scores tau_h <q, k>, weights softmax over the N
    keys; the heads' outputs are concatenated. P_rho(z) = z min(1, rho / |z|) is 1-Lipschitz (projection on a convex
    set).

    Derivation. For one head, do_n = sum_j p_nj dv_j + Cov_{p_n}(ds_n, v), and |Cov_p(ds, <u, v>)| <= r sqrt(sum_j p_j
    ds_j^2) for every unit u. Scores lie in [-tau, tau], so p <= 1 / (1 + (N-1) e^{-2 tau}) and a column of p sums to
    at most c = N / (1 + (N-1) e^{-2 tau}). With T = diag(tau_h r_h), S = diag(sqrt(c_h)) over the heads' rows,
    Minkowski over heads:

        l2:         L <= |S W_v| + |T W_q| + |T S W_k|,
        token_max:  L <= sqrt( sum_h ( |W_v^h| + tau_h r_h |W_k^h| )^2 ) + |T W_q|.

    (In token_max, values and keys of different heads may sit on different tokens, a query belongs to one token.)
    """

    op = "softmax_attention@1"
    source = "derivation in the docstring; the fused norms of published formulas are unsound for more than one head"
    attrs = {"heads": integer(1, 4096)}
    tensors = {"query": 2, "key": 2, "value": 2}
    scalars = ("temperature", "radius")

    def shape(self, call: Call) -> Shape:
        need(len(call.shapes[0]) == 2, f"attention takes tokens, got sample shape {call.shapes[0]}")
        heads, width = call.attrs["heads"], call.shapes[0][1]
        for slot in ("query", "key", "value"):
            rows, columns = call.tensors[slot].shape
            need(columns == width, f"tensor {call.names[slot]!r} takes {columns} channels, it is given {width}")
            need(rows % heads == 0, f"tensor {call.names[slot]!r} has {rows} rows, not a multiple of {heads} heads")
        need(call.tensors["query"].shape == call.tensors["key"].shape, "query and key weights differ in shape")
        for slot in ("temperature", "radius"):
            value = call.scalars[slot]
            need(value.low.shape in ((), (heads,)), f"scalar {slot!r} needs one entry a head ({heads})")
            need(bool(np.all(value.low >= 0.0)), f"scalar {slot!r} must not be negative")
        return call.shapes[0][0], call.tensors["value"].shape[0]

    def apply(self, call: Call, *values: Array) -> Array:
        heads, x = call.attrs["heads"], values[0]
        tau, radius = (np.broadcast_to(call.scalar(s), (heads,))[:, None, None] for s in ("temperature", "radius"))
        q, k, v = (_heads(x @ call.tensors[slot].T, heads) for slot in ("query", "key", "value"))
        scores = tau * (_ball(q, 1.0) @ _ball(k, 1.0).transpose(0, 1, 3, 2))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ _ball(v, radius)
        return mixed.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], -1)

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        strength, column = self._strength(call), self._column_root(call)
        query = self._norm(call, "query", "tr", strength)
        if geometry == "l2":
            key = self._norm(call, "key", "trc", [mul_up(s, c) for s, c in zip(strength, column, strict=True)])
            return (add_up(self._norm(call, "value", "c", column), query, key),)
        terms = [
            add_up(self._head_norm(call, "value", h), mul_up(strength[h], self._head_norm(call, "key", h)))
            for h in range(call.attrs["heads"])
        ]
        return (add_up(norm_up(*terms), query),)

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        token = array_norm_up(np.asarray(self._highs(call, "radius")))
        return Size(token, mul_up(sqrt_up(float(call.shapes[0][0])), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        """Errors of the projections carried through the heads' gains, plus those of scores, softmax and average.

        A projected q, k or v strays by gamma_{d+8} (norm: d/2 + 1 roundings relatively, then a quotient, a minimum and
        a product; for v, whose ball may be tiny, also by what underflows in the norm), so scores stay in [-t', t'] with
        t' = tau (1 + gamma_{d_h+8})^2 + the deviation of tau. An exponential errs by (2 t' + 4) u, the normalised
        weight by twice that plus gamma_N; blockwise softmax rescales by factors whose arguments telescope to at most
        2 t', one factor in 16 keys. Together at most (8 t' + 16) u + 3 gamma_{N+4}, times r_h. Exponentials of the
        library are assumed to be within 4 units in the last place.
        """
        n, heads = call.shapes[0][0], call.attrs["heads"]
        widths = {slot: call.tensors[slot].shape[0] // heads for slot in ("query", "key", "value")}
        ball = gamma(max(widths.values()) + 8, roundoff)
        tau = [
            add_up(mul_up(t, up(1.0 + ball), up(1.0 + ball)), call.deviations["temperature"])
            for t in self._highs(call, "temperature")
        ]
        radius = [add_up(mul_up(r, up(1.0 + ball)), call.deviations["radius"]) for r in self._highs(call, "radius")]
        column = max(_column_roots(np.asarray(tau), n))
        strength = max(mul_up(t, r) for t, r in zip(tau, radius, strict=True))
        all_radii, root_n = array_norm_up(np.asarray(radius)), sqrt_up(float(n))
        q, k, v = (
            self._projection_error(call, slot, roundoff, incoming[0].total) for slot in ("query", "key", "value")
        )
        unit = mul_up(ball, root_n, sqrt_up(float(heads)))
        # squares that underflow move a norm by at most sqrt(width) times the root of the least normal number, or less
        lost = mul_up(sqrt_up(float(widths["value"])), 2.0**-500 if roundoff == U else 2.0**-62)
        value = add_up(mul_up(ball, all_radii), mul_up(sqrt_up(float(heads)), add_up(call.deviations["radius"], lost)))
        value = add_up(v, mul_up(root_n, value))
        carried = add_up(
            mul_up(column, value), mul_up(strength, add_up(q, unit)), mul_up(strength, column, add_up(k, unit))
        )
        score = add_up(
            mul_up(max(tau), gamma(widths["query"] + 2, roundoff)), mul_up(2.0, call.deviations["temperature"])
        )
        soft = add_up(mul_up(add_up(mul_up(8.0, max(tau)), 16.0), roundoff), mul_up(3.0, gamma(n + 4, roundoff)))
        return add_up(carried, mul_up(root_n, all_radii, add_up(score, soft)))

    def _projection_error(self, call: Call, slot: str, roundoff: float, total: float) -> float:
        absolute = call.norm(slot, "abs", lambda: np.abs(call.tensors[slot]))
        return mul_up(gamma(call.shapes[0][1] + 1, roundoff), absolute, total)

    def _highs(self, call: Call, slot: str) -> list[float]:
        return [float(v) for v in np.broadcast_to(call.scalars[slot].high, (call.attrs["heads"],))]

    def _strength(self, call: Call) -> list[float]:
        return [
            mul_up(t, r) for t, r in zip(self._highs(call, "temperature"), self._highs(call, "radius"), strict=True)
        ]

    def _column_root(self, call: Call) -> list[float]:
        return _column_roots(np.asarray(self._highs(call, "temperature")), call.shapes[0][0])

    def _norm(self, call: Call, slot: str, form: str, scale: list[float]) -> float:
        """Bound |diag(scale) W| (monotone in the scale); the float64 product errs by u of its Frobenius norm."""
        rows = np.repeat(np.asarray(scale), call.tensors[slot].shape[0] // call.attrs["heads"])[:, None]
        norm = call.norm(slot, form, lambda: rows * call.tensors[slot])
        return add_up(norm, mul_up(gamma(2), array_norm_up(rows * call.tensors[slot])))

    def _head_norm(self, call: Call, slot: str, head: int) -> float:
        rows = call.tensors[slot].shape[0] // call.attrs["heads"]
        return call.norm(slot, f"head{head}", lambda: call.tensors[slot][head * rows : (head + 1) * rows])


def _column_roots(tau: Array, n: int) -> list[float]:
    """Upper bounds of sqrt(N / (1 + (N-1) e^{-2 tau})), increasing in tau."""
    top = Enclosure.exactly(tau)
    decay = (Enclosure.exactly(-2.0) * top).exp()
    roots = (Enclosure.exactly(float(n)) / (Enclosure.exactly(1.0) + Enclosure.exactly(float(n - 1)) * decay)).sqrt()
    return [float(v) for v in np.minimum(np.atleast_1d(roots.high), sqrt_up(float(n)))]


def _heads(x: Array, heads: int) -> Array:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)


def _ball(x: Array, radius: Array | float) -> Array:
    norm = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return x * np.minimum(1.0, radius / np.maximum(norm, 1e-300))


RULES: tuple[Rule, ...] = (SoftmaxAttention(),)
