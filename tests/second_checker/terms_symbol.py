"""Terms and steps of the bound over all frequencies, each where it is the one that counts.

Derivation: the docstring of ``rules/convolution_norm.py``. S is the supremum of the symbol's norm, T the number of
taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from unittest import mock

import numpy as np

from hf_lipschitz.bounds import spectral
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rules import convolution_norm
from hf_lipschitz.bounds.rules.convolution_norm import convolution_norm_upper
from tests.second_checker.coarse import COARSE, at_least, at_most, coarse
from tests.second_checker.convolution import Taps, _best_frequency, _float_symbols
from tests.second_checker.exact import ONE, exactly, gamma, root_of
from tests.second_checker.norms import fractions_of, frobenius

_LINES = ((1, 9), (9, 1))
_PROOFS = 3_000  # of one search
_NEAR = 1e-12  # relative, of what a test computes in floats


def _taps(kernel: Array) -> Array:
    return convolution_norm._unshuffled(kernel, (1, 1), 1)


def _supremum(kernel: Array) -> float:
    """S from below, by a search in floats."""
    point = np.array([_best_frequency(Taps(fractions_of(kernel), (ONE,) * len(kernel)), (1, 1))])
    return float(_float_symbols(kernel, (1, 1), point)[0]) * (1.0 - _NEAR)


def _peaks() -> Iterator[Array]:
    """Kernels of one channel, largest at one frequency (and its negative), which no coarse grid hits."""
    for seed, size in enumerate(((1, 3), (2, 2), (3, 3), (1, 17), (17, 1), (3, 3), (2, 5), (3, 3))):
        phase = np.random.default_rng(seed).uniform(0.2, np.pi - 0.2, 2)
        yield np.cos(np.add.outer(np.arange(size[0]) * phase[0], np.arange(size[1]) * phase[1]))[None, None]


def _kernels() -> Iterator[Array]:
    draw = np.random.default_rng(4).standard_normal
    yield from _peaks()
    for shape in ((2, 3, 3, 3), (3, 2, 1, 4), (2, 2, 2, 3)):
        yield draw(shape)


@contextmanager
def _few_proofs() -> Iterator[None]:
    """A search that raises mu by what it sees, and stops where it said, needs few proofs; one that does not, no end."""
    below, count = convolution_norm._below, 0

    def counted(gram: Array, limit: float, error: float) -> bool:
        nonlocal count
        count += 1
        assert count <= _PROOFS, "the search goes on and on"
        return below(gram, limit, error)

    with mock.patch.object(convolution_norm, "_below", counted):
        yield


def what_scaling_lost() -> None:
    """E with |E|_F <= e lost from the taps moves S by at most sum_a |E_a| <= sqrt(T) e."""
    scaled = spectral.scaled
    for size in _LINES:
        kernel = np.ones((1, 1, *size))
        for exponent in (0, 3):
            with mock.patch.object(convolution_norm, "scaled", lambda taps, e=exponent: (scaled(taps)[0], e, 0.5)):
                value = convolution_norm_upper(kernel).value
            at_least(value, exactly((9 + Fraction(3, 2)) * 2**exponent), f"a kernel that lost something, {size}")


def crude_bound() -> None:
    """S^2 <= T |K|_F^2, for a kernel of equal entries with equality; used for too many taps."""
    for size in (*_LINES, (2, 3)):
        taps = _taps(np.full((2, 2, *size), 0.5))
        exact = frobenius(fractions_of(taps)).square() * exactly(size[0] * size[1])
        value, method = convolution_norm._by_frobenius(taps)[:2]
        at_least(value, exact, f"crude bound, {size}")
        at_most(value, exact, 1e-9, f"crude bound, {size}")
        assert method == "fallback"
        with mock.patch.object(convolution_norm, "_TAPS", 5):
            assert convolution_norm_upper(np.ones((1, 1, *size))).method == "fallback", "too many taps are searched"
        with mock.patch.object(convolution_norm, "_TAPS", 9):
            assert convolution_norm_upper(np.ones((1, 1, *size))).method == "frequencies", "few taps are not searched"


def flat_spectra() -> None:
    """S^2 <= lambda_max(R_0) + 2 sum_d |R_d|_F: for one channel and taps 1, d with equality, S = 1 + d."""
    for shape, scale in (((1, 1, 1, 2), 1.0), ((1, 1, 2, 1), 4.0)):
        bound = convolution_norm_upper(scale * np.array([1.0, 2.0**-15]).reshape(shape))
        assert bound.method == "flat"
        exact = Fraction(scale) * (1 + Fraction(1, 1 << 15))
        at_least(bound.value, exact, "a nearly flat spectrum")
        at_most(bound.value, exact, 1e-7, "a nearly flat spectrum")
    for kernel in _peaks():  # not flat, however small
        assert convolution_norm_upper(kernel).value == convolution_norm_upper(kernel * 2.0**-20).value * 2.0**20


def gram_of_the_symbol() -> None:
    """M M* = sum_d R_d e^{-i<d, theta>}, at frequencies beyond half of the torus too."""
    n = 7
    points = np.argwhere(np.ones((2 * n, 2 * n)))
    for kernel in _kernels():
        taps = _taps(kernel)
        symbol = convolution_norm._symbol(taps)
        places = np.stack(np.meshgrid(*map(np.arange, taps.shape[:2]), indexing="ij"), axis=-1)
        phase = np.exp(-1j * np.pi / n * np.einsum("pa,hwa->phw", points, places))
        m = np.einsum("phw,hwgij->pgij", phase, taps)
        exact = m @ m.conj().swapaxes(2, 3)
        far = float(np.abs(symbol.gram(points, n) - exact).max())
        assert far <= 1e-12 * float(np.abs(exact).max()), f"M M* is off by {far} for {kernel.shape}"


def rounding_of_the_symbol() -> None:
    """sqrt(2) gamma_{n + 64} |sum_a |K_a||_F^2, n the terms of a product and of the sum over d together."""
    draw = np.random.default_rng(5).standard_normal
    for scale, shape in ((1.0, (2, 2, 3, 3)), (16.0, (1, 1, 1, 9)), (1 / 16.0, (1, 1, 9, 1)), (1.0, (1, 4, 5, 5))):
        kernel = scale * draw(shape)
        taps = _taps(kernel)
        with coarse(convolution_norm):
            symbol = convolution_norm._symbol(taps)
        absolute = frobenius(abs(fractions_of(taps)).sum(axis=(0, 1)))
        count = taps.shape[0] * taps.shape[1] * taps.shape[4] + len(symbol.shifts)
        exact = root_of(2) * gamma(count + 64, COARSE) * absolute.square()
        at_least(symbol.error, exact, f"rounding of the symbol of {shape}")
        at_most(symbol.error, exact, 0.5, f"rounding of the symbol of {shape}")
        tail = Fraction(symbol.error) + 2 * _sum_of_norms(taps)
        at_least(symbol.tail, tail, f"tail of the symbol of {shape}")
        at_most(symbol.tail, tail, 1e-2, f"tail of the symbol of {shape}")


def _sum_of_norms(taps: Array) -> Fraction:
    """sum_d |R_d|_F over half of the d, from exact R_d = sum_{a - b = d} K_a K_b^T (one group)."""
    exact, sums = fractions_of(taps[:, :, 0]), dict[tuple[int, int], np.ndarray]()
    for a in np.ndindex(*taps.shape[:2]):
        for b in np.ndindex(*taps.shape[:2]):
            d = (a[0] - b[0], a[1] - b[1])
            sums[d] = sums.get(d, 0) + exact[a] @ exact[b].T
    return sum((frobenius(r).low for d, r in sums.items() if d > (0, 0)), Fraction(0))


def cells_cover_the_torus() -> None:
    """Each frequency with theta_2 in [0, pi] lies in a diamond of the grid, each point of a diamond in a part of it."""
    rng, both = np.random.default_rng(6), np.array([True, True])
    for n in (2, 4, 8):
        drawn = rng.uniform((0.0, 0.0), (2.0 * n, float(n)), (400, 2))  # in units of pi / n
        for many in (both, np.array([True, False]), np.array([False, True])):
            points = drawn * many
            steps = points[:, None] - convolution_norm._grid(n, many)[None]
            steps[..., 0] -= 2 * n * np.round(steps[..., 0] / (2 * n))
            steps[..., 1] -= 2 * n * np.round(steps[..., 1] / (2 * n))
            assert np.abs(steps).sum(axis=2).min(axis=1).max() <= 1.0 + _NEAR, f"{n}: no cell holds a frequency"
    corners = rng.uniform(-1.0, 1.0, (400, 2))
    inside = np.stack([corners.sum(axis=1), corners[:, 0] - corners[:, 1]], axis=1) / 2.0
    for pieces in (1, 2, 3):
        for many, points in ((both, inside), (np.array([True, False]), corners * (1, 0))):
            steps = pieces * points[:, None] - convolution_norm._moves(pieces, many)[None]
            assert np.abs(steps).sum(axis=2).min(axis=1).max() <= 1.0 + _NEAR, f"{pieces}: no part holds a point"


def too_small_a_witness() -> None:
    """A mu below S^2 is never accepted, whatever the first level of the search looks at."""
    for kernel in _kernels():
        supremum = _supremum(kernel)
        symbol = convolution_norm._symbol(_taps(kernel))
        for part in (0.5, 0.998, 1.0 - 1e-9):
            proved = convolution_norm._proved(symbol, part * supremum**2, search=False)
            assert proved is None, f"a mu of {part} times the square of the norm is accepted for {kernel.shape}"


def searched() -> None:
    """The search finds S to 1e-4 and never less, and so does its own witness without a search."""
    for kernel in _kernels():
        supremum = _supremum(kernel)
        with _few_proofs():
            bound = convolution_norm_upper(kernel)
        assert bound.method == "frequencies", bound.method
        at_least(bound.value, Fraction(supremum), f"norm of a convolution, {kernel.shape}")
        at_most(bound.value, Fraction(supremum), 1e-4, f"norm of a convolution, {kernel.shape}")
        assert bound.slack is not None and bound.slack <= 1e-4
        again = convolution_norm_upper(kernel, witness=bound.witness)
        assert again.method == "frequencies" and again.value == bound.value, "a witness does not repeat its bound"


def one_level_and_no_more() -> None:
    """Where cells are few, mu is raised to what the last level allows: S^2 / cos^2 and hardly more."""
    for kernel in (np.eye(2)[:, :, None, None] * [[[[0.0, 1.0, 3e-4]]]], *_peaks()):
        supremum = _supremum(kernel)
        for cells in (6, 16, 64):
            with mock.patch.object(convolution_norm, "_CELLS", cells), _few_proofs():
                bound = convolution_norm_upper(kernel)
            at_least(bound.value, Fraction(supremum), f"norm by {cells} cells a tap, {kernel.shape}")
            if bound.method == "frequencies":
                at_most(bound.value, Fraction(supremum), 0.42, f"norm by {cells} cells a tap, {kernel.shape}")


# What a mistake would make slow comes last: it is noticed before.
CHECKS: tuple[Callable[[], None], ...] = (
    rounding_of_the_symbol,
    gram_of_the_symbol,
    cells_cover_the_torus,
    searched,
    too_small_a_witness,
    crude_bound,
    what_scaling_lost,
    flat_spectra,
    one_level_and_no_more,
)
