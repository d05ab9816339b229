"""`evaluate`: verified first; clean and certified accuracy, an attack that must fail, and the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_lipschitz.cli import attacking
from hf_lipschitz.cli.evaluate import parse_radii
from hf_lipschitz.model_card import percent
from tests.cli.conftest import Call, flip_a_bit


@pytest.mark.parametrize(
    ("text", "radii"), [("0", (0.0,)), ("0, 36/255,1", (0.0, 36 / 255, 1.0)), ("1e-1", (0.1,)), ("1.5", (1.5,))]
)
def test_radii(text: str, radii: tuple[float, ...]) -> None:
    assert parse_radii(text) == radii


def test_json_and_card(call: Call, folder: Path) -> None:
    ran = call("evaluate", folder, "--data.path", "digits", "--radii", "0,36/255", "--json")
    assert ran.status == 0
    value = ran.value
    assert set(value) == {"ok", "folder", "data", "evaluation", "attacks", "lower_estimates", "verification"}
    for output, found in value["lower_estimates"].items():
        key = {"logits": "bound", "features": "bound_features"}[output]
        bound = float.fromhex(value["verification"][key]["value"])
        assert 0.0 < found["value"] <= bound and found["gap"] == pytest.approx(bound / found["value"])
    assert value["ok"] and value["verification"]["ok"] and value["attacks"] is None
    assert value["data"] == {"path": "digits", "split": "test"}
    evaluation = value["evaluation"]
    assert evaluation["claim"] == "exact network"
    assert list(evaluation["certified"]) == [repr(0.0), repr(36 / 255)]
    assert evaluation["clean_accuracy"] >= evaluation["certified"]["0.0"] >= evaluation["certified"][repr(36 / 255)]
    card = (folder / "README.md").read_text()
    assert percent(evaluation["clean_accuracy"]) in card and "certified at 36/255" in card
    assert "How tight it is" in card
    assert (folder / "certified_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_table(call: Call, folder: Path) -> None:
    ran = call("evaluate", folder, "--data.path", "digits", "--limit", "20", "--no-card", "--data.split", "train")
    assert ran.status == 0
    assert "bound to the logits" in ran.out and "gap" in ran.out
    assert "20 images" in ran.out and "clean accuracy" in ran.out and "claim: exact network" in ran.out
    assert not (folder / "README.md").exists()


def test_the_attack_fails_inside_and_succeeds_far_outside(call: Call, folder: Path) -> None:
    ran = call("evaluate", folder, "--data.path", "digits", "--limit", "12", "--attack", "--no-estimate", "--json")
    assert ran.status == 0
    attacks = ran.value["attacks"]
    assert ran.value["lower_estimates"] is None
    assert [attacks[dtype]["changed"] for dtype in ("float32", "float64")] == [0, 0]
    assert all(attacks[dtype]["images"] == 12 and attacks[dtype]["steps"] == 50 for dtype in ("float32", "float64"))
    assert attacks["control"]["changed"] > 0
    assert not (folder / "README.md").exists()  # a card speaks of a whole split


def test_a_successful_attack_is_status_1(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outside(model: Any, pixels: Any, evaluation: Any, factor: float, **options: Any) -> dict[str, Any]:
        return attack(model, pixels, evaluation, 20.0, **options)

    attack = attacking._attack
    monkeypatch.setattr(attacking, "_attack", outside)
    ran = call("evaluate", folder, "--data.path", "digits", "--limit", "8", "--attack", "--json", "--no-card")
    assert ran.status == 1
    assert not ran.value["ok"]
    assert "the certificate" in ran.err and "is refuted" in ran.err


def test_a_folder_that_does_not_verify(call: Call, folder: Path) -> None:
    flip_a_bit(folder / "model.safetensors", -1)
    ran = call("evaluate", folder, "--data.path", "digits", "--json")
    assert ran.status == 1
    assert "does not verify" in ran.complaint and "model.safetensors" in ran.complaint
    assert ran.value["ok"] is False and ran.value["verification"]["claims"]["bound"] == "failed"
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data.path", "no-such-data"], "no-such-data"),
        (["--data.path", "digits", "--data.split", "validation"], "choose --data.split train or test"),
    ],
)
def test_data_that_is_not_there(call: Call, folder: Path, options: list[str], says: str) -> None:
    ran = call("evaluate", folder, *options)
    assert ran.status == 2
    assert says in ran.err.splitlines()[-1] and "Traceback" not in ran.err


def test_claims(call: Call, folder: Path) -> None:
    """Each figure says whose it is; a deployed forward is certified at most where the exact network is."""
    certified = {}
    for claim in ("exact", "float32", "float32+float64"):
        options = ("--radii", "0.01", "--limit", "60", "--no-estimate", "--json", "--claim", claim)
        ran = call("evaluate", folder, "--data.path", "digits", *options)
        assert ran.status == 0
        evaluation = ran.value["evaluation"]
        assert evaluation["claim"].startswith("exact network" if claim == "exact" else "deployed in float32")
        certified[claim] = evaluation["certified"][repr(0.01)]
    assert certified["float32"] <= certified["float32+float64"] <= certified["exact"]


@pytest.mark.parametrize(
    ("claim", "complaint"),
    [("float8", "no claim is named 'float8'"), ("bfloat16", "the weights are not exact in bfloat16")],
)
def test_claims_that_are_refused(call: Call, folder: Path, claim: str, complaint: str) -> None:
    ran = call("evaluate", folder, "--data.path", "digits", "--limit", "2", "--claim", claim)
    assert ran.status == 2 and complaint in ran.err
