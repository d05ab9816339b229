"""Terms of rules that form a matrix in float64 before its norm is taken, and of distances in a memory.

Derivations: the docstrings of ``rules/affine.py``, ``attention_heads.py``, ``attention_open.py`` and
``attention_sinkhorn.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.bounds.rounding import Array, Enclosure
from hf_lipschitz.bounds.rule import Call, Rule
from hf_lipschitz.bounds.rules import affine, attention_heads, attention_open, attention_sinkhorn
from tests.bounds.row import Example
from tests.bounds.search import ask
from tests.second_checker.coarse import COARSE, at_least, at_most, coarse
from tests.second_checker.exact import Interval, exactly, gamma
from tests.second_checker.norms import fractions_of, frobenius, spectral_norm


def _once_rounded(matrix: Array, unit: Fraction) -> Interval:
    """The norm of a matrix whose entries are single products, each rounded once: |fl(A)| + u |fl(A)|_F."""
    exact = fractions_of(matrix)
    return spectral_norm(exact) + exactly(unit) * frobenius(exact)


def normalized_rows() -> None:
    """Rows stray by gamma_{d/2 + 6} relatively, which |fl(W)|_F times that covers."""
    for width in (2, 4, 60):
        weight = np.random.default_rng(width).standard_normal((3, width))
        rule, call = ask(
            Example(Node("normalized_linear@1", (0,), {"eps": 1e-12}, {"weight": "w"}), ((width,),), {"w": weight})
        )
        with coarse(affine):
            value = rule.gains(call, "l2")[0]
        rows = fractions_of(rule._rows(call))  # type: ignore[attr-defined]
        exact = spectral_norm(rows) + gamma(width // 2 + 6, COARSE) * frobenius(rows)
        at_least(value, exact, f"norm of rows of unit norm, {width} wide")


def _attention(op: str, weights: dict[str, Array], **scalars: float) -> tuple[Rule, Call]:
    width = weights["query"].shape[1]
    return ask(Example(Node(op, (0,), {"heads": 2}, {s: s for s in weights}, scalars), ((3, width),), weights))


def scaled_rows_of_heads() -> None:
    """diag(s) W for large and small s."""
    draw = np.random.default_rng(8).standard_normal
    weights = {slot: draw((4, 3)) for slot in ("query", "key", "value")}
    for scale in ([64.0, 128.0], [2.0**-6, 2.0**-9]):
        rule, call = _attention("softmax_attention@1", weights, temperature=1.0, radius=1.0)
        with coarse(attention_heads):
            value = rule._norm(call, "query", "tr", scale)  # type: ignore[attr-defined]
        matrix = np.repeat(scale, 2)[:, None] * weights["query"]
        at_least(value, _once_rounded(matrix, COARSE), f"rows scaled by {scale}")
        at_most(value, _once_rounded(matrix, 4 * COARSE), 0.0, f"rows scaled by {scale}")


def memory_of_rounded_rows() -> None:
    """tau diam(K) diam(V) / 4 times the rows of W."""
    draw = np.random.default_rng(9).standard_normal
    weights = {"query": draw((4, 3)), "key": draw((5, 4)), "value": draw((5, 6))}
    rule, call = _attention("memory_attention@1", weights, temperature=2.0)
    with coarse(attention_open):
        value = rule.gains(call, "l2")[0]
        spans = [attention_open._diameters(weights[slot], 2) for slot in ("key", "value")]
    factors = [0.5 * k * v for k, v in zip(*spans, strict=True)]
    matrix = np.repeat(factors, 2)[:, None] * weights["query"]
    at_least(value, _once_rounded(matrix, COARSE) * exactly(1 - Fraction(1, 1 << 40)), "rows of a memory")


def products_that_underflow() -> None:
    """What is lost below 2^-1074 is at most half of that an entry, so that n entries lose at most sqrt(n) 2^-1075."""
    draw = np.random.default_rng(10).standard_normal
    weights = {slot: 2.0**-1000 * draw((4, 3)) for slot in ("query", "key", "value")}
    for power in (-72, -76, -120):
        rule, call = _attention("softmax_attention@1", weights, temperature=1.0, radius=1.0)
        value = rule._norm(call, "query", "tr", [2.0**power, 0.0])  # type: ignore[attr-defined]
        exact = spectral_norm(fractions_of(weights["query"][:2])) * exactly(Fraction(2) ** power)
        at_least(value, exact, f"rows scaled by 2^{power}")
    # each product is just below half a unit, so that all of it is lost
    weights = {slot: np.full((2, 400), 2.0**-1000) for slot in ("query", "key", "value")}
    rule, call = _attention("softmax_attention@1", weights, temperature=1.0, radius=1.0)
    value = rule._norm(call, "query", "tr", [0.49 * 2.0**-74])  # type: ignore[attr-defined]
    exact = spectral_norm(fractions_of(weights["query"])) * exactly(Fraction(0.49) / (1 << 74))
    at_least(value, exact, "rows whose every product underflows")
    weights = {"query": 2.0**-1000 * draw((4, 3)), "key": draw((5, 4)), "value": draw((5, 6))}
    spans = [attention_open._diameters(weights[slot], 2)[0] for slot in ("key", "value")]
    for power in (-72, -76, -120):
        rule, call = _attention("memory_attention@1", weights, temperature=2.0**power)
        exact = spectral_norm(fractions_of(weights["query"][:2])) * exactly(Fraction(2) ** (power - 2))
        exact = exact * exactly(Fraction(spans[0])) * exactly(Fraction(spans[1]))
        at_least(rule.gains(call, "l2")[0], exact * exactly(1 - Fraction(1, 1 << 40)), f"rows of a memory, 2^{power}")
    query = np.full((1, 400), 2.0**-1000)
    weights = {"query": query, "key": draw((5, 2)), "value": draw((5, 3))}
    spans = [attention_open._diameters(weights[slot], 1)[0] for slot in ("key", "value")]
    temperature = 0.49 * 4.0 * 2.0**-74 / (spans[0] * spans[1])
    node = Node("memory_attention@1", (0,), {"heads": 1}, {s: s for s in weights}, {"temperature": temperature})
    rule, call = ask(Example(node, ((3, 400),), weights))
    exact = exactly(Fraction(temperature) / 4) * exactly(Fraction(spans[0])) * exactly(Fraction(spans[1]))
    exact = exact * spectral_norm(fractions_of(query)) * exactly(1 - Fraction(1, 1 << 40))
    at_least(rule.gains(call, "l2")[0], exact, "a memory whose every product underflows")
    for eps in (0.92, 0.95, 0.99):  # every quotient is rounded down to 5 units
        weight = np.full((1, 400), 5 * 2.0**-1074)
        node = Node("normalized_linear@1", (0,), {"eps": eps}, {"weight": "w"})
        rule, call = ask(Example(node, ((400,),), {"w": weight}))
        exact = spectral_norm(fractions_of(weight)) * exactly(1 / Fraction(eps))
        at_least(rule.gains(call, "l2")[0], exact, f"rows of subnormal numbers, eps {eps}")


def _diameter(rows: Array) -> Interval:
    exact = fractions_of(rows)
    return exactly(max(sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) for pair in _pairs(exact))).sqrt()


def _pairs(rows: Array) -> list[tuple[Array, Array]]:
    return list(itertools.combinations_with_replacement(rows, 2))


def distances_in_a_memory() -> None:
    """A sum of d squares of differences errs by gamma_{d+2}, its root by one rounding more."""
    for width in (1, 2, 60):
        stored = np.random.default_rng(width).standard_normal((4, 2 * width))
        with coarse(attention_open):
            found = attention_open._diameters(stored, 2)
        factor = exactly(1 / (1 - COARSE)) / (exactly(1) - gamma(width + 2, COARSE)).sqrt()
        for head, value in enumerate(found):
            exact = _diameter(stored[:, head * width : (head + 1) * width])
            at_least(value, exact * factor, f"diameter of vectors {width} wide")
            at_most(value, exact, float(4 * (width + 8) * COARSE), f"diameter of vectors {width} wide")
    # one head's vectors are so close, next to another's, that the squares of their distances underflow
    stored = np.ones((3, 4))
    stored[:, 2:] = 2.0**-540 * np.arange(6).reshape(3, 2)
    for head, value in enumerate(attention_open._diameters(stored, 2)):
        at_least(value, _diameter(stored[:, 2 * head : 2 * head + 2]), "diameter of vectors that underflow")


def steepest_direction() -> None:
    """max over s in [0, 1] of v sqrt(1 - (1 - t^2) s^2) + b s is v t + b if b t >= v (1 - t^2), else sqrt(v^2 + b^2 /
    (1 - t^2)); if t may be one, v + b bounds it.
    """
    for value, slope, rest in itertools.product((0.0, 1.0, 3.0), (0.25, 1.0, 2.0), (1.0, 0.75, 0.5, 2.0**-6)):
        t = 1 - Fraction(rest)
        v, b, flat = exactly(value), exactly(slope), exactly(1 - t * t)
        ends = Fraction(slope) * t >= Fraction(value) * (1 - t * t)
        exact = v * exactly(t) + b if ends else (v.square() + b.square() / flat).sqrt()
        found = attention_sinkhorn._steepest(value, slope, Enclosure.exactly(rest))
        at_least(found, exact, f"steepest direction, {value} {slope} {rest}")
        at_most(found, exact, 1e-12, f"steepest direction, {value} {slope} {rest}")
        anything = Enclosure(np.asarray(0.0), np.asarray(1.0))
        at_least(attention_sinkhorn._steepest(value, slope, anything), v + b, "steepest direction, any t")


CHECKS: tuple[Callable[[], None], ...] = (
    normalized_rows,
    scaled_rows_of_heads,
    memory_of_rounded_rows,
    products_that_underflow,
    distances_in_a_memory,
    steepest_direction,
)
