"""Recipes: read, overridden from the command line, refused with one sentence, written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from hf_lipschitz.errors import UserError
from hf_lipschitz.training.recipe import Recipe, load_recipe, packaged_recipe

_ROOT = Path(__file__).resolve().parents[2]
# frontier_*: sweeps of examples/, which are no recipes.
CONFIGS = [path for path in sorted((_ROOT / "configs").glob("*.yaml")) if not path.name.startswith("frontier_")]
SHIPPED = [*CONFIGS, *sorted((_ROOT / "hf_lipschitz" / "recipes").glob("*.yaml"))]
SMALLEST = """
model: {}
data: {path: digits}
optimizer: {lr: 0.1}
trainer: {max_steps: 5}
"""


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST)
    return path


def looked_up(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def test_the_smallest_recipe_has_the_documented_defaults(smallest: Path) -> None:
    recipe = load_recipe(smallest)
    assert (recipe.model.family, recipe.model.preset, recipe.model.config) == ("lip_vit", None, {})
    assert (recipe.data.train_split, recipe.data.test_split, recipe.data.resize) == ("train", "test", False)
    assert (recipe.loss.name, recipe.loss.epsilon, recipe.loss.scale) == ("emma", None, None)
    assert recipe.evaluation.radii == (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load_and_survive_being_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert load_recipe(tmp_path / "again.yaml").to_yaml() == recipe.to_yaml()
    assert set(yaml.safe_load(recipe.to_yaml())) == set(Recipe.model_fields)


def test_both_folders_of_recipes_are_looked_at() -> None:
    assert {path.parent.name for path in SHIPPED} == {"configs", "recipes"}


OVERRIDES: list[tuple[str, str, Any]] = [
    ("data.path", "org/name", "org/name"),
    ("data.path", "'36/255'", "36/255"),
    ("data.flip", "true", True),
    ("data.image_column", "null", None),
    ("trainer.max_steps", "7", 7),
    ("trainer.save_steps", "~", None),
    ("trainer.bf16", "auto", "auto"),
    ("trainer.bf16", "yes", True),
    ("loss.epsilon", "36/255", 36 / 255),
    ("loss.epsilon", " 1 / 3 ", 1 / 3),
    ("optimizer.lr", "1e-3", 1e-3),
    ("optimizer.lr", "2", 2.0),
    ("evaluation.radii", "[0, 36/255, 1]", (0.0, 36 / 255, 1.0)),
    ("model.config.stages", "[{depth: 1, width: 8}]", [{"depth": 1, "width": 8}]),
    ("model.config.token_mixer", "attention", "attention"),
    ("trainer.arguments.save_total_limit", "3", 3),
    ("loss", "{name: gloro, scale: 2}", None),
]


@pytest.mark.parametrize(("key", "text", "expected"), OVERRIDES)
def test_overrides_are_yaml_values(smallest: Path, key: str, text: str, expected: Any) -> None:
    recipe = load_recipe(smallest, {key: text})
    if key == "loss":
        assert (recipe.loss.name, recipe.loss.scale, recipe.loss.epsilon) == ("gloro", 2.0, None)
    else:
        value = looked_up(recipe, key)
        assert value == expected and type(value) is type(expected)


def test_overrides_fill_an_empty_section_and_the_last_of_two_keys_wins(smallest: Path) -> None:
    smallest.write_text(SMALLEST + "loss:\n")
    recipe = load_recipe(smallest, {"loss.scale": "5", "data": "{path: a, flip: true}", "data.path": "b"})
    assert (recipe.loss.scale, recipe.data.path, recipe.data.flip) == (5.0, "b", True)


def test_overrides_do_not_touch_the_file(smallest: Path) -> None:
    load_recipe(smallest, {"data.path": "elsewhere"})
    assert smallest.read_text() == SMALLEST


REFUSED: list[tuple[str, dict[str, str], str]] = [
    # (the text of the recipe, overrides, what the sentence says)
    (SMALLEST, {"data.pth": "x"}, "unknown key 'data.pth'; known there: path, train_split"),
    (SMALLEST, {"optimzer.lr": "1"}, "unknown key 'optimzer'; known there: model, data, loss"),
    (SMALLEST.replace("optimizer", "optimzer"), {}, "unknown key 'optimzer'; known"),  # not: optimizer is missing
    (SMALLEST, {"trainer.max_step": "1"}, "unknown key 'trainer.max_step'; known there: max_steps"),
    (SMALLEST.replace("lr: 0.1", ""), {}, "the key 'optimizer.lr' is missing"),
    (SMALLEST.replace("data: {path: digits}", ""), {}, "the key 'data' is missing"),
    (SMALLEST, {"trainer.max_steps": "many"}, "trainer.max_steps is 'many': input should be a valid integer"),
    (SMALLEST, {"trainer.max_steps": "0"}, "trainer.max_steps is 0: input should be greater than 0"),
    (SMALLEST, {"trainer.max_steps": "1.5"}, "trainer.max_steps is 1.5"),
    (SMALLEST, {"trainer.bf16": "maybe"}, "trainer.bf16 is 'maybe': it must be true, false or auto"),
    (SMALLEST, {"trainer": "3"}, "trainer is 3: write it as a section with keys of max_steps, batch_size"),
    (SMALLEST, {"data.flip": "sometimes"}, "data.flip is 'sometimes'"),
    (SMALLEST, {"data.crop": "-1"}, "data.crop is -1"),
    (SMALLEST, {"model.family": "resnet"}, "model.family is 'resnet': input should be 'lip_vit'"),
    (SMALLEST, {"model.preset": "3"}, "model.preset is 3"),
    (SMALLEST, {"optimizer.name": "lion"}, "optimizer.name is 'lion': input should be 'spectral_muon' or 'adamw'"),
    (SMALLEST, {"optimizer.lr": "-1"}, "optimizer.lr is -1"),
    (SMALLEST, {"optimizer.lr": ".inf"}, "optimizer.lr is inf: input should be a finite number"),
    (SMALLEST, {"optimizer.lr": ".nan"}, "optimizer.lr is nan"),
    (SMALLEST, {"optimizer.momentum": "1"}, "optimizer.momentum is 1"),
    (SMALLEST, {"loss.epsilon": "36/0"}, "loss.epsilon is '36/0': write a number, or a fraction such as 36/255"),
    (SMALLEST, {"loss.epsilon": "a/b"}, "loss.epsilon is 'a/b': write a number"),
    (SMALLEST, {"loss.epsilon": "0/255"}, "loss.epsilon is"),
    (SMALLEST, {"loss": ""}, "loss is None: write it as a section"),
    (SMALLEST, {"evaluation.radii": "[]"}, "evaluation.radii is []"),
    (SMALLEST, {"evaluation.radii": "[0, -1/255]"}, "evaluation.radii.1 is"),
    (SMALLEST, {"evaluation.radii": "[.inf]"}, "evaluation.radii.0 is inf"),
    (SMALLEST, {"evaluation.radii": "1"}, "evaluation.radii is 1"),
    (SMALLEST, {"data.path.x": "1"}, "--data.path.x: 'path' is a value, not a section"),
    (SMALLEST, {"loss.epsilon": "[1"}, "--loss.epsilon: '[1' is not a YAML value"),
    (SMALLEST, {"loss": "{scale: 1, scale: 2}"}, "--loss: '{scale: 1, scale: 2}' is not a YAML value"),
    (SMALLEST + "data: {path: other}\n", {}, "is not valid YAML: key 'data' twice"),
    (SMALLEST.replace("path: digits", "path: a, path: b"), {}, "is not valid YAML: key 'path' twice"),
    ("model: [", {}, "is not valid YAML"),
    ("? [a, b]\n: 1", {}, "is not valid YAML"),
    ("model: !!python/object/apply:os.getcwd []", {}, "is not valid YAML"),
    ("", {}, "must hold a mapping with the keys model, data, loss, optimizer, trainer, evaluation"),
    ("- 1\n- 2", {}, "must hold a mapping"),
    ("1: 2\n" + SMALLEST, {}, "1 is 1: keys should be strings"),
]


@pytest.mark.parametrize(("text", "overrides", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_mistakes_get_one_sentence(tmp_path: Path, text: str, overrides: dict[str, str], said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    message = str(error.value)
    assert said in message and "\n" not in message and len(message) < 400
    assert message.startswith((str(path), "--"))


@pytest.mark.parametrize("name", ["missing.yaml", "folder"])
def test_a_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{name} is not a file: give the path of a recipe"):
        load_recipe(tmp_path / name)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match=r"recipe\.yaml is not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")


def test_texts_that_are_not_ascii(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SMALLEST.replace("digits", "Straße"), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").data.path == "Straße"


def test_packaged_recipes_are_found_by_name() -> None:
    assert load_recipe(packaged_recipe("lip_vit_digits.yaml")).data.path == "digits"
    with pytest.raises(UserError, match=r"no packaged recipe is named 'x.yaml'; known: .*lip_vit_digits.yaml"):
        packaged_recipe("x.yaml")


@pytest.mark.parametrize("section", ["", *Recipe.model_fields])
def test_a_recipe_is_frozen(smallest: Path, section: str) -> None:
    recipe = load_recipe(smallest)
    target = looked_up(recipe, section) if section else recipe
    key = next(iter(type(target).model_fields))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(target, key, getattr(target, key))
