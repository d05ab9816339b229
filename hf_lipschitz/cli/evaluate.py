"""`hf-lipschitz evaluate`: verify a folder, then clean and certified accuracy of the exact network, and an attack."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lipschitz.cli.estimating import gaps, search, sentence
from hf_lipschitz.cli.output import (
    JsonOption,
    complain,
    note,
    print_json,
    progress_bar,
    result,
    working,
)
from hf_lipschitz.cli.verified import verified_or_exit
from hf_lipschitz.errors import UserError

_RADII = "0,36/255,72/255,108/255,1"


def evaluate(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder with its certificate.")],
    data_path: Annotated[
        str | None,
        typer.Option("--data.path", metavar="PATH", help="digits, a folder of images or parquet files, or a Hub name."),
    ] = None,
    data_split: Annotated[str, typer.Option("--data.split", metavar="NAME", help="Which part of it.")] = "test",
    image_column: Annotated[str | None, typer.Option("--data.image_column", metavar="NAME")] = None,
    label_column: Annotated[str | None, typer.Option("--data.label_column", metavar="NAME")] = None,
    resize: Annotated[bool, typer.Option("--data.resize", help="Resize images to the model's size.")] = False,
    radii: Annotated[str, typer.Option(metavar="R,R", help="l2 radii in pixel units, fractions allowed.")] = _RADII,
    claim: Annotated[
        str, typer.Option(metavar="C", help="exact, float64, float32, bfloat16 or float32+float64: whose radii.")
    ] = "exact",
    attack: Annotated[
        bool, typer.Option(help="Also run a 50-step PGD attack just inside the certified radii.")
    ] = False,
    estimate: Annotated[bool, typer.Option(help="Also search a lower estimate beside each bound.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 256,
    card: Annotated[bool, typer.Option(help="Write the figures into the model card.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Verify a folder, then measure clean and certified accuracy (of the exact network, or of a deployed forward)."""
    wanted = parse_radii(radii)
    check_claim(claim)
    if data_path is None:
        raise UserError("which images to evaluate on is not said: add --data.path PATH")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a checkpoint (hf-lipschitz verify fetches one)")
    spec = {"path": data_path, "image_column": image_column, "label_column": label_column, "resize": resize}
    verdict = verified_or_exit(str(folder), as_json=as_json)
    check_certificate(verdict.certificate)
    with working():
        model, data = _load(folder, spec, data_split, limit)
        evaluation = _certify(model, data, wanted, batch_size, claim)
        attacks = _attack(model, data, evaluation) if attack else {}
        estimates = search(model, data.pixel_values) if estimate else {}
        if card and limit is None:  # a card speaks of a whole split
            _write_card(folder, evaluation, data_path, data_split, attacks, estimates)
    bounds = {"logits": verdict.certificate.bound.value, "features": verdict.certificate.bound_features.value}
    changed = sum(attacks[dtype]["changed"] for dtype in ("float32", "float64")) if attacks else 0
    if as_json:
        print_json(
            {
                "ok": changed == 0,
                "folder": str(folder),
                "data": {"path": data_path, "split": data_split},
                "evaluation": evaluation.as_dict(),
                "attacks": attacks or None,
                "lower_estimates": gaps(estimates, bounds) or None,
                "verification": verdict.to_json(),
            }
        )
    else:
        _print_table(folder, evaluation, attacks)
        for output, found in estimates.items():
            result(f"bound to the {output} {bounds[output]!r}; {sentence(found, bounds[output])}")
    _complain_of_changes(folder, changed, attacks.get("float64", {}).get("changed", 0))


def _complain_of_changes(folder: Path, changed: int, refuted: int) -> None:
    """Status 1 where an attack inside the radii succeeded; ``refuted`` of the changes were in float64."""
    if refuted:
        complain(f"{refuted} float64 predictions changed inside their radius: the certificate of {folder} is refuted")
    elif changed:
        complain(f"{changed} float32 predictions changed inside the exact network's radius: rounding matters")
    if changed:
        raise typer.Exit(1)


