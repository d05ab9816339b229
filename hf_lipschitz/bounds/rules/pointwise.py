"""Pointwise activations: one real function phi applied to every entry, on a sample of any shape.

If phi is continuous and its slopes are at most L, then |phi(x) - phi(y)| <= L |x - y| entry by entry, hence in both
geometries, and |phi(x)| <= L |x| + |phi(0)|. Constants are suprema of |phi'|, rounded up in their last digit. What no
constant bounds (hardshrink, threshold, GLU, RReLU in training mode) has no rule.

Rounding. In a dtype of unit roundoff u, a forward pass is assumed to err by at most ``units`` u (L |x| + |phi(0)|) in
an entry (``units`` u |phi(x)| where phi is bounded): library functions (exp, expm1, log1p, tanh, erf) within 4 units in
the last place, nothing coarser than the dtype, and ELU and its kin through expm1. That is not relative to phi(x): the
tail of GELU has no correct digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..errors import KernelError
from ..rounding import Array, add_up, div_up, mul_up, sqrt_up
from ..rule import Call, Geometry, Rule, Shape, Size, width_of
from .attributes import need, number, one_of

Attrs = Mapping[str, Any]
_LOG_2, _SIXTH = 0.6931471805599454, 0.16666666666666669  # both rounded up
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
_ERFC = np.frompyfunc(math.erfc, 1, 1)


class Pointwise(Rule):
    """``phi`` entry by entry.

    ``constant`` is its Lipschitz constant, or the attribute's absolute value if the one named ``steep`` exceeds it;
    ``zero`` bounds |phi(0)|, ``most`` |phi|, ``units`` the rounding.
    """

    constant: ClassVar[float] = 1.0
    steep: ClassVar[str] = ""
    zero: ClassVar[float] = 0.0
    most: ClassVar[float] = math.inf
    units: ClassVar[float] = 8.0

    def phi(self, attrs: Attrs, x: Array) -> Array:
        """The function, in the dtype of x."""
        raise KernelError(f"rule {self.op} has no meaning")

    def apply(self, call: Call, *values: Array) -> Array:
        return self.phi(call.attrs, values[0])

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (max(self.constant, abs(float(call.attrs[self.steep])) if self.steep else 0.0),)

    def offset(self, call: Call) -> Size:
        return self._everywhere(call, self.zero)

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        grown, most = super().size(call, incoming), self._everywhere(call, self.most)
        return Size(min(grown.token, most.token), min(grown.total, most.total))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return mul_up(self.units * roundoff, self.size(call, incoming).total)

    def _everywhere(self, call: Call, value: float) -> Size:
        """The size of a sample whose entries are all ``value``."""
        shape = call.shapes[0]
        return Size(mul_up(sqrt_up(float(width_of(shape))), value), mul_up(sqrt_up(float(math.prod(shape))), value))


class ReLU(Pointwise):
    """max(x, 0)."""

    op, source, units = "relu@1", "slopes 0 and 1; exact in floating point", 0.0

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.maximum(x, 0.0)


class LeakyReLU(Pointwise):
    """x for x > 0, else slope x."""

    op, source, steep = "leaky_relu@1", "slopes 1 and slope; rounding: a constant and a product", "slope"
    attrs = {"slope": number(-1e6, 1e6)}

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.where(x > 0.0, x, x * attrs["slope"])

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        return mul_up(2.5 * roundoff, abs(float(call.attrs["slope"])), incoming[0].total)


class ELU(Pointwise):
    """x for x > 0, else alpha (e^x - 1)."""

    op, source, steep = "elu@1", "slopes 1 and alpha e^x for x <= 0", "alpha"
    attrs = {"alpha": number(-1e6, 1e6)}

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.where(x > 0.0, x, attrs["alpha"] * np.expm1(np.minimum(x, 0.0)))


class CELU(Pointwise):
    """x for x > 0, else alpha (e^(x / alpha) - 1), alpha > 0."""

    op, source = "celu@1", "slopes 1 and e^(x / alpha) for x <= 0 < alpha"
    attrs = {"alpha": number(1e-6, 1e6)}

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.where(x > 0.0, x, attrs["alpha"] * np.expm1(np.minimum(x, 0.0) / attrs["alpha"]))


class SELU(Pointwise):
    """s x for x > 0, else s a (e^x - 1), with the published s and a (Klambauer et al. 2017)."""

    op, source, constant = "selu@1", "slopes s and s a e^x for x <= 0: at most s a", 1.758099340848

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return _SELU_SCALE * np.where(x > 0.0, x, _SELU_ALPHA * np.expm1(np.minimum(x, 0.0)))


class GELU(Pointwise):
    """x (1 + erf(x / sqrt 2)) / 2, or (approximate "tanh") x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""

    op = "gelu@1"
    source = "largest slope of the erf form at sqrt 2: (1 + erf 1) / 2 + 1 / (e sqrt pi); of the tanh form near 1.4151"
    attrs = {"approximate": one_of("none", "tanh")}

    @np.errstate(over="ignore")  # a cube that overflows has the right tanh
    def phi(self, attrs: Attrs, x: Array) -> Array:
        if attrs["approximate"] == "none":
            return 0.5 * x * np.asarray(_ERFC(x * -math.sqrt(0.5)), dtype=x.dtype)
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    def gains(self, call: Call, geometry: Geometry) -> tuple[float, ...]:
        return (1.128904145186 if call.attrs["approximate"] == "none" else 1.128993068659,)


