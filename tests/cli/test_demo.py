"""`demo`: what it refuses, what makes it fail, what it prints; and the whole of it with `--quick`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hf_lipschitz.cli import demo, demo_fine_tune, demo_steps
from hf_lipschitz.cli.demo_progress import Board
from hf_lipschitz.cli.demo_steps import DemoFailure, Outcome
from tests.cli.conftest import Call

_ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    *("ok", "problems", "seconds", "steps", "seed", "folders", "training", "reload"),
    *("evaluation", "attacks", "pushed", "fine_tuned"),
}
RADII = (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0)


def _evaluation(clean: float = 0.99, low: float = 0.96, high: float = 0.9) -> Any:
    certified = dict(zip(RADII, (clean, low, high, 0.5, 0.0), strict=True))
    values = {"clean_accuracy": clean, "certified": certified, "labels": range(359), "claim": "exact network"}
    return SimpleNamespace(**values, as_dict=lambda: {"clean_accuracy": clean})


def _attacks(float32: int = 0, float64: int = 0, control: int = 64) -> dict[str, dict[str, Any]]:
    changed = {"float32": float32, "float64": float64, "control": control}
    return {kind: {"changed": count, "attacked": 64, "factor": 20.0} for kind, count in changed.items()}


@pytest.mark.parametrize(
    ("evaluation", "attacks", "quick", "says"),
    [
        (_evaluation(), _attacks(), False, []),
        (_evaluation(clean=0.96), _attacks(), False, ["radius 0.0000 is 0.960, less than the 0.97"]),
        (_evaluation(low=0.92), _attacks(), False, ["0.1412 is 0.920, less than the 0.93"]),
        (_evaluation(high=0.84), _attacks(), False, ["0.2824 is 0.840, less than the 0.85"]),
        (_evaluation(0.5, 0.4, 0.3), _attacks(), True, []),
        (_evaluation(), _attacks(float32=1), True, ["changed 1 predictions of the float32"]),
        (_evaluation(), _attacks(float64=2), False, ["changed 2 predictions of the float64"]),
        (_evaluation(), _attacks(control=0), True, ["far outside"]),
    ],
)
def test_the_judgement(evaluation: Any, attacks: dict[str, dict[str, Any]], quick: bool, says: list[str]) -> None:
    problems = demo.judge(Outcome(evaluation=evaluation, attacks=attacks), quick)
    assert len(problems) == len(says)
    assert all(said in problem for said, problem in zip(says, problems, strict=True))


@contextlib.contextmanager
def _no_hub(out: Path, repo: str | None, endpoint: str | None) -> Iterator[dict[str, Any]]:
    yield {"repo": repo or "loopback/x", "endpoint": endpoint, "token": "t", "is_loopback": repo is None}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """All steps replaced by quick ones that succeed."""
    training = {"step": 3, "seconds": 1.0}
    bound = {"decimal": "1.5"}
    verification = {"ok": True, "bound": bound, "bound_features": bound}
    certificate = SimpleNamespace(bound=SimpleNamespace(to_json=lambda: bound))
    certificate.bound_features = certificate.bound
    pushed = {"repo": "loopback/x", "commit": "c" * 40, "fetched": "somewhere"}
    tuned = {"training": training, "evaluation": _evaluation(), "pushed": pushed, "certificate": certificate}
    monkeypatch.setattr(demo, "_hub", _no_hub)
    monkeypatch.setattr(demo_steps, "train", lambda settings, step: (SimpleNamespace(model=None), training))
    monkeypatch.setattr(demo_steps, "save", lambda settings, trainer, step: step.say("saved"))
    monkeypatch.setattr(demo_steps, "reload", lambda settings, model, step: {"verification": verification})
    monkeypatch.setattr(demo_steps, "evaluate", lambda settings, model, step: (_evaluation(), _attacks()))
    monkeypatch.setattr(demo_steps, "push_and_verify", lambda settings, folder, repo: pushed)
    monkeypatch.setattr(demo_fine_tune, "fine_tune", lambda settings, fetched, step: tuned)
    return monkeypatch


@pytest.mark.usefixtures("steps")
def test_a_good_run(call: Call, tmp_path: Path) -> None:
    ran = call("demo", "--out", tmp_path / "demo")
    assert ran.status == 0
    lines = [line for line in ran.err.splitlines() if line[:1] in "✓✗"]
    assert [line.split()[1] for line in lines] == list("1234567") and all(line[0] == "✓" for line in lines)
    for said in (
        "clean accuracy",
        "certified at l2 radius 72/255",
        "0 of 64",
        "hf-lipschitz verify",
        "hf-lipschitz push",
    ):
        assert said in ran.out
    value = call("demo", "--out", tmp_path / "other", "--json", "--seed", "3").value
    assert set(value) == KEYS
    assert (value["ok"], value["problems"], value["seed"]) == (True, [], 3)
    assert list(value["steps"]) == list(demo.STEPS)


def test_changed_predictions_are_status_1(call: Call, tmp_path: Path, steps: pytest.MonkeyPatch) -> None:
    steps.setattr(demo_steps, "evaluate", lambda *_: (_evaluation(), _attacks(float32=1)))
    ran = call("demo", "--quick", "--json", "--out", tmp_path / "demo")
    assert ran.status == 1
    assert set(ran.value) == KEYS and not ran.value["ok"]
    assert "changed 1 predictions of the float32" in ran.err.splitlines()[-1]


def test_a_failed_step_ends_it_with_status_1(call: Call, tmp_path: Path, steps: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DemoFailure("the new process does not verify it: a reason")

    steps.setattr(demo_steps, "reload", fail)
    ran = call("demo", "--json", "--out", tmp_path / "demo")
    assert ran.status == 1
    assert set(ran.value) == KEYS
    assert ran.value["problems"] == ["the new process does not verify it: a reason"]
    assert ran.value["evaluation"] is None and list(ran.value["steps"]) == ["train", "save", "reload"]
    assert "✗ 3" in ran.err and "Traceback" not in ran.err


def test_a_repository_needs_a_token(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    ran = call("demo", "--repo", "someone/digits", "--out", tmp_path / "demo")
    assert ran.status == 2
    assert "no access token" in ran.complaint


@pytest.mark.usefixtures("steps")
def test_overwriting_removes_only_what_a_demo_made(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    (out / "digits").mkdir(parents=True)
    (out / "digits" / "old").write_text("old")
    assert call("demo", "--out", out).status == 2 and (out / "digits" / "old").exists()
    (out / "mine").write_text("mine")
    assert call("demo", "--out", out, "--overwrite").status == 2 and (out / "digits" / "old").exists()
    (out / "mine").unlink()
    assert call("demo", "--out", out, "--overwrite").status == 0 and not (out / "digits" / "old").exists()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_board(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    with Board({"a": "first", "b": "second"}, console) as board:
        with board.step("a") as step:
            step.expect(2)
            step.advance()
            step.say("well done")
        with contextlib.suppress(DemoFailure), board.step("b"):
            raise DemoFailure("no")
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "1 first" in shown and "well done" in shown and "✓" in shown and "✗" in shown
    assert set(board.seconds) == {"a", "b"}


@pytest.mark.slow_ci
def test_the_quick_demo_from_end_to_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_lipschitz.cli.main", "demo", "--quick", "--json", "--out", "demo"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    value = json.loads(ran.stdout)
    assert set(value) == KEYS and value["ok"]
    assert value["reload"]["model"] == "LipViTForImageClassification"
    assert value["reload"]["verification"]["claims"] == dict.fromkeys(("bound", "program", "rounding"), "ok")
    assert [value["attacks"][dtype]["changed"] for dtype in ("float32", "float64")] == [0, 0]
    for folder in (tmp_path / "demo" / "digits", tmp_path / "demo" / "odd-even"):
        assert {*demo_steps.FILES, "certified_accuracy.png"} <= {path.name for path in folder.iterdir()}
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert any({"loss", "lipschitz_bound", "cap_excess_max"} <= set(line) for line in log)
    assert not list(tmp_path.glob("*.tmp")) and "Traceback" not in ran.stderr
