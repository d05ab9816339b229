"""Two processes (gloo) that share work or hold parts of matrices end where one process with their batches ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.launching import TWO, launch

pytestmark = pytest.mark.slow

RUNS = [f"{kind} {dtype}" for kind in ("replicated", "sharded") for dtype in ("torch.float32", "torch.float64")]
# A step's products may be in bfloat16 for float32 weights; batches are summed in another order.
TOLERANCE = {"torch.float32": 1e-3, "torch.float64": 1e-10}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    launch("tests.optim.two_processes", folder / "one")
    launch("tests.optim.two_processes", folder / "two", *TWO)
    (single,), both = ([torch.load(path) for path in sorted((folder / n).glob("report-*.pt"))] for n in ("one", "two"))
    assert len(both) == 2
    return single, both


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_where_one_does(reports: Any, run: str) -> None:
    single, both = reports
    assert distance(both[0][run]["weights"], both[1][run]["weights"]) == 0.0
    assert distance(both[0][run]["weights"], single[run]["weights"]) < TOLERANCE[run.split()[1]]
    for one in both:
        assert one[run]["bounds"] == pytest.approx(single[run]["bounds"], abs=1e-6) and len(one[run]["bounds"]) == 6


@pytest.mark.parametrize("run", RUNS)
def test_the_gathered_weights_are_within_their_caps_after_every_step(reports: Any, run: str) -> None:
    single, both = reports
    for one in (single, *both):
        assert len(one[run]["shares"]) == 6 and max(one[run]["shares"]) <= 1.0 + 1e-12
        assert one[run]["excess"] <= 0.0


def test_the_trainer_shares_the_work_of_a_data_parallel_run(reports: Any) -> None:
    single, both = reports
    assert [one["trainer"]["shared among"] for one in (single, *both)] == [1, 2, 2]
    assert distance(both[0]["trainer"]["weights"], both[1]["trainer"]["weights"]) == 0.0
    assert distance(both[0]["trainer"]["weights"], single["trainer"]["weights"]) < 1e-10


def test_an_update_that_is_not_sent_is_found(reports: Any) -> None:
    single, both = reports
    assert distance(both[0]["without sending"]["weights"], single["replicated torch.float64"]["weights"]) > 0.01


def test_a_part_that_is_capped_by_its_own_norm_is_found(reports: Any) -> None:
    assert all(max(one["capped in parts"]["shares"]) > 1.05 for one in reports[1])


def test_a_run_goes_on_from_a_distributed_checkpoint_bit_for_bit(reports: Any) -> None:
    for one in reports[1]:
        assert distance(one["continued"]["weights"], one["continued"]["resumed"]) == 0.0
        assert one["continued"]["kinds"] == ["DTensor"]
    whole = reports[1][0]["continued"]["shapes"]
    assert whole["first.weight"] == (7, 6) and whole["gate.weight"] == (1, 8) and len(whole) == 6


def test_all_refuse_a_gradient_that_one_refuses(reports: Any) -> None:
    said = [one["refused"]["said"] for one in reports[1]]
    assert said[0].startswith("the gradient on another process holds NaN")
    assert said[1].startswith("the gradient of a parameter of shape (7, 7) holds NaN")
    assert all(one["refused"]["kept"] for one in reports[1])


def test_what_somebody_wrote_to_one_part_is_measured_by_all(reports: Any) -> None:
    for one in reports[1]:
        assert max(one["written by one"]["shares"]) <= 1.0