class SiLU(Pointwise):
    """x sigmoid(beta x): SiLU (1), swish, quick_gelu (1.702)."""

    op, constant = "silu@1", 1.099839320129
    source = "the slope is that of z sigmoid(z) at z = beta x, largest where z tanh(z / 2) = 2"
    attrs = {"beta": number(-1e6, 1e6)}

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return x * _sigmoid(attrs["beta"] * x)


class Mish(Pointwise):
    """x tanh(log(1 + e^x))."""

    op, source, constant = "mish@1", "largest slope near x = 1.4908", 1.088498161252

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return x * np.tanh(np.logaddexp(x, 0.0))


class Tanh(Pointwise):
    """tanh x."""

    op, source, most = "tanh@1", "slope 1 - tanh^2 <= 1", 1.0

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.tanh(x)


class Tanhshrink(Pointwise):
    """x - tanh x."""

    op, source = "tanhshrink@1", "slope tanh^2 < 1"

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return x - np.tanh(x)


class Sigmoid(Pointwise):
    """1 / (1 + e^-x)."""

    op, source = "sigmoid@1", "slope s (1 - s) <= 1/4"
    constant, zero, most = 0.25, 0.5, 1.0

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return _sigmoid(x)


class HardSigmoid(Pointwise):
    """(x + 3) / 6 cut to [0, 1]."""

    op, source = "hardsigmoid@1", "slopes 0 and 1/6"
    constant, zero, most, units = _SIXTH, 0.5, 1.0, 4.0

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.clip(x + 3.0, 0.0, 6.0) / 6.0


class HardSwish(Pointwise):
    """x times the hardsigmoid of x."""

    op, source, constant = "hardswish@1", "slope (2 x + 3) / 6 on [-3, 3], 0 and 1 outside: 3/2 at x = 3", 1.5

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return x * (np.clip(x + 3.0, 0.0, 6.0) / 6.0)


class Softsign(Pointwise):
    """x / (1 + |x|)."""

    op, source, most, units = "softsign@1", "slope 1 / (1 + |x|)^2 <= 1", 1.0, 4.0

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return x / (1.0 + np.abs(x))


class LogSigmoid(Pointwise):
    """-log(1 + e^-x)."""

    op, source, zero = "logsigmoid@1", "slope sigmoid(-x) < 1", _LOG_2

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return -np.logaddexp(-x, 0.0)


class Softplus(Pointwise):
    """log(1 + e^(beta x)) / beta: the exact function, which has no ``threshold``.

    Torch returns x where beta x > threshold. That function jumps, so that no constant bounds it; it is within log(1 +
    e^-threshold) / beta <= 2.1e-9 / beta of the exact one for thresholds from 20 on, which is counted as rounding.
    Thresholds above 80 let e^(beta x) overflow in float32.
    """

    op, source = "softplus@1", "slope sigmoid(beta x) < 1; torch's jump at its threshold is counted as rounding"
    attrs = {"beta": number(1e-6, 1e6), "threshold": number(20.0, 80.0)}

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.logaddexp(attrs["beta"] * x, 0.0) / attrs["beta"]

    def offset(self, call: Call) -> Size:
        return self._everywhere(call, div_up(_LOG_2, float(call.attrs["beta"])))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        jump = self._everywhere(call, div_up(2.1e-9, float(call.attrs["beta"])))
        return add_up(super().rounding(call, roundoff, incoming), jump.total)


class Softshrink(Pointwise):
    """x moved by lambda towards 0, and 0 if |x| <= lambda."""

    op, source, units = "softshrink@1", "slopes 0 and 1; continuous for lambda >= 0", 2.0
    attrs = {"lambda": number(0.0, 1e6)}

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return x - np.clip(x, -attrs["lambda"], attrs["lambda"])


class HardTanh(Pointwise):
    """x cut to [low, high]; ReLU6 is that of 0 and 6."""

    op = "hardtanh@1"
    source = "slopes 0 and 1; exact in floating point, but for ends of more than 8 bits, which are rounded to the dtype"
    attrs = {"low": number(-1e6, 1e6), "high": number(-1e6, 1e6)}

    def shape(self, call: Call) -> Shape:
        low, high = self._ends(call)
        need(low <= high, f"attributes 'low' and 'high' are in the wrong order: {low} > {high}")
        return call.shapes[0]

    def _ends(self, call: Call) -> tuple[float, float]:
        return float(call.attrs["low"]), float(call.attrs["high"])

    def phi(self, attrs: Attrs, x: Array) -> Array:
        return np.clip(x, float(attrs["low"]), float(attrs["high"]))

    def offset(self, call: Call) -> Size:
        return self._everywhere(call, float(np.abs(np.clip(0.0, *self._ends(call)))))

    def size(self, call: Call, incoming: tuple[Size, ...]) -> Size:
        grown, most = super().size(call, incoming), self._everywhere(call, max(map(abs, self._ends(call))))
        return Size(min(grown.token, most.token), min(grown.total, most.total))

    def rounding(self, call: Call, roundoff: float, incoming: tuple[Size, ...]) -> float:
        rounded = [abs(end) for end in self._ends(call) if not (256.0 * math.frexp(end)[0]).is_integer()]
        return self._everywhere(call, mul_up(roundoff, max(rounded, default=0.0))).total


def _sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) without overflow."""
    decay = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, decay) / (1.0 + decay)


_PIECEWISE = (ReLU(), LeakyReLU(), HardTanh(), HardSigmoid(), HardSwish(), Softshrink())
_EXPONENTIAL = (ELU(), CELU(), SELU(), Tanh(), Tanhshrink(), Sigmoid(), LogSigmoid(), Softplus(), Softsign())
RULES: tuple[Rule, ...] = (*_PIECEWISE, *_EXPONENTIAL, GELU(), SiLU(), Mish())
