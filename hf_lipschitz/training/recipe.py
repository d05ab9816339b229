"""A run is data: one YAML file, read into a frozen ``Recipe``; command-line options only override its keys."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hf_lipschitz.errors import UserError


def _number(value: Any) -> Any:
    """Accept fractions such as ``36/255``, which is how radii are written in this field."""
    if not isinstance(value, str) or "/" not in value:
        return value
    try:
        return float(Fraction(value.replace(" ", "")))
    except (ValueError, ArithmeticError):
        raise ValueError("write a number, or a fraction such as 36/255") from None


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    """Which model: a family, a preset of it, and configuration keys that override the preset."""

    family: Literal["lip_vit"] = "lip_vit"
    preset: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class DataSection(_Section):
    """Which images: ``digits`` (scikit-learn's), a folder of parquet or image files, or a Hub dataset name."""

    path: str
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    resize: bool = False
    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False


class LossSection(_Section):
    """Which loss, at which radius (pixel units), and the factor on the logits inside it; by default the loss's own."""

    name: str = "emma"
    epsilon: Annotated[Number, Field(gt=0)] | None = None
    scale: Annotated[Number, Field(gt=0)] | None = None


class OptimizerSection(_Section):
    """``spectral_muon``, or ``adamw`` (any optimizer works: the callback keeps the constraint).

    ``steps`` are those of the orthogonalisation, ``headroom`` is the callback's: both for spectral_muon.
    """

    name: Literal["spectral_muon", "adamw"] = "spectral_muon"
    lr: Annotated[Number, Field(gt=0)]
    adamw_lr: Annotated[Number, Field(gt=0)] = 3e-3
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    steps: Annotated[int, Field(ge=1, le=8)] = 4
    headroom: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class TrainerSection(_Section):
    """What is handed to ``transformers.TrainingArguments``; ``arguments`` takes any other of its keys.

    ``estimate_steps`` is ours: after so many steps the next log line carries a lower estimate beside the bound.
    """

    max_steps: Annotated[int, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)] = 256
    warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    schedule: str = "linear"
    bf16: bool | Literal["auto"] = False
    logging_steps: Annotated[int, Field(gt=0)] = 50
    estimate_steps: Annotated[int, Field(gt=0)] | None = None
    save_steps: Annotated[int, Field(gt=0)] | None = None
    seed: int = 0
    arguments: dict[str, Any] = Field(default_factory=dict)


class EvaluationSection(_Section):
    """Radii (l2, pixel units) at which certified accuracy is reported."""

    radii: Annotated[tuple[Annotated[Number, Field(ge=0)], ...], Field(min_length=1)] = (
        0.0,
        36 / 255,
        72 / 255,
        108 / 255,
        1.0,
    )
    batch_size: Annotated[int, Field(gt=0)] = 500


class Recipe(_Section):
    """Everything a training run is determined by. Unknown keys are refused."""

    model: ModelSection
    data: DataSection
    loss: LossSection = LossSection()
    optimizer: OptimizerSection
    trainer: TrainerSection
    evaluation: EvaluationSection = EvaluationSection()

    def to_yaml(self) -> str:
        """The recipe as YAML, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe and override keys, as ``{"data.path": "digits", "trainer.max_steps": "10"}``, with YAML values.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown, or a value is inadmissible; one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of a recipe, such as configs/lip_vit_nano_cifar10.yaml")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    for key, text in (overrides or {}).items():
        _override(value, key, text)
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error)}") from None


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML; ConstructorError names the key and its line."""
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {name!r} twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def packaged_recipe(name: str) -> Path:
    """The path of a recipe that ships inside the package, such as ``lip_vit_digits.yaml``."""
    folder = Path(str(importlib.resources.files("hf_lipschitz") / "recipes"))
    if not (folder / name).is_file():
        known = ", ".join(sorted(p.name for p in folder.glob("*.yaml")))
        raise UserError(f"no packaged recipe is named {name!r}; known: {known}")
    return folder / name


def _override(value: dict[str, Any], key: str, text: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if value.get(section) is None:
            value[section] = {}
        value = value[section]
        if not isinstance(value, dict):
            raise UserError(f"--{key}: {section!r} is a value, not a section of the recipe")
    try:
        value[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"--{key}: {text!r} is not a YAML value") from None


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation, as one sentence that names the key and what is known or expected.

    Unknown keys come first: a misspelt one is reported as such, not as the missing key that it was meant to be.
    """
    found = error.errors()
    first = next((problem for problem in found if problem["type"] == "extra_forbidden"), found[0])
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; known there: {', '.join(_section(path[:-1]).model_fields)}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing: add it"
    if first["type"] == "model_type":
        return (
            f"{key} is {first['input']!r}: write it as a section with keys of {', '.join(_section(path).model_fields)}"
        )
    if path[:2] == ["trainer", "bf16"]:  # a union: pydantic adds the member that it tried
        return f"trainer.bf16 is {first['input']!r}: it must be true, false or auto"
    said = first["msg"].removeprefix("Value error, ")
    return f"{key} is {first['input']!r}: {said[0].lower()}{said[1:]}"


def _section(path: list[str]) -> type[_Section]:
    """The section of a recipe at a path of keys."""
    section: Any = Recipe
    for part in path:
        section = section.model_fields[part].annotation
    return section
