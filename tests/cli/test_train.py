"""`train`: a recipe and its overrides to a certified folder; mistakes in them are found before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_lipschitz.cli.train import recipe_overrides
from hf_lipschitz.errors import UserError
from tests.cli.conftest import Call

RECIPE = """
model:
  config: {image_size: 8, num_channels: 1, patch_size: 4, hidden_size: 16, num_hidden_layers: 1}
data: {path: digits}
optimizer: {lr: 0.06}
trainer: {max_steps: 4, batch_size: 64, logging_steps: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        ([], {}),
        (["--data.path", "x"], {"data.path": "x"}),
        (["--data.path=x=y", "--trainer.max_steps", "3"], {"data.path": "x=y", "trainer.max_steps": "3"}),
        (["--optimizer.lr", "-1"], {"optimizer.lr": "-1"}),
    ],
)
def test_overrides(arguments: list[str], overrides: dict[str, str]) -> None:
    assert recipe_overrides(arguments) == overrides


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x"], "'x' is one argument too many"),
        (["-x"], "'-x' is one argument too many"),
        (["--outptu", "x"], "did you mean --output?"),
        (["--max_steps", "3"], "did you mean --trainer.max_steps?"),
        (["--zzz", "x"], "keys of the recipe are --section.key value"),
        (["--data.path"], "--data.path has no value"),
    ],
)
def test_what_is_no_override(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        recipe_overrides(arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such.yaml", "--output", "{out}"], "no-such.yaml is not a file"),
        (["--data.path", "digits", "{recipe}"], "the recipe comes first"),
        (["{recipe}", "--outptu", "{out}"], "did you mean --output?"),
        (["{recipe}", "--output", "{out}", "--resmue"], "did you mean --resume?"),
        (["{recipe}", "--output", "{out}", "--resume", "--overwrite"], "choose one of them"),
        (["{recipe}", "--output", "{out}", "--trainer.maxsteps", "3"], "unknown key 'trainer.maxsteps'"),
        (["{recipe}", "--output", "{out}", "--trainer.max_steps", "many"], "trainer.max_steps is 'many'"),
        (["{recipe}", "--output", "{out}", "--trainer.schedule", "upwards"], "upwards"),
        (["{recipe}", "--output", "{out}", "--model.config.patch_size", "3"], "patch_size 3 does not divide"),
        (["{recipe}", "--output", "{out}", "--model.config.hidden_size", "15"], "must be even"),
        (["{recipe}", "--output", "{out}", "--data.path", "no-such-data"], "no-such-data"),
        (["{recipe}", "--output", "{full}"], "is not empty"),
        (["{recipe}", "--output", "{full}", "--overwrite"], "holds no earlier run"),
    ],
)
def test_a_mistake_is_one_line(call: Call, recipe: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    places = {"recipe": recipe, "out": tmp_path / "out", "full": full}
    ran = call("train", *(argument.format(**places) for argument in arguments))
    assert ran.status == 2
    assert says in ran.complaint and not ran.out
    assert (full / "thesis.txt").exists()
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_it_trains_certifies_and_writes_a_card(call: Call, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = call("train", recipe, "--output", out, "--json", "--trainer.seed", "5")
    assert ran.status == 0, ran.err
    value = ran.value
    assert set(value) == {"folder", "seconds", "steps", "last_log", "bound", "bound_features", "recipe"}
    assert (value["folder"], value["steps"], value["recipe"]["trainer"]["seed"]) == (str(out), 4, 5)
    assert {"loss", "lipschitz_bound", "cap_excess_max"} <= set(value["last_log"])
    assert "seed: 5" in (out / "recipe.yaml").read_text()
    assert "seed: 5" in (out / "README.md").read_text()
    assert call("verify", out, "--require", "bound").status == 0

    again = call("train", recipe, "--output", out, "--overwrite")
    assert again.status == 0
    assert again.out.startswith("trained 4 steps") and "to logits" in again.out
    assert f"hf-lipschitz evaluate {out} --data.path digits" in again.out
