"""`hf-lipschitz train`: a recipe, and options that override its keys, to a certified checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lipschitz.cli.output import JsonOption, note, print_json, quiet_transformers, result, working
from hf_lipschitz.errors import UserError

_OPTIONS = ("--output", "--resume", "--overwrite", "--json", "--help")
_OURS = ("config.json", "trainer_state.json", "checkpoint-*")  # what a folder of an earlier run holds


def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The checkpoint folder; by default one named after the recipe."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete an earlier run in the output folder first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train as a recipe says. Any key of the recipe is an option: --data.path DIR, --trainer.max_steps 100."""
    if config.startswith("-"):
        raise UserError(f"the recipe comes first: hf-lipschitz train CONFIG {config} ...")
    overrides = recipe_overrides(context.args)
    output = output or Path(Path(config).stem)
    if resume and overwrite:
        raise UserError("--resume goes on with what --overwrite deletes: choose one of them")
    if overwrite:
        _refuse_strangers(output)
    with working():
        trained, certificate = _train(config, overrides, output, resume=resume, overwrite=overwrite)
    summary = _summary(trained, certificate)
    if as_json:
        print_json(summary)
        return
    from hf_lipschitz.verdict import bound_text

    result(f"trained {summary['steps']:,} steps in {trained.seconds:.0f} s into {trained.folder}")
    result(f"  {bound_text(certificate.bound)}")
    result(f"next: hf-lipschitz evaluate {trained.folder} --data.path {trained.recipe.data.path}")


def recipe_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--key.sub value` and `--key.sub=value` as a mapping; UserError for anything else, with the option meant."""
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        key = option.removeprefix("--")
        if not option.startswith("--"):
            raise UserError(f"'{option}' is one argument too many: hf-lipschitz train CONFIG --output DIR")
        if "." not in key:
            raise UserError(f"there is no option {option}: {_hint(option)}")
        if not equals:
            if not rest:
                raise UserError(f"{option} has no value: write {option} VALUE")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


def _hint(option: str) -> str:
    """What may have been meant: one of our options, or a key of the recipe without its section."""
    from hf_lipschitz.training.recipe import Recipe

    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    keys = {
        f"--{key}": f"--{name}.{key}"
        for name, section in sections.items()
        for key in getattr(section, "model_fields", ())
    }
    near = get_close_matches(option, [*_OPTIONS, *keys], n=1, cutoff=0.75)
    return f"did you mean {keys.get(near[0], near[0])}?" if near else "keys of the recipe are --section.key value"


def _train(config: str, overrides: dict[str, str], output: Path, **options: Any) -> tuple[Any, Any]:
    from hf_lipschitz.training.recipe import load_recipe

    recipe = load_recipe(config, overrides)  # before the slow imports, so that a typing mistake shows at once
    from hf_lipschitz.bounds import strict_json
    from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
    from hf_lipschitz.model_card import write_model_card
    from hf_lipschitz.training.run import train as run

    quiet_transformers()
    _check_arguments(recipe, output)
    trained = run(recipe, output, **options)
    certificate = Certificate.from_bytes(strict_json.read_bytes(trained.folder / FILE_NAME))
    write_model_card(trained.folder, recipe=recipe.to_yaml(), certificate=certificate)
    note(f"wrote {trained.folder}")
    return trained, certificate


def _check_arguments(recipe: Any, output: Path) -> None:
    """Values that transformers does not take (a schedule, a strategy) are the user's to mend, so they are one line."""
    from hf_lipschitz.training.run import training_arguments

    try:
        training_arguments(recipe, output)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"the recipe's section 'trainer' is refused by transformers: {error}") from None


def _refuse_strangers(folder: Path) -> None:
    """Overwriting deletes a folder: only one that a run has made."""
    if folder.is_dir() and any(folder.iterdir()) and not any(any(folder.glob(name)) for name in _OURS):
        raise UserError(f"{folder} holds no earlier run, so --overwrite leaves it alone: choose another folder")


def _summary(trained: Any, certificate: Any) -> dict[str, Any]:
    logged = [line for line in trained.history if "loss" in line]
    return {
        "folder": str(trained.folder),
        "seconds": round(trained.seconds, 3),
        "steps": max((int(line.get("step", 0)) for line in trained.history), default=0),
        "last_log": logged[-1] if logged else None,
        "bound": certificate.bound.to_json(),
        "bound_features": certificate.bound_features.to_json(),
        "recipe": trained.recipe.model_dump(mode="json"),
    }
