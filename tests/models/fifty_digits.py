"""A program evaluated in 50 digits: what the exact network says, to compare floating-point forward passes with.

Values are arrays of mpmath numbers. Operations that only move, add and multiply entries mean the same for any kind of
number, so the kernel's own meaning is used for them; the others stand here a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np

from hf_lipschitz.bounds import engine
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rule import Call, NormTable
from hf_lipschitz.bounds.rules.table import BUILT_IN

DIGITS = 50
_mpf = np.frompyfunc(mpmath.mpf, 1, 1)
_sqrt = np.frompyfunc(mpmath.sqrt, 1, 1)
_exp = np.frompyfunc(mpmath.exp, 1, 1)


def evaluate(program: Program, weights: Mapping[str, Array], inputs: Array) -> dict[str, Array]:
    """Outputs (object arrays) of a batch of float inputs, which are taken as exact."""
    with mpmath.workdps(DIGITS):
        values: list[Array] = []
        shapes: list[tuple[int, ...]] = []
        for index, node in enumerate(program.nodes):
            rule, call = engine._prepare(index, node, weights, BUILT_IN, shapes, NormTable())
            shapes.append(rule.shape(call))
            object.__setattr__(call, "tensors", {slot: _mpf(tensor) for slot, tensor in call.tensors.items()})
            scalars = {slot: value_of(expression, weights) for slot, expression in node.scalars.items()}
            given = [values[i] for i in node.inputs] or [_mpf(np.asarray(inputs, dtype=np.float64))]
            meaning = _MEANINGS.get(node.op)
            values.append(rule.apply(call, *given) if meaning is None else meaning(call, scalars, *given))
        return {name: values[index] for name, index in program.outputs.items()}


def value_of(expression: Any, weights: Mapping[str, Array]) -> Array:
    """A scalar expression in 50 digits, as an object array of shape () or (n,)."""
    if not isinstance(expression, list):
        return np.asarray(mpmath.mpf(expression), dtype=object)
    head, *arguments = expression
    if head == "tensor":
        return np.asarray(_mpf(weights[arguments[0]].astype(np.float64)), dtype=object)
    parts = [value_of(argument, weights) for argument in arguments]
    return np.asarray(_SCALAR[head](*parts), dtype=object)


_SCALAR: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": _sqrt,
    "exp": _exp,
    "softplus": np.frompyfunc(lambda x: mpmath.log1p(mpmath.exp(x)), 1, 1),
    "sigmoid": np.frompyfunc(lambda x: 1 / (1 + mpmath.exp(-x)), 1, 1),
    "max": np.max,
}


def _normalize(call: Call, scalars: Mapping[str, Array], x: Array) -> Array:
    mean, std = (_mpf(np.asarray(call.attrs[key], dtype=float))[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def _scale(call: Call, scalars: Mapping[str, Array], x: Array) -> Array:
    return x * scalars["factor"].item()


def _residual(call: Call, scalars: Mapping[str, Array], x: Array, y: Array) -> Array:
    a = scalars["weight"].item()
    return x * (1 - a) + y * a


def _head(call: Call, scalars: Mapping[str, Array], x: Array) -> Array:
    weight = call.tensors["weight"]
    norm = np.maximum(_sqrt((weight * weight).sum(axis=1)), mpmath.mpf(call.attrs["eps"]))
    result = x.dot((weight / norm[:, None]).T)
    return result + call.tensors["bias"] if "bias" in call.tensors else result


def _l2_pool(call: Call, scalars: Mapping[str, Array], x: Array) -> Array:
    return _sqrt((x * x).sum(axis=1) + mpmath.mpf(call.attrs["eps"]))


def _sum_pool(call: Call, scalars: Mapping[str, Array], x: Array) -> Array:
    return x.sum(axis=1) / mpmath.sqrt(x.shape[1])


def _attention(call: Call, scalars: Mapping[str, Array], x: Array) -> Array:
    heads, outputs = call.attrs["heads"], []
    tau, radius = (np.broadcast_to(scalars[slot], (heads,)) for slot in ("temperature", "radius"))
    for h in range(heads):
        q, k, v = (x.dot(np.split(call.tensors[slot], heads)[h].T) for slot in ("query", "key", "value"))
        q, k, v = _ball(q, mpmath.mpf(1)), _ball(k, mpmath.mpf(1)), _ball(v, radius[h])
        weights = _exp(np.stack([a.dot(b.T) for a, b in zip(q, k, strict=True)]) * tau[h])
        weights = weights / weights.sum(axis=-1, keepdims=True)
        outputs.append(np.stack([a.dot(b) for a, b in zip(weights, v, strict=True)]))
    return np.concatenate(outputs, axis=-1)


def _sinkhorn(call: Call, scalars: Mapping[str, Array], x: Array) -> Array:
    heads, outputs = call.attrs["heads"], []
    tau, radius = (np.broadcast_to(scalars[slot], (heads,)) for slot in ("temperature", "radius"))
    for h in range(heads):
        q, k, v = (x.dot(np.split(call.tensors[slot], heads)[h].T) for slot in ("query", "key", "value"))
        q, k, v = _ball(q, mpmath.mpf(1)), _ball(k, mpmath.mpf(1)), _ball(v, radius[h])
        weights = _exp(np.stack([a.dot(b.T) for a, b in zip(q, k, strict=True)]) * tau[h])
        for _ in range(120):  # rows last
            weights = weights / weights.sum(axis=-2, keepdims=True)
            weights = weights / weights.sum(axis=-1, keepdims=True)
        outputs.append(np.stack([a.dot(b) for a, b in zip(weights, v, strict=True)]))
    return np.concatenate(outputs, axis=-1)


def _ball(x: Array, radius: Any) -> Array:
    norm = _sqrt((x * x).sum(axis=-1, keepdims=True))
    return x * np.minimum(mpmath.mpf(1), radius / np.maximum(norm, mpmath.mpf(10) ** -300))


_MEANINGS: dict[str, Callable[..., Array]] = {
    "normalize@1": _normalize,
    "scale@1": _scale,
    "residual@1": _residual,
    "normalized_linear@1": _head,
    "l2_pool@1": _l2_pool,
    "sum_pool@1": _sum_pool,
    "softmax_attention@1": _attention,
    "sinkhorn_attention@1": _sinkhorn,
}
