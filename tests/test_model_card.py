"""The model card: parseable metadata, only measured figures, and never one for weights that are not certified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.certified import CertifiedEvaluation
from hf_lipschitz.evaluation.lower_bounds import LowerEstimate
from hf_lipschitz.model_card import (
    Measured,
    certified_accuracy_picture,
    percent,
    radius_label,
    rounded_up,
    write_model_card,
)
from hf_lipschitz.verification import verify
from tests.architecture import code_blocks
from tests.cli.conftest import flip_a_bit, folder, made

__all__ = ["folder", "made"]  # fixtures
FILES = {"README.md", "certified_accuracy.png", "recipe.yaml"}
ATTACK = {
    "attack": "l2 PGD",
    "steps": 50,
    "restarts": 3,
    "changed": 0,
    "attacked": 4,
    "dtype": "float32",
    "slack": 1e-5,
}


def _evaluation(radii: list[float] | None = None) -> CertifiedEvaluation:
    """Four images: three right, one of them with an infinite radius."""
    radii_B = np.array(radii or [0.05, 0.2, np.inf, 0.9])
    labels = np.array([0, 1, 2, 3])
    certified = {0.0: 0.75, 36 / 255: 0.5, 1.0: 0.25}
    return CertifiedEvaluation(0.75, certified, radii_B, np.array([0, 1, 2, 0]), labels, 1.0, 1e-12)


def _certificate(folder: Path) -> Certificate:
    return Certificate.from_bytes(strict_json.read_bytes(folder / FILE_NAME))


def test_a_full_card(folder: Path) -> None:
    measured = Measured(_evaluation(), "digits", "test", [ATTACK])
    path = write_model_card(folder, evaluation=measured, recipe="a: 1\n", repo_id="someone/digits")
    text = path.read_text()
    bound = _certificate(folder).bound
    for said in (
        f"| logits | {rounded_up(bound.value, 10)} |",
        "| clean | 75.0 % |",
        "| certified at 36/255 | 50.0 % |",
        "| certified at 1 | 25.0 % |",
        "4 images of `digits` (test)",
        "exact network",
        "changed 0 of 4 predictions of the float32 model",
        "](certified_accuracy.png)",
        'from_pretrained("someone/digits")',
        "hf-lipschitz verify someone/digits",
        "trust_remote_code=True",
        "LipschitzCallback()",
        "```yaml\na: 1\n```",
        f"torch {_certificate(folder).versions['torch']}",
    ):
        assert said in text
    assert "{" not in text  # nothing of the template is left
    assert verify(folder).ok


def test_the_gap_stands_beside_the_bound_where_an_estimate_exists(folder: Path) -> None:
    bound = _certificate(folder).bound
    found = LowerEstimate(bound.value / 1.25, 0.0, torch.zeros(1), torch.zeros(1), "l2")
    other = LowerEstimate(0.5, 0.0, torch.zeros(1), torch.zeros(1), "token_max")  # in another norm: says nothing here
    measured = Measured(_evaluation(), "digits", lower_estimates={"logits": found, "features": other})
    text = write_model_card(folder, evaluation=measured).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("How tight it is")]
    assert "(the bound is 1.25" in line and "features" not in line
    shown = float(line.split("logits ")[1].split()[0])
    assert 0.999 * found.value <= shown <= found.value
    assert "How tight" not in write_model_card(folder, evaluation=Measured(_evaluation(), "digits")).read_text()


def test_the_metadata(folder: Path) -> None:
    write_model_card(folder, evaluation=Measured(_evaluation(), "digits"), base_model="someone/base")
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert {"lipschitz", "certified-robustness", "lip_vit"} <= set(data.tags or [])
    assert data.base_model == "someone/base"
    results = {
        (each.metric_type, (each.metric_args or {}).get("radius")): each.metric_value for each in data.eval_results
    }
    assert results == {
        ("accuracy", None): 0.75,
        ("certified_accuracy", 0.0): 0.75,
        ("certified_accuracy", 36 / 255): 0.5,
        ("certified_accuracy", 1.0): 0.25,
    }
    assert {(each.dataset_name, each.dataset_split) for each in data.eval_results} == {("digits", "test")}


def test_without_an_evaluation_there_are_no_figures(folder: Path) -> None:
    write_model_card(folder, evaluation=Measured(_evaluation(), "digits", attacks=[ATTACK]))
    write_model_card(folder)
    text = (folder / "README.md").read_text()
    assert "%" not in text and "png" not in text and "model-index" not in text and "changed 0 of" not in text
    assert not (folder / "certified_accuracy.png").exists()
    assert ModelCard.load(folder / "README.md").data.eval_results is None


def test_the_recipe_and_the_time_are_kept(folder: Path) -> None:
    write_model_card(folder, recipe="a: 1\n")
    log = [{"loss": 1.0, "step": 10}, {"train_runtime": 12.3, "step": 1200}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    text = write_model_card(folder, evaluation=Measured(_evaluation(), "digits")).read_text()
    assert "```yaml\na: 1\n```" in text and "1,200 steps in 12 s" in text
    (folder / "trainer_state.json").write_text("{")
    assert "steps in" not in write_model_card(folder).read_text()


def test_the_code_of_the_card_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model_card(folder, repo_id=str(folder))
    (block,) = [block for block in code_blocks.blocks(path) if block.language == "python"]
    exec(compile(block.text, str(path), "exec"), {})
    assert capsys.readouterr().out == f"{_certificate(folder).bound.value}\n"


def _no_certificate(folder: Path) -> None:
    (folder / FILE_NAME).unlink()


def _other_weights(folder: Path) -> None:
    flip_a_bit(folder / "model.safetensors", -1)


@pytest.mark.parametrize(
    ("spoil", "says"), [(_no_certificate, FILE_NAME), (_other_weights, "is of other weights: run hf-lipschitz certify")]
)
def test_no_card_for_weights_that_are_not_certified(folder: Path, spoil: Any, says: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=says):
        write_model_card(folder, evaluation=Measured(_evaluation(), "digits"))
    assert not FILES & {path.name for path in folder.iterdir()}
    with pytest.raises(UserError, match="is not a folder"):
        write_model_card(folder / "nothing")


def test_nothing_half_written_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model_card(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_model_card(folder, recipe="a: 2\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("radii", [None, [np.inf] * 4, [0.0] * 4])
def test_the_picture(radii: list[float] | None, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(certified_accuracy_picture(_evaluation(radii)))
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is drawn


@pytest.mark.parametrize(
    ("radius", "label"), [(0.0, "0"), (36 / 255, "36/255"), (1.0, "1"), (0.5, "0.5"), (2.0, "2"), (1 / 255, "1/255")]
)
def test_radius_labels(radius: float, label: str) -> None:
    assert radius_label(radius) == label


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.23456, 5, "1.2346"),
        (1.00001, 5, "1.0001"),
        (0.9999911, 5, "1.0000"),
        (12345.6, 5, "12346"),
        (3e-7, 2, "3.0e-7"),
    ],
)
def test_a_bound_is_never_shown_below_itself(value: float, digits: int, text: str) -> None:
    shown = rounded_up(value, digits)
    assert float(shown) >= value * (1 - 1e-15)
    assert float(shown) == pytest.approx(float(text), rel=1e-12)


def test_percent() -> None:
    assert percent(0.98765) == "98.7 %"
