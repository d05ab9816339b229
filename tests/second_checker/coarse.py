"""What a formula adds for the kernel's own float64 arithmetic, made large enough to be seen.

Those terms are of the size of u = 2^-53, which no example need reach. They hold for any unit roundoff, though. So a
module of the kernel is given a coarse one (its ``U`` and the default of its ``gamma``; the arithmetic stays as it is),
and what it claims has to be at least what the derivation of the formula asks for that roundoff, in fractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from types import ModuleType
from unittest import mock

from hf_lipschitz.bounds import rounding
from tests.second_checker.agreement import Disagreement
from tests.second_checker.exact import Interval

COARSE = Fraction(1, 1 << 14)


@contextmanager
def coarse(*modules: ModuleType, unit: Fraction = COARSE) -> Iterator[None]:
    """Let modules of the kernel believe in a unit roundoff."""
    u = float(unit)
    names = {"U": u, "_SCALARS": 1.0 + 32.0 * u, "gamma": _gamma_of(u)}
    with ExitStack() as stack:
        for module in modules:
            for name in sorted(set(names) & set(vars(module))):
                stack.enter_context(mock.patch.object(module, name, names[name]))
        yield


def _gamma_of(unit: float) -> object:
    def gamma(count: int, roundoff: float = unit) -> float:
        return rounding.gamma(count, roundoff)

    return gamma


def at_least(value: float, exact: Interval | Fraction | int, what: str) -> None:
    """Raise Disagreement if a claim is below what the formula asks."""
    low = exact.low if isinstance(exact, Interval) else Fraction(exact)
    if Fraction(value) < low:
        raise Disagreement(f"{what}: {value} is below {float(low)}, which the formula asks")


def at_most(value: float, exact: Interval | Fraction | int, part: float, what: str) -> None:
    """Raise Disagreement if a claim is above what the formula gives by more than a part of it."""
    high = exact.high if isinstance(exact, Interval) else Fraction(exact)
    if Fraction(value) > high * (1 + Fraction(part)):
        raise Disagreement(f"{what}: {value} is above {float(high)}, which the formula gives, by more than {part}")
