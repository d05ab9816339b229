"""Terms of the rules for convolutions, each where it is the one that counts.

Derivations: the docstrings of ``rules/convolution.py``. T is the number of taps.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from unittest import mock

import numpy as np

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.bounds.rounding import Array, Enclosure
from hf_lipschitz.bounds.rule import GEOMETRIES, Call, Rule
from hf_lipschitz.bounds.rules import convolution, normalization
from hf_lipschitz.bounds.rules.normalization import AffineMap
from hf_lipschitz.bounds.spectral import NormBound
from tests.bounds.cases import ROWS
from tests.bounds.row import Example
from tests.bounds.search import ask
from tests.second_checker import agreement
from tests.second_checker import convolution as convolution_formulas
from tests.second_checker import normalization as normalization_formulas
from tests.second_checker.coarse import at_least, at_most, coarse
from tests.second_checker.exact import exactly, gamma, root_of
from tests.second_checker.norms import Matrix, fractions_of, frobenius, spectral_norm

_ATTRS = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}
_LINES = ((1, 9), (9, 1))


def _asked(op: str, kernel: Array, **vectors: Array) -> tuple[Rule, Call]:
    weights = {"weight": kernel, **vectors}
    attrs = _ATTRS | ({"eps": 1e-3} if vectors else {})
    node = Node(op, (0,), attrs, {name: name for name in weights})
    return ask(Example(node, ((kernel.shape[1], 9, 9),), weights))


def _convolution(kernel: Array) -> tuple[Rule, Call]:
    return _asked("convolution@1", kernel)


def _followed_by_batch_norm(kernel: Array, scale: Enclosure) -> tuple[Array, float]:
    """The kernel times an enclosed scale, and what is said that it lacks."""
    vectors = {name: np.ones(len(kernel)) for name in ("mean", "variance")}
    rule, call = _asked("convolution_batch_norm@1", kernel, **vectors)
    with mock.patch.object(type(rule), "_map", lambda self, call: AffineMap(scale, 0.0, 0.0)):
        return rule._kernel(call)  # type: ignore[attr-defined]


def what_a_kernel_lacks() -> None:
    """It is added to the norm in l2, to that in token_max and to that of the absolute values."""
    kernel = np.array([[2.0, 1.0], [-1.0, 3.0]])[:, :, None, None]
    exact, lacks = spectral_norm(fractions_of(kernel[:, :, 0, 0])), exactly(Fraction(1, 2))
    rule, call = _convolution(kernel)
    with mock.patch.object(type(rule), "_kernel", lambda self, call: (kernel, 0.5)):
        for geometry in GEOMETRIES:
            at_least(rule.gains(call, geometry)[0], exact + lacks, f"a kernel that lacks something, {geometry}")
        absolute = spectral_norm(fractions_of(np.abs(kernel[:, :, 0, 0]))) + lacks
        at_least(rule._absolute(call), absolute, "absolute values of a kernel that lacks something")  # type: ignore[attr-defined]


def sums_of_absolute_taps() -> None:
    """|K_1| + ... + |K_T| errs by gamma_{T-1}: the exact sum is at most the computed one over 1 - gamma_{T-1}."""
    for size in _LINES:
        rule, call = _convolution(np.ones((1, 1, *size)))
        for unit in (Fraction(1, 1 << 14), Fraction(1, 25)):
            with coarse(convolution, unit=unit):
                value = rule._absolute(call)  # type: ignore[attr-defined]
            at_least(value, exactly(9) / (exactly(1) - gamma(8, unit)), f"sum of absolute taps, {size}")
            call.norms.bounds.clear()


def _tight(matrix: Array) -> NormBound:
    """The smallest float above the norm of a matrix of one row."""
    exact = frobenius(fractions_of(matrix))
    value = float(exact.high)
    return NormBound(value if Fraction(value) >= exact.low else float(np.nextafter(value, np.inf)), "exact")


def blocks_that_are_not_looked_at() -> None:
    """Only those whose norm cannot be the largest: sqrt(n) max |a| is the norm of a block of equal entries."""
    root = float(np.sqrt(3.0))  # rounded down
    assert Fraction(root) ** 2 < 3
    with mock.patch.object(convolution, "spectral_norm_upper", _tight):
        value = convolution._largest(np.array([[[root, 0.0, 0.0]], [[1.0, 1.0, 1.0]]]))
    at_least(value, root_of(3), "largest of two nearly equal norms")
    counted = mock.Mock(side_effect=_tight)
    with mock.patch.object(convolution, "spectral_norm_upper", counted):
        convolution._largest(np.array([[[2.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]]))
    assert counted.call_count == 1, "a block too small to matter is looked at"


def _absolute_fractions(values: Array) -> Matrix:
    return abs(fractions_of(values))


def folded_kernels() -> None:
    """Half the width of the scale times |K|, u |K'|, and what underflows: sqrt(T) times the norm of all of them."""
    draw = np.random.default_rng(7).standard_normal
    for size in ((1, 1), *_LINES, (3, 3)):
        kernel = draw((2, 3, *size))
        half, root = Fraction(1, 8), root_of(size[0] * size[1])
        for centre in (0.0, 0.75, -2.0):
            scale = Enclosure(np.full(2, centre - 0.125), np.full(2, centre + 0.125))
            _, lacks = _followed_by_batch_norm(kernel, scale)
            exact = _absolute_fractions(kernel) * half
            at_least(lacks, root * frobenius(exact), f"width of a scale about {centre}, {size}")
            at_most(lacks, root * frobenius(exact), 1e-12, f"width of a scale about {centre}, {size}")
        _rounded_once(kernel, size)
        # products below the range of floats
        tiny = np.ldexp(np.round(8.0 * kernel), -1074)
        folded, lacks = _followed_by_batch_norm(tiny, Enclosure(np.full(2, 0.4), np.full(2, 0.4)))
        exact = fractions_of(tiny) * Fraction(0.4) - fractions_of(folded)
        at_least(lacks, root * frobenius(exact), f"products that underflow, {size}")


