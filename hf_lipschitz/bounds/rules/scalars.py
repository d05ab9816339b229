"""Scalar expressions over tensors: the small closed grammar for residual weights, temperatures, radii and normalisers.

An expression is JSON: a number, or a list whose head names an operation::

    ["tensor", "blocks.0.mixer.alpha"]     a stored tensor of at most one dimension (one entry a head)
    ["add", e, f]  ["sub", e, f]  ["mul", e, f]  ["div", e, f]     elementwise, scalars broadcast
    ["sqrt", e]  ["exp", e]  ["softplus", e]  ["sigmoid", e]       elementwise
    ["max", e]                                                    the largest entry, a scalar

The kernel encloses the value outward and multiplies what is there; it never assumes that a factor is the reciprocal of
anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from .. import strict_json
from ..errors import KernelError
from ..rounding import Array, Enclosure, largest

_BINARY: dict[str, Callable[[Enclosure, Enclosure], Enclosure]] = {
    "add": Enclosure.__add__,
    "sub": Enclosure.__sub__,
    "mul": Enclosure.__mul__,
    "div": Enclosure.__truediv__,
}
_UNARY: dict[str, Callable[[Enclosure], Enclosure]] = {
    "sqrt": Enclosure.sqrt,
    "exp": Enclosure.exp,
    "softplus": Enclosure.softplus,
    "sigmoid": Enclosure.sigmoid,
    "max": Enclosure.maximum,
}
# Units in the last place that a float library may be off by, for claim 3 only: arithmetic and sqrt are correctly
# rounded, exp, softplus and sigmoid are composed of library calls, for which 8 is an assumption.
_FORWARD_ULPS = {"add": 1, "sub": 1, "mul": 1, "div": 1, "sqrt": 1, "exp": 8, "softplus": 8, "sigmoid": 8, "max": 0}
MAX_ENTRIES = 65536
MAX_COST = 2**18  # of all expressions of one program: some seconds at every reading


def check_expression(expression: Any, where: str) -> None:
    """Raise KernelError unless ``expression`` is of the grammar above."""
    if type(expression) is int and abs(expression) <= 2**53:
        return
    if type(expression) is float:
        return
    parts = strict_json.list_of(expression, where)
    head = parts[0] if parts and isinstance(parts[0], str) else None
    if head == "tensor" and len(parts) == 2 and isinstance(parts[1], str):
        return
    arity = 2 if head in _BINARY else 1 if head in _UNARY else None
    if arity is None:
        raise KernelError(
            f"{where}: unknown scalar operation {head!r}; known: {', '.join(_FORWARD_ULPS)}, tensor (name)"
        )
    if len(parts) != arity + 1:
        raise KernelError(f"{where}: {head!r} takes {arity} arguments, got {len(parts) - 1}")
    for argument in parts[1:]:
        check_expression(argument, where)


def expression_tensors(expression: Any) -> Iterator[str]:
    """The names of the tensors an expression reads."""
    parts = cast("list[Any]", expression) if isinstance(expression, list) else []
    if parts and parts[0] == "tensor":
        yield parts[1]
    for argument in parts[1:]:
        yield from expression_tensors(argument)


def expression_cost(expression: Any, tensors: Mapping[str, Array]) -> int:
    """How many numbers an enclosure of the expression has to work out, at most."""
    parts = cast("list[Any]", expression) if isinstance(expression, list) else []
    entries = max((tensors[name].size for name in expression_tensors(expression)), default=1)
    return entries + sum(expression_cost(argument, tensors) for argument in parts[1:] if isinstance(argument, list))


@np.errstate(over="ignore", invalid="ignore")  # what overflows becomes an infinite end, or NaN, and no finite bound
def enclose(expression: Any, tensors: Mapping[str, Array], roundoff: float = 0.0) -> Enclosure:
    """Enclose the real value of a checked expression: elementwise, shape () or (n,).

    Args:
        expression: JSON, see the module docstring.
        tensors: stored tensors by name, at most one-dimensional.
        roundoff: 0 for the real value; the unit roundoff u of a dtype for every value that a forward pass in that dtype
            may compute (each operation and each constant widened by its rounding); NaN where that may overflow.

    Raises:
        KernelError: division by an enclosure of zero, a negative square root, a tensor that is not at most 1-D or not
        finite.
    """
    if not isinstance(expression, list):
        return Enclosure.exactly(float(expression)).widened(roundoff)
    head, *parts = cast("list[Any]", expression)
    if head == "tensor":
        value = tensors[parts[0]]
        if value.dtype.kind != "f" or value.ndim > 1 or not 0 < value.size <= MAX_ENTRIES:
            found = f"{value.dtype} of shape {value.shape}"
            raise KernelError(f"tensor {parts[0]!r} is {found}: a scalar expression takes floats of one dimension")
        return Enclosure.exactly(value)
    arguments = [enclose(part, tensors, roundoff) for part in parts]
    if head in _UNARY:
        result = _UNARY[head](arguments[0])
    else:
        shapes = {np.shape(a.low) for a in arguments if np.shape(a.low) != ()}
        if len(shapes) > 1:
            raise KernelError(f"scalar operation {head!r} combines tensors of shapes {sorted(shapes)}")
        result = _BINARY[head](*arguments)
    result = result.widened(_FORWARD_ULPS[head] * roundoff)
    if roundoff and not np.all(np.maximum(np.abs(result.low), np.abs(result.high)) <= largest(roundoff)):
        return Enclosure(result.low * np.nan, result.high * np.nan)
    return result
