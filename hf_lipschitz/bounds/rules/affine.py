"""Affine maps: pixel normalisation, linear layers, and the head with rows of unit norm."""

from __future__ import annotations

import numpy as np

from ..rounding import Array, add_up, array_norm_up, div_up, gamma, mul_up, sqrt_up
from ..rule import Call, Geometry, Rule, Shape, Size, tokens_of
from .attributes import list_of, need, number, one_of


class Normalize(Rule):
    """(x_c - mean_c) / std_c on every channel of an image."""

    op = "normalize@1"
    source = "a diagonal map followed by a translation: sigma_max = 1 / min std"
    attrs = {"mean": list_of(number()), "std": list_of(number(1e-6, 1e6))}

    def shape(self, call: Call) -> Shape:
        c = call.shapes[0][0]
        need(len(call.shapes[0]) == 3, f"normalize takes an image, got sample shape {call.shapes[0]}")
        need(len(call.attrs["mean"]) == len(call.attrs["std"]) == c, f"mean and std need {c} entries, one a channel")
        return call.shapes[0]

    def apply(self, call: Call, *values: Array) -> Array:
        mean, std = (np.asarray(call.attrs[key], dtype=np.float64)[:, None, None] for key in ("mean", "std"))
        return (values[0] - mean) / std

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (div_up(1.0, float(min(call.attrs["std"]))),)

    def offset(self, call: Call) -> Size:
        ratios = [div_up(abs(float(m)), float(s)) for m, s in zip(call.attrs["mean"], call.attrs["std"], strict=True)]
        token = array_norm_up(np.asarray(ratios))
        return Size(token, mul_up(sqrt_up(float(tokens_of(call.shapes[0]))), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # mean and std rounded to the dtype, one subtraction, one division or a reciprocal and a product: at most
        # u |mean| + gamma_5 |x - mean| (1 + u), over std; gamma_6 (|x| + |mean|) / std covers both
        mean = mul_up(
            sqrt_up(float(tokens_of(call.shapes[0]))), array_norm_up(np.asarray(call.attrs["mean"], dtype=float))
        )
        return mul_up(self.gains(call, "l2")[0], gamma(6, roundoff), add_up(incoming[0].total, mean))


class Linear(Rule):
    """x W^T + b on the last axis of tokens; x W + b if ``transpose``."""

    op = "linear@1"
    source = (
        "|x W^T| <= sigma_max(W) |x| for one token, hence for all; rounding: gamma_{K+1} (| |W| | |X| + sqrt(N) |b|)"
    )
    attrs = {"transpose": one_of(True, False)}
    tensors = {"weight": 2, "bias": 1}
    optional = frozenset({"bias"})

    def shape(self, call: Call) -> Shape:
        rows, columns = call.tensors["weight"].shape[:: -1 if call.attrs["transpose"] else 1]
        width = call.shapes[0][-1]
        need(len(call.shapes[0]) <= 2, f"a linear layer takes tokens, got sample shape {call.shapes[0]}")
        need(columns == width, f"tensor {call.names['weight']!r} takes {columns} channels, it is given {width}")
        if "bias" in call.tensors:
            need(call.tensors["bias"].shape == (rows,), f"tensor {call.names['bias']!r} needs {rows} entries")
        return (*call.shapes[0][:-1], rows)

    def apply(self, call: Call, *values: Array) -> Array:
        weight = call.tensors["weight"]
        result = np.matmul(values[0], weight if call.attrs["transpose"] else weight.T)
        return result + call.tensors["bias"] if "bias" in call.tensors else result

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (call.norm("weight"),)

    def offset(self, call: Call) -> Size:
        token = array_norm_up(call.tensors["bias"]) if "bias" in call.tensors else 0.0
        return Size(token, mul_up(sqrt_up(float(tokens_of(call.shapes[0]))), token))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        absolute = call.norm("weight", "abs", lambda: np.abs(call.tensors["weight"]))
        size = add_up(mul_up(absolute, incoming[0].total), self.offset(call).total)
        return mul_up(call.dot(call.shapes[0][-1] + 1), size)


class NormalizedLinear(Rule):
    """x W^T + b with rows w_i = v_i / max(|v_i|, eps) of the stored matrix V: the last-layer-normalised head.

    The float64 rows stray from the exact ones by gamma_{d/2+6} relatively (sum of squares, root, maximum, quotient),
    which is added to the norm of the float64 matrix.
    """

    op = "normalized_linear@1"
    source = "as linear; |W| <= |fl(W)| + |fl(W) - W|_F"
    attrs = {"eps": number(1e-12, 1.0)}  # not smaller: squares of rows shorter than eps must not vanish in float32
    tensors = {"weight": 2, "bias": 1}
    optional = frozenset({"bias"})

    def shape(self, call: Call) -> Shape:
        rows, columns = call.tensors["weight"].shape
        need(
            call.shapes[0] == (columns,),
            f"tensor {call.names['weight']!r} takes ({columns},), it is given {call.shapes[0]}",
        )
        if "bias" in call.tensors:
            need(call.tensors["bias"].shape == (rows,), f"tensor {call.names['bias']!r} needs {rows} entries")
        return (rows,)

    def apply(self, call: Call, *values: Array) -> Array:
        result = values[0] @ self._rows(call).T
        return result + call.tensors["bias"] if "bias" in call.tensors else result

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        norm, rows = call.norm("weight", "rows", lambda: self._rows(call)), self._rows(call)
        return (add_up(norm, mul_up(gamma(call.shapes[0][0] + 12), array_norm_up(rows)), rows.size * 2.0**-1072),)

    def offset(self, call: Call) -> Size:
        size = array_norm_up(call.tensors["bias"]) if "bias" in call.tensors else 0.0
        return Size(size, size)

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        # every entry of a row strays by less than half the error of its sum of squares and gamma_8 of the scalar steps
        d = call.shapes[0][0]
        row, dot = add_up(call.arithmetic.total(d), gamma(8, roundoff)), call.dot(d + 1)
        rows = mul_up(array_norm_up(self._rows(call)), 1.0 + 2.0 * gamma(d + 12))
        size = add_up(mul_up(rows, incoming[0].total), self.offset(call).total)
        return mul_up(add_up(row, dot, mul_up(row, dot)), size)

    def _rows(self, call: Call) -> Array:
        """Rows of unit norm; each scaled by a power of two first, since the square of a long row would overflow."""
        weight = call.tensors["weight"]
        exponent = np.maximum(np.frexp(np.max(np.abs(weight), axis=1, keepdims=True))[1], 0)
        scaled = np.ldexp(weight, -exponent)
        norm = np.sqrt(np.sum(scaled * scaled, axis=1, keepdims=True))
        return scaled / np.maximum(norm, np.ldexp(call.attrs["eps"], -exponent))


RULES: tuple[Rule, ...] = (Normalize(), Linear(), NormalizedLinear())
