"""What a row of the rule tables is: a node, the shapes that it is asked about, and how its tensors are drawn.

``sharp`` names the geometries in which some input and direction reach the bound within 2 %, so that a constant lowered
by 2 % must be caught; ``slack`` says why not.
"""

from __future__ import annotations

import math
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
        matrices, vectors: slot (or name, for scalars) -> shape. Matrices are drawn by each of MATRICES in turn; kernels
            of more dimensions as matrices with one row for each output channel.
        positive: vectors whose entries are made positive (variances).
        sharp: geometries in which the bound is reached within 2 %.
        slack: geometry -> why it is not.
        reach: the largest token norm of the inputs that the constant is searched on.
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
    positive: frozenset[str] = frozenset()
    reach: float = math.inf

    def kinds(self) -> list[str]:
        """The kinds of matrices that this row is tried with."""
        kinds = list(MATRICES) if self.matrices else ["gaussian"]
        return kinds[::2] if len(self.matrices) > 1 else kinds  # attention is the slowest

    def example(self, kind: str) -> Example:
        """The node and its float32 tensors for one kind of matrices."""
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {kind}".encode()))
        drawn = {name: _kernel(MATRICES[kind], shape, rng) for name, shape in self.matrices.items()}
        drawn |= {name: rng.standard_normal(shape) for name, shape in self.vectors.items()}
        drawn |= {name: np.abs(drawn[name]) + 1e-3 for name in self.positive}
        weights = {name: np.asarray(value, dtype=np.float32) for name, value in drawn.items()}
        slots = {slot: slot for slot in [*self.matrices, *self.vectors] if slot not in READ_BY_SCALARS}
        node = Node(self.op, tuple(range(len(self.shapes))), dict(self.attrs), slots, dict(self.scalars))
        return Example(node, self.shapes, weights, self.reach)


@dataclass(frozen=True)
class Example:
    """A node with the sample shapes of its inputs and its stored tensors by name (slot and name are the same)."""

    node: Node
    shapes: tuple[Shape, ...]
    weights: Mapping[str, Array]
    reach: float = math.inf


READ_BY_SCALARS = ("raw", "raw_tau", "raw_radius")


def _kernel(draw: Draw, shape: Shape, rng: np.random.Generator) -> Array:
    return draw((shape[0], math.prod(shape[1:])), rng).reshape(shape)
