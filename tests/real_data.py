"""Where the real data for tests lies, and the rule that CI must have it.

The folder is named by the environment variable HF_LIPSCHITZ_DATA, `../shared/data` beside the checkout by default.
Where it is missing, a test that needs it is skipped; in CI (variable CI) that is a failure, or nobody would notice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import pytest

_MISSING = "data missing"
_ROOT = Path(__file__).resolve().parent.parent
_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)


def folder() -> Path:
    """The folder of the real data, whether it exists or not."""
    return Path(os.environ.get("HF_LIPSCHITZ_DATA") or _ROOT.parent / "shared" / "data").resolve()


def find(name: str) -> Path:
    """The path of one data set, such as "cifar10-jpeg" or "tinyshakespeare/input.txt"; skips where it is missing."""
    path = folder() / name
    if not path.exists():
        reason = f"{_MISSING}: no {name} in the folder that HF_LIPSCHITZ_DATA names (default ../shared/data)"
        pytest.skip(reason, allow_module_level=True)
    return path


def in_ci() -> bool:
    """Whether this is a run of continuous integration, by the variable that all of its services set."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


def no_missing_data_in_ci(report: _Report) -> _Report:
    """In CI, turn the report of a test that was skipped for missing data into a failure."""
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
    if in_ci() and report.skipped and reason.removeprefix("Skipped: ").startswith(_MISSING):
        report.outcome = "failed"
        report.longrepr = f"{reason}; in CI the data must be there"
    return report
