"""Derive the coefficients of ``hf_lipschitz/caps/orthogonalize.py``: a composition of minimax odd quintics.

Problem: find odd quintics p_1, ..., p_n so that p_n(...p_1(x)) is as close to 1 as possible for x in [LOWEST, 1].
Greedy solution: p_1 is the odd quintic of least maximum error |1 - p| on [LOWEST, SAFETY]; its values there fill [1 -
E, 1 + E], so p_2 is the one of least error on [1 - E, SAFETY (1 + E)], and so on. Odd quintics on a positive interval
form a Chebyshev system with three functions, so the best one is characterised by four points of alternating, equal
error (Chebyshev's alternation theorem); with the two interval ends among them the other two are the zeros of p', and
Remez' exchange finds them in a few rounds.

SAFETY widens every interval upwards: what bfloat16 rounding pushes past the exact maximum of one step is still inside
the interval of the next, where the polynomial is bounded; without it a quintic grows like x^5 there.

A schedule of n steps divides its last polynomial by the maximum of the whole composition on [0, SAFETY] and by
1 + HEADROOM, so that the exact composition never exceeds 1, and float32 rounding does not lift it over 1 + 1e-6.

Run ``python benchmarks/orthogonalize_coefficients.py`` to print the two tables that are checked in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LOWEST = 1e-3
SAFETY = 1.02
HEADROOM = 4e-7
STEPS = 8

Quintic = tuple[float, float, float]


def minimax_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The (a, b, c) of least max |1 - (a x + b x^3 + c x^5)| on [low, high], 0 < low < high, and that error."""
    points = np.array([low, low + 0.25 * (high - low), low + 0.75 * (high - low), high])
    if low < 0.1 * high:  # Remez needs a start that is not hopeless: the inner extrema sit far from both ends then
        points[1:3] = 0.3 * high, 0.8 * high
    signs = np.array([-1.0, 1.0, -1.0, 1.0])
    for _ in range(100):
        system = np.stack([points, points**3, points**5, -signs], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9.0 * b * b - 20.0 * a * c)
        inner = np.sqrt((-3.0 * b + np.array([-root, root])) / (10.0 * c))
        moved = np.array([low, inner.min(), inner.max(), high])
        if np.max(np.abs(moved - points)) < 1e-12 * high:
            break
        points = moved
    return (float(a), float(b), float(c)), abs(float(error))


def derive_quintics() -> list[Quintic]:
    """The greedy composition, STEPS quintics in the order of application."""
    low, high, quintics = LOWEST, 1.0, []
    for _ in range(STEPS):
        quintic, error = minimax_quintic(low, SAFETY * high)
        quintics.append(quintic)
        low, high = 1.0 - error, 1.0 + error
    return quintics


def apply(quintics: Sequence[Quintic], x: np.ndarray) -> np.ndarray:
    """The composition at x."""
    for a, b, c in quintics:
        square = x * x
        x = x * (a + square * (b + c * square))
    return x


def derive_divisors(quintics: Sequence[Quintic]) -> list[float]:
    """For n = 1, 2, ...: the maximum over [0, SAFETY] of the first n quintics composed, with the headroom.

    The grid is fine enough that the maximum between its points is missed by less than the headroom: the composition has
    slopes below 1e4 and its maxima are smooth or at the right end, which is a grid point.
    """
    grid = np.concatenate([np.geomspace(1e-7, SAFETY, 2_000_001), np.linspace(0.0, SAFETY, 2_000_001)])
    return [float(np.max(apply(quintics[:n], grid))) * (1.0 + HEADROOM) for n in range(1, len(quintics) + 1)]


def main() -> None:
    """Print both tables as Python source."""
    quintics = derive_quintics()
    print("_QUINTICS = (")
    for quintic in quintics:
        print("    ({:.12g}, {:.12g}, {:.12g}),".format(*quintic))
    print(")")
    rounded = [(float(f"{a:.12g}"), float(f"{b:.12g}"), float(f"{c:.12g}")) for a, b, c in quintics]
    print("_DIVISORS = (")
    for divisor in derive_divisors(rounded):
        print(f"    {divisor:.12g},")
    print(")")


if __name__ == "__main__":
    main()
