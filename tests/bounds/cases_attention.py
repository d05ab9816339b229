"""Rows for forms of attention. Random weights stay below these bounds; test_attention*.py has those that reach them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tests.bounds.row import Row

_WHY = "no direction of random weights serves every term: see test_attention_forms.py"
_SLACK = {"l2": _WHY, "token_max": _WHY}
_TAU, _RADIUS = ["softplus", ["tensor", "raw_tau"]], ["softplus", ["tensor", "raw_radius"]]


def _row(
    op: str,
    name: str,
    tokens: int,
    width: int,
    heads: int,
    shared: int = 0,
    vectors: Mapping[str, tuple[int, ...]] | None = None,
    scalars: Mapping[str, Any] | None = None,
    **attrs: Any,
) -> Row:
    """Heads of two entries; temperature and radius read stored vectors unless given."""
    shared = shared or heads
    stored = {} if scalars else {"raw_tau": (heads,), "raw_radius": (shared,)}
    return Row(
        name,
        f"{op}@1",
        ((tokens, width),) * (2 if op == "cross_attention" else 1),
        {"heads": heads} | attrs,
        scalars or {"temperature": _TAU, "radius": _RADIUS},
        {"query": (2 * heads, width), "key": (2 * shared, width), "value": (2 * shared, width)},
        stored | dict(vectors or {}),
        (),
        _SLACK,
        reach=2.0 if op == "open_attention" else math.inf,
    )


def _ball(name: str, tokens: int, width: int, heads: int, shared: int, causal: bool, rotary: float, **more: Any) -> Row:
    return _row(
        "ball_attention", name, tokens, width, heads, shared, kv_heads=shared, causal=causal, rotary=rotary, **more
    )


def _open(name: str, tokens: int, width: int, heads: int, shared: int, causal: bool, **more: Any) -> Row:
    scalars = {"scale": ["exp", ["tensor", "raw"]]}
    vectors = {"raw": (heads,)} | more.pop("vectors", {})
    return _row(
        "open_attention",
        name,
        tokens,
        width,
        heads,
        shared,
        vectors,
        scalars,
        kv_heads=shared,
        causal=causal,
        **more,
    )


def _memory(name: str, shape: tuple[int, ...], heads: int, memory: int, **vectors: tuple[int, ...]) -> Row:
    stored = {"key": (memory, 2 * heads), "value": (memory, 3 * heads)} | vectors
    matrices = {"query": (2 * heads, shape[-1])}
    scalars = {"temperature": 1e-4}  # no score is so large that weights underflow
    return Row(name, "memory_attention@1", (shape,), {"heads": heads}, scalars, matrices, stored, (), _SLACK)


_BIASES = {"query_bias": (4,), "key_bias": (4,), "value_bias": (4,)}
ROWS: tuple[Row, ...] = (
    _ball("ball attention", 3, 4, 2, 2, False, 0),
    _ball("causal attention", 4, 3, 2, 2, True, 0),
    _ball("grouped attention", 3, 4, 4, 2, False, 0),
    _ball("causal attention of one key head", 3, 4, 3, 1, True, 10000.0),
    _ball("rotary attention", 4, 4, 1, 1, False, 100),
    _ball("attention with biases", 3, 4, 2, 1, False, 0, vectors={"bias": (2, 3, 3)}),
    _ball("causal attention with biases", 4, 4, 2, 2, True, 0, vectors={"bias": (2, 4, 4)}),
    _ball("hot causal attention", 3, 4, 2, 2, True, 0, scalars={"temperature": 30.0, "radius": 2.0}),
    _row("cross_attention", "cross attention", 3, 4, 2, 2, kv_heads=2),
    _row("cross_attention", "grouped cross attention", 2, 4, 4, 2, kv_heads=2),
    _row("cross_attention", "cross attention with biases", 3, 3, 2, 1, {"bias": (2, 3, 3)}, kv_heads=1),
    _row("kernel_attention", "kernel attention", 3, 4, 2, causal=False),
    _row("kernel_attention", "causal kernel attention", 4, 3, 1, causal=True),
    _row("sinkhorn_attention", "sinkhorn attention", 3, 4, 2, iterations=64),
    _row("sinkhorn_attention", "sinkhorn attention of one head", 4, 3, 1, iterations=64),
    _row("sinkhorn_attention", "sinkhorn attention of one token", 1, 4, 2, iterations=1),
    _row("sinkhorn_attention", "cold sinkhorn", 3, 4, 2, scalars={"temperature": 0, "radius": 1.5}, iterations=2),
    _row("sinkhorn_attention", "warm sinkhorn", 3, 4, 2, scalars={"temperature": 1.5, "radius": 1.0}, iterations=128),
    _open("open attention", 3, 4, 2, 2, False),
    _open("open attention with biases", 3, 4, 2, 2, False, vectors=_BIASES),
    _open("open causal grouped attention", 4, 3, 2, 1, True, vectors={"bias": (2, 4, 4)}),
    _memory("memory attention", (3, 4), 2, 5),
    _memory("memory attention of one token", (4,), 1, 2, bias=(1, 2)),
)
