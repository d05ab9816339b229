"""The checked-in coefficients are what the script in benchmarks/ derives, and the compositions stay below 1."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hf_lipschitz.caps.schedules import MAX_STEPS, SCHEDULES, Quintic, schedule

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "orthogonalize_coefficients.py"
_GRID = np.concatenate([np.geomspace(1e-6, 1.02, 200_001), np.linspace(0.0, 1.02, 200_001)])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("orthogonalize_coefficients", _SCRIPT)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def compose(quintics: tuple[Quintic, ...], x: np.ndarray) -> np.ndarray:
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_the_script_derives_the_checked_in_schedules(steps: int, script: ModuleType) -> None:
    derived = script.schedule(script.best_low(steps), steps)
    assert np.allclose(derived[:5], SCHEDULES[steps - 1][:5], rtol=1e-8, atol=0.0)
    # Late intervals are short, so their coefficients are ill-conditioned, but not the polynomials.
    x = np.linspace(0.9, 1.02, 101)
    for ours, theirs in zip(SCHEDULES[steps - 1], derived, strict=True):
        assert np.allclose(compose((ours,), x), compose((tuple(theirs),), x), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize(("steps", "low", "least", "growth"), [(4, 0.0042, 0.76, 210.0), (5, 0.0014, 0.86, 780.0)])
def test_what_the_documentation_says_of_a_schedule(steps: int, low: float, least: float, growth: float) -> None:
    assert compose(schedule(steps), np.linspace(low, 1.0, 100_001)).min() >= least
    assert compose(schedule(steps), np.array([1e-9]))[0] / 1e-9 == pytest.approx(growth, rel=0.03)


def test_each_quintic_alternates_and_so_is_the_best_one(script: ModuleType) -> None:
    low, high = 0.05, 1.3
    quintic, error = script.minimax_quintic(low, high)
    x = np.linspace(low, high, 200_001)
    deviation = compose((quintic,), x) - 1.0
    assert np.max(np.abs(deviation)) == pytest.approx(error, rel=1e-6)
    extremes = deviation[np.abs(np.abs(deviation) - error) < 1e-6 * error]
    assert np.count_nonzero(np.diff(np.sign(extremes))) == 3  # four alternating points: Chebyshev's theorem


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_a_schedule_never_exceeds_one(steps: int) -> None:
    values = compose(schedule(steps), _GRID)
    assert values.min() >= 0.0
    assert 1.0 - 1e-6 <= values.max() <= 1.0


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_a_coefficient_off_by_two_percent_is_found(steps: int) -> None:
    *first, (a, b, c) = schedule(steps)
    assert compose((*first, (1.02 * a, b, c)), _GRID).max() > 1.0


def test_rounding_errors_of_bfloat16_between_steps_stay_bounded() -> None:
    generator = np.random.default_rng(0)
    x = _GRID[_GRID <= 1.0]
    for quintic in schedule(MAX_STEPS):
        x = compose((quintic,), x) * (1.0 + generator.uniform(-1, 1, x.shape) * 2.0**-7)
    assert x.max() < 1.02


@pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1])
def test_a_schedule_that_is_not_there_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"1 to {MAX_STEPS} steps, not {steps}"):
        schedule(steps)