def _rounded_once(kernel: Array, size: tuple[int, int]) -> None:
    """Each product is rounded; the sum that bounds this is itself of floats that took up to four roundings."""
    unit, root = Fraction(1, 1 << 14), root_of(size[0] * size[1])
    with coarse(convolution, unit=unit):
        folded, lacks = _followed_by_batch_norm(kernel, Enclosure(np.full(2, 0.75), np.full(2, 0.75)))
        rounded = root * frobenius(_absolute_fractions(folded)) * exactly(unit / (1 - unit))
        at_least(lacks, rounded, f"rounded products, {size}")
        at_most(lacks, rounded, 1.01, f"rounded products, {size}")
        _, lacks = _followed_by_batch_norm(kernel, Enclosure(np.full(2, -0.125), np.full(2, 0.125)))
        summed = root * frobenius(_absolute_fractions(kernel)) * exactly(Fraction(1, 8) / (1 - unit) ** 4)
        at_least(lacks, summed, f"sum of what a kernel lacks, {size}")
        at_most(lacks, summed, 1e-2, f"sum of what a kernel lacks, {size}")


def what_underflows_in_a_scale() -> None:
    """The terms for factors that underflow, with a large number in place of 2^-120 on both sides."""
    for value in (2.0**20, 2.0**-4):
        with (
            mock.patch.object(convolution, "UNDERFLOW", value),
            mock.patch.object(normalization, "UNDERFLOW", value),
            mock.patch.object(convolution_formulas, "VANISHED", exactly(value)),
            mock.patch.object(normalization_formulas, "VANISHED", exactly(value)),
        ):
            for row in ROWS:
                if row.op in ("convolution_batch_norm@1", "batch_norm@1"):
                    agreement.compare_rounding(row.example("gaussian"), "float32")


CHECKS: tuple[Callable[[], None], ...] = (
    what_a_kernel_lacks,
    sums_of_absolute_taps,
    blocks_that_are_not_looked_at,
    folded_kernels,
    what_underflows_in_a_scale,
)
