"""Forms of attention with ball projections: causal, grouped, with score biases, between two inputs, unnormalised."""

from __future__ import annotations

import numpy as np

from ..rounding import Array, Enclosure, U, add_up, gamma, mul_up, sqrt_up
from ..rule import Call, Rule, Shape, Size
from .attention_heads import HeadAttention, head_width
from .attributes import integer, need, number, one_of


class Masked(HeadAttention):
    """Softmax over the visible keys of tau <q, k> + bias.

    Derivation, as of softmax_attention@1 but for what follows. A weight is at most p_nm <= e^{b_nm} / (e^{b_nm} +
    e^{-2 tau} sum of e^{b_nj} over the other visible j), and c_h is the largest column sum of that. A key/value head g
    adds up over the query heads h that it serves, u = (u^h): |sum_h P_h^T u^h| <= |u| sqrt(sum_h c_h), since the
    stacked P_h have rows of sum one; and the keys' term is at most |u| sqrt(sum_h (tau_h r_g)^2 c_h) |dk^g|. So S has
    the entries sqrt(sum_h c_h) and T S the entries sqrt(sum_h (tau_h r_g)^2 c_h); in ``token_max`` the sum over heads
    runs over query heads. Rotations are isometries and change nothing.

    Padding: a token that is masked as a key and whose output is multiplied by 0 is as if it were not there, and c grows
    with the number of tokens, so that a bound for N tokens holds for fewer visible ones. A query that is masked but
    counted, or sees no key at all, is not covered.
    """

    attrs = {**HeadAttention.attrs, "kv_heads": integer(1, 4096)}
    tensors = {**HeadAttention.tensors, "bias": 3}
    optional = frozenset({"bias"})

    def _roots(self, call: Call, reach: Array) -> list[float]:
        causal, (queries, keys) = call.attrs.get("causal"), (call.shapes[0][0], call.shapes[-1][0])
        if not causal and "bias" not in call.tensors:
            return super()._roots(call, reach)
        low, high = np.ones((2, 1, queries, 1))  # without biases all columns are at most the first
        total = np.arange(1.0, queries + 1.0)[:, None]
        if "bias" in call.tensors:
            values, where = np.unique(call.tensors["bias"], return_inverse=True)
            need(values.size <= 65536, f"tensor {call.names['bias']!r} has more than 65536 different entries")
            power, visible = Enclosure.exactly(values).exp(), np.tri(queries) if causal else 1.0
            shape = call.tensors["bias"].shape
            low, high = (ends[where].reshape(shape) * visible for ends in (power.low, power.high))
            total = low.sum(axis=-1, keepdims=True) * (1.0 - 2.0 * gamma(keys + 2))
        decay = (Enclosure.exactly(-2.0) * Enclosure.exactly(np.minimum(reach, 1e300))).exp().low.reshape(-1, 1, 1)
        others = np.maximum(total - low, 0.0) * decay * (1.0 - 8.0 * U)
        whole = np.where(high > 0.0, high + others, 1.0)
        sums = (high / whole).sum(axis=-2).max(axis=-1) * (1.0 + 2.0 * gamma(queries + 8))
        return [sqrt_up(min(float(c), float(queries))) for c in np.broadcast_to(sums, (len(reach),))]


class BallAttention(Masked):
    """Self-attention; query n sees the keys m <= n if ``causal``; q and k are rotated by their positions if ``rotary``.

    ``rotary`` is the base of the angles n base^(-2i/d) by which the n-th token's entries i and i + d/2 turn, 0 for
    none. ``bias`` (heads, N, N) is added to the scores.
    """

    op = "ball_attention@1"
    source = "derivation in the docstring, with that of softmax_attention@1"
    attrs = {**Masked.attrs, "causal": one_of(True, False), "rotary": number(0.0, 1e12)}

    def shape(self, call: Call) -> Shape:
        base = call.attrs["rotary"]
        need(not 0.0 < base < 1.0, f"the rotary base is {base}: it must be 0 or at least 1")
        need(not base or head_width(call, "query") % 2 == 0, "rotary heads must have an even number of entries")
        return super().shape(call)


class CrossAttention(Masked):
    """Queries from the first input (N_q tokens), keys and values from the second (N_k): gains |T W_q| and the rest.

    All N_k keys are visible, so c_h = N_q / (1 + (N_k - 1) e^{-2 tau_h}) without biases.
    """

    op = "cross_attention@1"
    source = "derivation of ball_attention@1; the inputs' terms add up separately"
    arity = 2


class KernelAttention(HeadAttention):
    """Weights e^{s - tau} / N, not normalised, of the keys m <= n if ``causal``, else of all.

    Derivation. Weights w are at most 1/N and there are N^2, so |w| <= 1 as a matrix; and with unit u, sum_nm w_nm
    <u_n, v_m> ds_nm <= r tau sum_n |u_n| sum_m (|dq_n| + |dk_m|) / N <= r tau (|dq| + |dk|). Hence the l2 bound of
    softmax_attention@1 with c = 1; rows of w sum to at most one, so its ``token_max`` bound holds as it is. Masked or
    padded tokens only take terms away, where N stays what it is.
    """

    op = "kernel_attention@1"
    source = "derivation in the docstring"
    attrs = {**HeadAttention.attrs, "causal": one_of(True, False)}

    def _weights(self, call: Call, scores: Array) -> Array:
        tau = np.broadcast_to(call.scalar("temperature"), (call.attrs["heads"],))[:, None, None]
        return np.exp(scores - tau) / scores.shape[-1]

    def _roots(self, call: Call, reach: Array) -> list[float]:
        return [1.0] * reach.size

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # computed scores may exceed the computed tau, so that weights exceed 1/N by an exponential
        ball, hottest = gamma(head_width(call, "query") + 16, roundoff), max(self._highs(call, "temperature"))
        excess = add_up(
            mul_up(hottest, add_up(ball, ball, mul_up(ball, ball))), mul_up(4.0, call.deviations["temperature"])
        )
        growth = float(Enclosure.exactly(min(add_up(excess, gamma(8, roundoff)), 700.0)).exp().high)
        return mul_up(growth, super().rounding(call, roundoff, incoming))


RULES: tuple[Rule, ...] = (BallAttention(), CrossAttention(), KernelAttention())
