"""Terms of the kernel that no example need reach: each is checked where it is the one that counts.

That these checks can fail is shown by the mutants of ``tests/mutation``, which drop the terms one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from tests.second_checker import terms
from tests.second_checker.agreement import Disagreement
from tests.second_checker.coarse import at_least, at_most


@pytest.mark.parametrize("check", terms.CHECKS, ids=lambda check: check.__name__)
def test_term(check: Callable[[], None]) -> None:
    check()


def test_what_is_too_low_or_too_high_is_seen() -> None:
    at_least(1.0, 1, "one")
    at_most(1.0, 1, 0.0, "one")
    with pytest.raises(Disagreement, match="below"):
        at_least(1.0, Fraction(1) + Fraction(1, 10**20), "one")
    with pytest.raises(Disagreement, match="above"):
        at_most(1.1, 1, 0.05, "one")
