"""Two processes (gloo) end where one process with twice the batch ends, and write one certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_lipschitz import verify
from tests.launching import TWO, launch

pytestmark = pytest.mark.slow

RUNS = ("spectral_muon", "adamw", "recipe")


def reports_in(folder: Path) -> list[dict[str, Any]]:
    """The reports of all processes."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("distributed")
    launch("tests.training.distributed", folder / "one")
    launch("tests.training.distributed", folder / "two", *TWO)
    return folder / "two", reports_in(folder / "one"), reports_in(folder / "two")


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_where_one_does(reports: Any, run: str) -> None:
    _, single, both = reports
    assert (len(single), len(both)) == (1, 2)
    assert both[0][run] == both[1][run]  # bit for bit: every process caps the same weights in the same way
    assert both[0][run]["excess"] <= 0.0
    for name, values in single[0][run]["weights"].items():
        np.testing.assert_allclose(both[0][run]["weights"][name], values, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("run", RUNS)
def test_there_is_one_certificate_a_checkpoint(reports: Any, run: str) -> None:
    folder = reports[0]
    found = sorted((folder / run).glob("checkpoint-*"))
    steps = ("3", "6") if run == "recipe" else ("2", "4")
    assert [path.name for path in found] == [f"checkpoint-{step}" for step in steps]
    for checkpoint in [*found, folder / "recipe"]:
        verdict = verify(checkpoint)
        assert verdict.ok, verdict.reasons
        assert len(list(checkpoint.glob("*certificate*"))) == 1