def parse_radii(text: str) -> tuple[float, ...]:
    """`0,36/255,1` as numbers, in the order given; UserError for anything that is no finite number of at least 0."""
    try:
        radii = tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"--radii is {text!r}: write numbers or fractions with commas, such as {_RADII}") from None
    if min(radii) < 0.0:
        raise UserError(f"--radii is {text!r}: a radius is at least 0")
    return radii


def check_certificate(certificate: Any) -> None:
    """UserError for a certificate from which no radius of an image follows."""
    from hf_lipschitz.evaluation.certified import certified_numbers

    certified_numbers(certificate)


def check_claim(claim: str) -> None:
    """UserError for a claim that nobody can make, before a model is loaded."""
    from hf_lipschitz.evaluation.deployed import deployment_of

    deployment_of(claim)


def _load(folder: Path, spec: dict[str, Any], split: str, limit: int | None) -> tuple[Any, Any]:
    """The model of a verified folder, and the images that fit it."""
    import torch
    from transformers import AutoModelForImageClassification

    from hf_lipschitz.training.data import ImageData, load_image_data
    from hf_lipschitz.training.recipe import DataSection

    if spec["path"] == "digits" and split not in ("train", "test"):
        raise UserError(f"digits has no part {split!r}: choose --data.split train or test")
    model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    section = DataSection(**spec, test_split=split)
    part = "train" if split == "train" else "test"
    data = load_image_data(section, part, size=model.config.image_size, channels=model.config.num_channels)
    data.check(model.config)
    if limit is not None:
        data = ImageData(data.pixel_values[:limit], data.labels[:limit], data.label_names)
    return model, data


def _certify(model: Any, data: Any, radii: tuple[float, ...], batch_size: int, claim: str) -> Any:
    from hf_lipschitz.evaluation.certified import evaluate_certified

    return evaluate_certified(
        model,
        data.pixel_values,
        data.labels,
        certificate=model.certificate,
        radii=radii,
        batch_size=batch_size,
        progress=len(data.labels) > batch_size,
        claim=claim,
    )


def _attack(model: Any, data: Any, evaluation: Any) -> dict[str, dict[str, Any]]:
    from hf_lipschitz.cli.attacking import attack_inside

    with progress_bar() as progress:
        task = progress.add_task("attack", total=3 * len(data.labels))
        return attack_inside(model, data.pixel_values, evaluation, advance=lambda n: progress.advance(task, n))


def _write_card(
    folder: Path, evaluation: Any, path: str, split: str, attacks: dict[str, dict[str, Any]], estimates: dict[str, Any]
) -> None:
    from hf_lipschitz.model_card import Measured, write_model_card

    name = Path(path).resolve().name if Path(path).expanduser().exists() else path
    inside = [attacks[dtype] for dtype in ("float32", "float64") if dtype in attacks]
    note(f"wrote {write_model_card(folder, evaluation=Measured(evaluation, name, split, inside, estimates))}")


def _print_table(folder: Path, evaluation: Any, attacks: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hf_lipschitz.model_card import percent, radius_label

    table = Table("", f"{len(evaluation.labels):,} images", title=str(folder))
    table.add_row("clean accuracy", percent(evaluation.clean_accuracy))
    for radius, value in evaluation.certified.items():
        table.add_row(f"certified at l2 radius {radius_label(radius)}", percent(value))
    for kind, counts in attacks.items():
        what = f"changed at {counts['factor']:g} times the radius" if kind == "control" else f"changed inside, {kind}"
        table.add_row(what, f"{counts['changed']} of {counts['attacked']}")
    Console().print(table)
    if evaluation.deployed_error is not None:
        result(f"features of that forward err by at most {evaluation.deployed_error:.3g} in the balls (l2)")
    result(f"claim: {evaluation.claim}; radii in pixel units, logits and margins in float64")
