"""Softmax attention with bounded scores."""

from __future__ import annotations

from ..rule import Rule
from . import attention_balls, attention_open, attention_sinkhorn
from .attention_heads import HeadAttention


class SoftmaxAttention(HeadAttention):
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


RULES: tuple[Rule, ...] = (
    SoftmaxAttention(),
    *attention_balls.RULES,
    *attention_sinkhorn.RULES,
    *attention_open.RULES,
)
