"""What a Trainer or a model pushes: every commit with weights has the certificate of exactly those weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lipschitz.testing.loopback_hub import LoopbackHub
from tests.training.pushing import CARD, KINDS, STRATEGIES

_ROOT = Path(__file__).resolve().parents[2]
CERTIFIED = {"config.json", "hf_lipschitz_remote.py", "lipschitz_certificate.json", "model.safetensors"}
pytestmark = pytest.mark.slow_ci  # one process that trains and pushes nine times


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All pushes, in one process of its own: the client reads HF_ENDPOINT when it is imported."""
    folder = tmp_path_factory.mktemp("pushes")
    with LoopbackHub(folder / "hub") as hub:
        environment = {**os.environ, **hub.environment(), "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, "-m", "tests.training.pushing", str(folder)]
        run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def commits(pushed: dict[str, Any], repo: str) -> list[dict[str, Any]]:
    """The commits that hold weights."""
    return [commit for commit in pushed["repos"][f"loopback/{repo}"] if commit["whole"] is not None]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_commit_has_the_certificate_of_its_weights(pushed: dict[str, Any], kind: str, strategy: str) -> None:
    found = commits(pushed, f"{kind}-{strategy}")
    titles = [commit["title"] for commit in found]
    assert titles[-1] == "Once more"
    if kind == "plain" or strategy == "end":  # else it depends on the last push whether there is anything new then
        assert titles[-2] == "End of training"
    # pushes that an unfinished one holds back are left out, so only the first is sure
    assert titles[0].startswith("Training in progress") == (strategy != "end")
    for commit in found:
        assert all(reasons == [] for reasons in commit["folders"].values()), commit
        assert not CERTIFIED.difference(commit["files"])
    inner = {name for commit in found for name in commit["folders"]} - {"root"}
    assert inner == ({"-last-checkpoint"} if strategy == "checkpoint" else set())
    assert "preprocessor_config.json" in found[-1]["files"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_with_its_last_checkpoint_verifies_as_a_whole(pushed: dict[str, Any], kind: str) -> None:
    """hub_strategy="checkpoint" puts a whole checkpoint folder, thin file included, beside the weights."""
    found = commits(pushed, f"{kind}-checkpoint")
    assert "last-checkpoint" in found[-1]["files"]
    assert all(commit["whole"] == [] for commit in found), found[-1]["whole"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_our_card_survives_with_our_trainer(pushed: dict[str, Any], strategy: str) -> None:
    assert {commit["card"] for commit in commits(pushed, f"ours-{strategy}")} == {CARD}
    replaced = commits(pushed, f"plain-{strategy}")[-1]["card"]  # which is why there is a subclass
    assert replaced != CARD and "generated automatically" in replaced


def test_pushes_in_the_background_wait_for_each_other(pushed: dict[str, Any]) -> None:
    found = commits(pushed, "overlapping")
    assert [commit["title"] for commit in found] == [f"Push {number}" for number in range(4)]
    assert all(commit["whole"] == [] for commit in found), found


@pytest.mark.parametrize("repo", ["model", "saved"])
def test_what_a_model_pushes_itself(pushed: dict[str, Any], repo: str) -> None:
    found = commits(pushed, repo)
    assert len(found) == (2 if repo == "model" else 1)
    for commit in found:
        assert commit["whole"] == [] and not CERTIFIED.difference(commit["files"])


def test_a_push_costs_a_model_nothing_of_what_it_knows(pushed: dict[str, Any]) -> None:
    state = pushed["state"]
    assert state["kept after a push"], state["said"]
    assert state["in the model from the Hub"] and state["after saving"]
    assert not state["of changed weights"] and "has changed since it was certified" in state["said"][0]
