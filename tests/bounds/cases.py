"""One row for each built-in rule: a node, the shapes that it is asked about, and how its tensors are drawn.

A new rule is one more row (and its meaning in operations.py). ``sharp`` names the geometries in which some input and
direction reach the bound within 2 %, so that a constant lowered by 2 % must be caught; ``slack`` says why not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.bounds.rounding import Array

Shape = tuple[int, ...]
Draw = Callable[[Shape, np.random.Generator], Array]


def _orthogonal(shape: Shape, rng: np.random.Generator) -> Array:
    q, _ = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    return q if shape[0] >= shape[1] else q.T


def _rank_one(shape: Shape, rng: np.random.Generator) -> Array:
    return np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))


def _hot_rows(shape: Shape, rng: np.random.Generator) -> Array:
    """All of the norm in the first half of the rows: one hot head of two."""
    weight = 1e-3 * rng.standard_normal(shape)
    weight[: max(1, shape[0] // 2)] = rng.standard_normal((max(1, shape[0] // 2), shape[1]))
    return weight


def _repeated_rows(shape: Shape, rng: np.random.Generator) -> Array:
    """Every row the same up to its sign: repeated heads, and ball projections that bind together."""
    return np.sign(rng.standard_normal((shape[0], 1))) * rng.standard_normal((1, shape[1]))


def _near_duplicate_sigma(shape: Shape, rng: np.random.Generator) -> Array:
    q = _orthogonal(shape, rng)
    return q * (1.0 + 1e-5 * rng.standard_normal((shape[0], 1)))


MATRICES: Mapping[str, Draw] = {
    "gaussian": lambda shape, rng: rng.standard_normal(shape),
    "orthogonal": _orthogonal,
    "rank_one": _rank_one,
    "hot_rows": _hot_rows,
    "repeated_rows": _repeated_rows,
    "near_duplicate_sigma": _near_duplicate_sigma,
    "zeros": lambda shape, rng: np.zeros(shape),
    "one_entry": lambda shape, rng: np.where(np.arange(shape[0] * shape[1]).reshape(shape) == 1, 3.0, 0.0),
    "large": lambda shape, rng: 1e4 * rng.standard_normal(shape),
    "small": lambda shape, rng: 1e-4 * rng.standard_normal(shape),
    "integers": lambda shape, rng: rng.integers(-3, 4, size=shape).astype(np.float64),
}


@dataclass(frozen=True)
class Row:
    """A rule under test.

    Attributes:
        op: operation name; ``name`` distinguishes rows of one operation.
        shapes: sample shapes of the inputs.
        attrs, scalars: of the node; scalar expressions read the vectors below by name.
        matrices, vectors: slot (or name, for scalars) -> shape. Matrices are drawn by each of MATRICES in turn.
        sharp: geometries in which the bound is reached within 2 %.
        slack: geometry -> why it is not.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    matrices: Mapping[str, Shape] = field(default_factory=dict)
    vectors: Mapping[str, Shape] = field(default_factory=dict)
    sharp: tuple[str, ...] = ("l2", "token_max")
    slack: Mapping[str, str] = field(default_factory=dict)

    def kinds(self) -> list[str]:
        """The kinds of matrices that this row is tried with."""
        kinds = list(MATRICES) if self.matrices else ["gaussian"]
        return kinds[::2] if len(self.matrices) > 1 else kinds  # attention is the slowest

    def example(self, kind: str) -> Example:
        """The node and its float32 tensors for one kind of matrices."""
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {kind}".encode()))
        drawn = {name: MATRICES[kind](shape, rng) for name, shape in self.matrices.items()}
        drawn |= {name: rng.standard_normal(shape) for name, shape in self.vectors.items()}
        weights = {name: np.asarray(value, dtype=np.float32) for name, value in drawn.items()}
        slots = {slot: slot for slot in [*self.matrices, *self.vectors] if slot not in _READ_BY_SCALARS}
        node = Node(self.op, tuple(range(len(self.shapes))), dict(self.attrs), slots, dict(self.scalars))
        return Example(node, self.shapes, weights)


@dataclass(frozen=True)
class Example:
    """A node with the sample shapes of its inputs and its stored tensors by name (slot and name are the same)."""

    node: Node
    shapes: tuple[Shape, ...]
    weights: Mapping[str, Array]


_READ_BY_SCALARS = ("raw", "raw_tau", "raw_radius")
_TAU, _RADIUS = ["softplus", ["tensor", "raw_tau"]], ["softplus", ["tensor", "raw_radius"]]
_ATTENTION_SLACK = {
    "l2": "the three terms of the sum are not reached by one direction of random weights: see test_attention.py",
    "token_max": "as in l2",
}


def _attention(name: str, tokens: int, width: int, heads: int, rows: int, **scalars: Any) -> Row:
    matrices = dict.fromkeys(("query", "key", "value"), (rows, width))
    given = {"temperature": _TAU, "radius": _RADIUS} | scalars
    vectors = {"raw_tau": (heads,), "raw_radius": (heads,)} if not scalars else {}
    attrs = {"heads": heads}
    shapes = ((tokens, width),)
    return Row(name, "softmax_attention@1", shapes, attrs, given, matrices, vectors, (), _ATTENTION_SLACK)


