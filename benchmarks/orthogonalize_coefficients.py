"""Derive ``hf_lipschitz/caps/schedules.py``: compositions of minimax odd quintics, one for each number of steps.

Problem: find odd quintics p_1, ..., p_n so that p_n(...p_1(x)) is as close to 1 as possible for x in [low, 1].
Greedy solution: p_1 is the odd quintic of least maximum error |1 - p| on [low, SAFETY]; its values there fill [1 - E,
1 + E], so p_2 is the one of least error on [1 - E, SAFETY (1 + E)], and so on. Odd quintics on a positive interval form
a Chebyshev system with three functions, so the best one is characterised by four points of alternating, equal error
(Chebyshev's alternation theorem); with the two interval ends among them the other two are the zeros of p', and Remez'
exchange finds them in a few rounds.

SAFETY widens every interval upwards: what bfloat16 rounding pushes past the exact maximum of one step is still inside
the interval of the next, where the polynomial is bounded; without it a quintic grows like x^5 there.

A schedule of n steps divides its last polynomial by the maximum of the whole composition on [0, SAFETY] and by
1 + HEADROOM, so that the exact composition never exceeds 1, and float32 rounding does not lift it over 1 + 1e-6.

Few steps cannot lift what is small without leaving what is large far below that maximum. So ``low`` depends on n: of
LOWS it is the one with the least root mean square of 1 - p over singular values that are spaced logarithmically from 1
to 1e-3 and divided as ``orthogonalize`` divides, by the eighth root of the sum of their eighth powers.

Run ``python benchmarks/orthogonalize_coefficients.py`` to print the table that is checked in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LOWS = (1e-3, 1.4e-3, 2e-3, 3e-3, 4.2e-3, 6e-3, 9e-3, 0.013, 0.018, 0.025, 0.035, 0.05, 0.07, 0.1, 0.14, 0.2)
SAFETY = 1.02
HEADROOM = 4e-7
STEPS = 8
SPECTRUM = 256

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


def greedy_quintics(low: float, steps: int) -> list[Quintic]:
    """The greedy composition, in the order of application."""
    high, quintics = 1.0, []
    for _ in range(steps):
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


def schedule(low: float, steps: int) -> list[Quintic]:
    """The greedy composition with its last quintic divided by its maximum on [0, SAFETY] and by the headroom.

    The grid is fine enough that the maximum between its points is missed by less than the headroom: the composition has
    slopes below 1e4 and its maxima are smooth or at the right end, which is a grid point.
    """
    quintics = [tuple(float(f"{each:.12g}") for each in quintic) for quintic in greedy_quintics(low, steps)]
    grid = np.concatenate([np.geomspace(1e-7, SAFETY, 2_000_001), np.linspace(0.0, SAFETY, 2_000_001)])
    a, b, c = np.array(quintics[-1]) / (float(np.max(apply(quintics, grid))) * (1.0 + HEADROOM))
    return [*quintics[:-1], (a, b, c)]


def error(low: float, steps: int) -> float:
    """What ``low`` is chosen by; a coarse grid finds the maximum closely enough for that."""
    quintics = greedy_quintics(low, steps)
    largest = np.max(apply(quintics, np.geomspace(1e-3 * low, SAFETY, 20_001)))
    values = np.geomspace(1.0, 1e-3, SPECTRUM)
    normalised = values / np.sum(values**8) ** 0.125
    return float(np.sqrt(np.mean((1.0 - apply(quintics, normalised) / largest) ** 2)))


def best_low(steps: int) -> float:
    """The member of LOWS with the least error."""
    return min(LOWS, key=lambda low: error(low, steps))


def main() -> None:
    """Print the table as Python source."""
    for steps in range(1, STEPS + 1):
        low = best_low(steps)
        print(f"    (  # {steps}: low {low:g}")
        for quintic in schedule(low, steps):
            print("        ({:.12g}, {:.12g}, {:.12g}),".format(*quintic))
        print("    ),")


if __name__ == "__main__":
    main()
