"""Two processes (gloo) end where one process with twice the batch ends, and write one certificate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_lipschitz import verify

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).resolve().parents[2]
RUNS = ("spectral_muon", "adamw", "recipe")


def launch(folder: Path, *launcher: str) -> list[dict[str, Any]]:
    """The reports of all processes."""
    folder.mkdir()
    command = [sys.executable, *launcher, "-m", "tests.training.distributed", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("report-*.json"))]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("distributed")
    single = launch(folder / "one")
    both = launch(folder / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return folder / "two", single, both


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