ROWS = (
    Row("normalize", "normalize@1", ((3, 2, 2),), {"mean": [0.5, 0.1, -2.0], "std": [1.0, 0.25, 3]}),
    Row("normalize one channel", "normalize@1", ((1, 1, 3),), {"mean": [0], "std": [0.001]}),
    Row("patchify", "patchify@1", ((2, 4, 6),), {"patch": 2}),
    Row("patchify whole image", "patchify@1", ((1, 3, 3),), {"patch": 3}),
    Row("patch merge", "patch_merge@1", ((8, 3),), {"height": 2, "width": 4, "factor": 2}),
    Row("shift", "shift@1", ((12, 9),), {"height": 3, "width": 4, "moved": 2}),
    Row("shift of all channels", "shift@1", ((9, 4),), {"height": 3, "width": 3, "moved": 1}),
    Row("shift on a row", "shift@1", ((3, 5),), {"height": 1, "width": 3, "moved": 1}),
    Row("shift of two rows", "shift@1", ((4, 4),), {"height": 2, "width": 2, "moved": 1}),
    Row("shift of one token", "shift@1", ((1, 8),), {"height": 1, "width": 1, "moved": 2}),
    Row("token mixing", "token_mixing@1", ((4, 3),), matrices={"weight": (4, 4)}),
    Row("token mixing of one", "token_mixing@1", ((1, 3),), matrices={"weight": (1, 1)}),
    Row("channel offset", "offset@1", ((3, 4),), {"axis": "channel", "negative": False}, vectors={"offset": (4,)}),
    Row(
        "channel offset of one token",
        "offset@1",
        ((4,),),
        {"axis": "channel", "negative": True},
        vectors={"offset": (4,)},
    ),
    Row("token offset", "offset@1", ((3, 4),), {"axis": "token", "negative": True}, vectors={"offset": (3,)}),
    Row("scale", "scale@1", ((2, 3),), scalars={"factor": ["div", 3, ["exp", ["tensor", "raw"]]]}, vectors={"raw": ()}),
    Row(
        "negative scale",
        "scale@1",
        ((2, 3),),
        scalars={"factor": ["sub", 0.1, ["tensor", "raw"]]},
        vectors={"raw": (1,)},
    ),
    Row(
        "residual", "residual@1", ((3, 2),) * 2, scalars={"weight": ["sigmoid", ["tensor", "raw"]]}, vectors={"raw": ()}
    ),
    Row("residual beyond one", "residual@1", ((3, 2),) * 2, scalars={"weight": 2.5}),
    Row("residual below zero", "residual@1", ((3, 2),) * 2, scalars={"weight": -1.5}),
    Row(
        "residual of one entry",
        "residual@1",
        ((3, 2),) * 2,
        scalars={"weight": ["sigmoid", ["tensor", "raw"]]},
        vectors={"raw": (1,)},
    ),
    Row("linear", "linear@1", ((3, 4),), {"transpose": False}, {}, {"weight": (5, 4)}, {"bias": (5,)}),
    Row("linear transposed", "linear@1", ((3, 5),), {"transpose": True}, {}, {"weight": (5, 4)}),
    Row("linear on one token", "linear@1", ((4,),), {"transpose": False}, {}, {"weight": (2, 4)}, {"bias": (2,)}),
    Row("linear to one channel", "linear@1", ((2, 3),), {"transpose": False}, {}, {"weight": (1, 3)}),
    Row("head", "normalized_linear@1", ((4,),), {"eps": 1e-12}, {}, {"weight": (3, 4)}, {"bias": (3,)}),
    Row("head of many rows", "normalized_linear@1", ((2,),), {"eps": 0.5}, {}, {"weight": (7, 2)}),
    Row("maxmin", "maxmin@1", ((3, 4),)),
    Row("maxmin of one token", "maxmin@1", ((6,),)),
    Row("group sort", "group_sort@1", ((2, 6),), {"group": 3}),
    Row("full sort", "group_sort@1", ((5,),), {"group": 5}),
    Row("abs", "abs@1", ((2, 4),), {"channels": 3}),
    Row("l2 pool", "l2_pool@1", ((4, 3),), {"eps": 1e-12}),
    Row(
        "l2 pool with a large eps",
        "l2_pool@1",
        ((2, 2),),
        {"eps": 1.0},
        sharp=(),
        slack={"l2": "eps rounds the tip", "token_max": "eps rounds the tip"},
    ),
    Row("sum pool", "sum_pool@1", ((5, 3),)),
    _attention("attention", 3, 4, 1, 4),
    _attention("attention of two heads", 4, 6, 2, 4),
    _attention("attention of three narrow heads", 2, 3, 3, 3),
    _attention("attention of one token", 1, 4, 2, 4),
    _attention("cold attention", 3, 4, 2, 4, temperature=0, radius=1.0),
    _attention("hot attention", 3, 4, 2, 4, temperature=30.0, radius=2.0),
    _attention("attention of tiny values", 3, 4, 2, 4, temperature=1.0, radius=1e-6),
)
