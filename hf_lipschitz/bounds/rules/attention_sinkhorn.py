"""Sinkhorn attention: weights whose rows and columns sum to one."""

from __future__ import annotations

import math

import numpy as np

from ..errors import KernelError
from ..rounding import Array, Enclosure, U, add_up, div_up, down, gamma, mul_up, norm_up, up
from ..rule import Call, Geometry, Rule
from .attention_heads import HeadAttention, head_width
from .attributes import integer


class SinkhornAttention(HeadAttention):
    """HeadAttention with P = diag(a) e^s diag(b), s = tau <q, k>, scaled until all N rows and N columns sum to one.

    ``apply`` is the converged scaling; ``iterations`` only says after how many rounds a float forward stops at the
    latest (see ``_weight_error``). Padding has to be taken out of the sequence; a causal mask has no such scaling.

    Derivation. In L2(P), let Pi project on the functions alpha_n + beta_m. Differentiating the sums of rows and
    columns, dP = P (I - Pi) ds entrywise. For unit u, with f_nm = <u_n, v_m>:
    <u, dO> = <P^T u, dv> + <(I - Pi) f, ds>_P.
    (1) |ds|_P <= tau (|dq| + |dk|), since rows and columns sum to one. (2) u is its mean over tokens plus u_o; what
    the mean contributes to f depends on m alone, so |(I - Pi) f|_P <= r |u_o|. (3) P^T keeps the mean, and |P^T u_o| <=
    t |u_o|: the second eigenvalue of P^T P is at most its Birkhoff coefficient tanh^2(D / 4) = t^2 with D <= 4 tau the
    Hilbert diameter of e^s, so t = tanh(tau). Over heads (Cauchy-Schwarz) with t the largest, s = |u_o|, T = diag(tau_h
    r_h), in ``l2``

        L <= max over 0 <= s <= 1 of |W_v| sqrt(1 - (1 - t^2) s^2) + (|T W_q| + |T W_k|) s.

    In ``token_max``, row n moves by sum_m P_nm dv_m + Cov_n(ds_n + db, v), where db = d log b solves db = P^T P db +
    P^T rho - gamma with rho, gamma the means of ds over rows and columns. One factor P or P^T contracts the oscillation
    by t (Birkhoff, near constants), so osc(db) <= osc(P^T rho - gamma) / (1 - t^2) <= 2 (1 + t) max|ds| / (1 - t^2) =
    2 max|ds| / (1 - t), and a standard deviation is at most half an oscillation. With e = 1 / (1 - t):

        L <= sqrt( sum_h ( |W_v^h| + tau_h r_h ( (1 + e_h) |W_k^h| + e_h |W_q^h| ) )^2 ) + |T W_q|.
    """

    op = "sinkhorn_attention@1"
    source = "derivation in the docstring; Birkhoff 1957 for the contraction of positive matrices"
    attrs = {**HeadAttention.attrs, "iterations": integer(1, 4096)}

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        strength, tau = self._strength(call), self._highs(call, "temperature")
        query = self._norm(call, "query", "tr", strength)
        if geometry == "l2":
            key = self._norm(call, "key", "tr", strength)
            return (_steepest(call.norm("value"), add_up(query, key), _rest(max(tau))),)
        terms: list[float] = []
        for h, hottest in enumerate(tau):
            rest = _rest(hottest).low.item()
            slow = div_up(1.0, rest) if rest > 0.0 else math.inf
            q, k, v = (self._head_norm(call, slot, h) for slot in ("query", "key", "value"))
            terms.append(add_up(v, mul_up(strength[h], add_up(mul_up(add_up(1.0, slow), k), mul_up(slow, q)))))
        return (add_up(norm_up(*terms), query),)

    def _weights(self, call: Call, scores: Array) -> Array:
        kernel = np.exp(scores - scores.max(axis=-1, keepdims=True))
        columns, close = np.ones_like(kernel[..., :1, :]), (scores.shape[-1] + 8) * U
        with np.errstate(all="ignore"):
            for _ in range(10_000):
                rows = 1.0 / np.sum(kernel * columns, axis=-1, keepdims=True)
                mass = np.sum(kernel * rows, axis=-2, keepdims=True)
                if np.all(np.abs(columns * mass - 1.0) <= close):
                    return rows * kernel * columns
                columns = 1.0 / mass
        raise KernelError("the scaling to unit rows and columns did not converge: the temperature is too high")

    def _roots(self, call: Call, reach: Array) -> list[float]:
        return [1.0] * reach.size

    def _weight_error(self, call: Call, reach: float, roundoff: float) -> float:
        """A forward in exact arithmetic after j rounds has column factors b_j with Hilbert distance d(b_j, b) from
        their limit, and then weights within e^{+-d} of the limit, since both have rows of sum one.

        A round contracts d by t^2, a half round by t, and the first half round ends within D <= 4 tau. So it is at most
        4 tau t^{2j-1}, plus 2 gamma_{N+3} / (1 - t) for the rounding of every half round. A forward may stop earlier,
        when its column sums lie within 64 u of 1: then d <= cosh^2(tau) log(c_max / c_min) <= 2 gamma_{2N+80} / (1 -
        t^2). Sums are accumulated in float32 at least. Void for tau > 10, where products of scalings may underflow.
        """
        n, fine = call.shapes[0][0], call.arithmetic.sums
        reach = add_up(mul_up(reach, up(1.0 + gamma(head_width(call, "query") + 8, roundoff))), mul_up(8.0, roundoff))
        if not reach <= 10.0:
            return math.inf
        rest = _rest(reach).low.item()
        stopped = div_up(mul_up(2.0, gamma(2 * n + 80, fine)), _flatness(rest))
        last = mul_up(4.0, reach, *[up(1.0 - rest)] * (2 * call.attrs["iterations"] - 1))
        distance = max(stopped, add_up(last, div_up(mul_up(2.0, gamma(n + 3, fine)), rest)))
        grown = float(Enclosure.exactly(min(distance, 700.0)).exp().high)
        entries = add_up(gamma(n + 6, fine), gamma(4, roundoff), call.arithmetic.total(n))
        exponent = mul_up(add_up(mul_up(2.0, reach), 8.0), roundoff)
        return add_up(exponent, up(grown - 1.0), mul_up(2.0, grown, entries)) if distance < 700.0 else math.inf


def _rest(tau: float) -> Enclosure:
    """1 - t for t = tanh(tau): twice the sigmoid of -2 tau."""
    return Enclosure.exactly(2.0) * Enclosure.exactly(-2.0 * min(tau, 1e300)).sigmoid()


def _flatness(rest: float) -> float:
    """1 - t^2 = (1 - t)(1 + t) for a given 1 - t, rounded down."""
    return down(rest * down(2.0 - rest))


def _steepest(value: float, slope: float, rest: Enclosure) -> float:
    """The maximum of value sqrt(1 - (1 - t^2) s^2) + slope s over 0 <= s <= 1.

    Without the limit on s it is sqrt(value^2 + slope^2 / (1 - t^2)); the function is concave, so where it still rises
    at s = 1 (slope t >= value (1 - t^2)) the maximum is value t + slope there.
    """
    low, high = max(rest.low.item(), 0.0), min(rest.high.item(), 1.0)
    if down(slope * (1.0 - high)) > mul_up(value, high, up(2.0 - high)):
        return add_up(mul_up(value, up(1.0 - low)), slope)
    flat = _flatness(low)
    return norm_up(value, div_up(slope, down(math.sqrt(flat)))) if flat > 0.0 else add_up(value, slope)


RULES: tuple[Rule, ...] = (SinkhornAttention(),)
