"""What every test has: the offline surroundings, one seed, and the real data where the machine has it."""

from __future__ import annotations

from tests import offline

offline.prepare()  # before anything imports torch or a Hugging Face library

import random  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Generator  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests import real_data as data  # noqa: E402

_SEED = 0

# Examples are drawn from the test alone, so that a run can be repeated; a busy machine is no failure: no deadline.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed the generators of the standard library, NumPy and, once something has imported it, torch."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(_SEED)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """A function from a data set's name to its path, which skips the test where it is missing (in CI: fails it)."""
    return data.find


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return data.no_missing_data_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return data.no_missing_data_in_ci((yield))
