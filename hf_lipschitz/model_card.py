"""The model card of a certified checkpoint: README.md, and a picture of certified accuracy against the radius.

Every figure in a card was measured or proved: the bound comes from the certificate beside the weights, accuracies from
an evaluation that the caller hands over. Without an evaluation there are none, and no picture. The certificate's
digests do not cover README.md, so a card can be written again at any time; one for weights that the certificate is not
of is refused.
"""

from __future__ import annotations

import dataclasses
import decimal
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.certificate import FILE_NAME, Bound, Certificate
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rounding import log10_of
from hf_lipschitz.bounds.weights import Weights, read_weights
from hf_lipschitz.certify import model_class
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.certified import CertifiedEvaluation
from hf_lipschitz.evaluation.lower_bounds import LowerEstimate
from hf_lipschitz.evaluation.radii import certified_accuracy

CARD_FILE = "README.md"
PICTURE_FILE = "certified_accuracy.png"
RECIPE_FILE = "recipe.yaml"
_TASK = "image-classification"
_ORIGINS = {"pixels[0,1]": "pixels in [0, 1]", "model_input": "the model's input", "embeddings": "token embeddings"}
_NORMS = {"l2": "l2 (all entries together)", "token_max": "token_max (the largest l2 norm of a token)"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """An evaluation with what it was made on.

    Attributes:
        result: clean and certified accuracy.
        data: the name of the data set, as a reader would look for it. split: which part of it.
        attacks: results of attacks just inside the certified radii, each as ``AttackResult.as_dict`` gives it.
        lower_estimates: what a search found beside the bounds to ``logits`` and ``features``.
    """

    result: CertifiedEvaluation
    data: str
    split: str = "test"
    attacks: Sequence[Mapping[str, Any]] = ()
    lower_estimates: Mapping[str, LowerEstimate] = dataclasses.field(default_factory=dict)


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    evaluation: Measured | None = None,
    recipe: str | None = None,
    certificate: Certificate | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write ``README.md`` (and ``certified_accuracy.png``, ``recipe.yaml``) into a checkpoint folder; the card's path.

    Each file is written under a temporary name and renamed. A picture of an earlier evaluation is removed.

    Args:
        folder: a checkpoint folder with a certificate of exactly its weights.
        evaluation: what was measured; None: the card has no accuracies.
        recipe: the training recipe as YAML; kept in ``recipe.yaml``, from where it is read if None.
        certificate: None reads the folder's.
        repo_id: the name to show in the commands; None shows ``org/name``.
        base_model: what this was fine-tuned from: a repository, or words.

    Raises:
        UserError: no folder, no certificate, or a certificate of other weights; one sentence.
    """
    folder = Path(folder)
    certificate, weights = _certified(folder, certificate)
    if recipe is not None:
        _replace(folder / RECIPE_FILE, recipe.encode())
    elif (folder / RECIPE_FILE).is_file():
        recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    if evaluation is None:
        (folder / PICTURE_FILE).unlink(missing_ok=True)
    else:
        _replace(folder / PICTURE_FILE, certified_accuracy_picture(evaluation.result))
    config = _config(folder)
    name = folder.resolve().name
    sections = [
        _opening(name, config, weights, certificate, base_model),
        _bound_section(certificate, evaluation.lower_estimates if evaluation is not None else {}),
        *([_accuracy_section(evaluation)] if evaluation is not None else []),
        _promise_section(certificate),
        _use_section(repo_id or "org/name"),
        *_training_section(folder, recipe),
        _versions_section(certificate),
    ]
    text = f"---\n{_metadata(name, config, evaluation, base_model).to_yaml()}\n---\n\n" + "\n".join(sections)
    _replace(folder / CARD_FILE, str(ModelCard(text)).encode())
    return folder / CARD_FILE


def radius_label(radius: float) -> str:
    """A radius as people write it: ``36/255`` for a multiple of 1/255, else the number."""
    steps = round(radius * 255)
    if radius > 0.0 and radius < 1.0 and abs(radius * 255 - steps) < 1e-9:
        return f"{steps}/255"
    return f"{radius:g}"


def certified_accuracy_picture(result: CertifiedEvaluation) -> bytes:
    """Certified accuracy against the l2 radius, as the bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    correct_B = result.predictions == result.labels
    finite_B = result.radii[np.isfinite(result.radii) & correct_B]
    end = max([*result.certified, float(np.quantile(finite_B, 0.99)) if finite_B.size else 0.0, 0.1])
    grid = np.linspace(0.0, end, 400)
    curve = [100.0 * certified_accuracy(result.radii, correct_B, float(radius)) for radius in grid]
    figure = Figure(figsize=(6.0, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axhline(100.0 * result.clean_accuracy, color="0.5", linestyle="--", label="clean accuracy")
    axes.plot(grid, curve, label="certified accuracy")
    axes.plot(list(result.certified), [100.0 * value for value in result.certified.values()], "o", color="C0")
    axes.set_xlabel("l2 radius (pixel units, pixels in [0, 1])")
    axes.set_ylabel(f"accuracy (% of {len(result.labels)} images)")
    axes.set_xlim(0.0, end)
    axes.set_ylim(0.0, 100.0)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _certified(folder: Path, certificate: Certificate | None) -> tuple[Certificate, Weights]:
    """The certificate and the weights, after a look at the digests: a card never speaks of other weights."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a saved checkpoint")
    try:
        certificate = certificate or Certificate.from_bytes(strict_json.read_bytes(folder / FILE_NAME))
        weights = read_weights(folder)
    except KernelError as error:
        raise UserError(f"{folder} cannot have a model card: {error}") from None
    if any(certificate.files.get(name) != digest for name, digest in weights.digests.items()):
        raise UserError(f"the certificate in {folder} is of other weights: run hf-lipschitz certify {folder}")
    return certificate, weights


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _metadata(name: str, config: Any, evaluation: Measured | None, base_model: str | None) -> ModelCardData:
    tags = [*(getattr(model_class(config), "model_tags", None) or ()), config.model_type]
    known: dict[str, Any] = {"base_model": base_model} if base_model and "/" in base_model else {}
    if evaluation is not None:
        known |= {"model_name": name, "eval_results": _eval_results(evaluation)}
    return ModelCardData(license="apache-2.0", library_name="transformers", pipeline_tag=_TASK, tags=tags, **known)


def _eval_results(evaluation: Measured) -> list[EvalResult]:
    result = evaluation.result
    metrics = [("accuracy", "Accuracy", result.clean_accuracy, None)]
    metrics += [
        ("certified_accuracy", f"Certified accuracy at l2 radius {radius_label(radius)}", value, {"radius": radius})
        for radius, value in result.certified.items()
    ]
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=evaluation.data,
            dataset_name=evaluation.data,
            dataset_split=evaluation.split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 6),
            metric_args=arguments,
        )
        for kind, title, value, arguments in metrics
    ]


def _opening(name: str, config: Any, weights: Weights, certificate: Certificate, base_model: str | None) -> str:
    count = sum(array.size for array in weights.values())
    names = [str(label) for label in (config.id2label or {}).values()]
    classes = ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])} and {len(names) - 10} more"
    kind = (config.architectures or ["model"])[0]
    mixer = f", token mixer `{config.token_mixer}`" if hasattr(config, "token_mixer") else ""
    origin = f" It was fine-tuned from {base_model}." if base_model else ""
    return (
        f"# {name}\n\n"
        f"An image classifier with a certificate: a small change of the image provably cannot change the output much, "
        f"and anyone can check the proof from the files of this repository.\n\n"
        f"`{kind}`, {count:,} parameters{mixer}, {config.num_channels} x {config.image_size} x {config.image_size} "
        f"pixels in [0, 1], classes: {classes}.{origin}\n"
    )


def _bound_section(certificate: Certificate, estimates: Mapping[str, LowerEstimate]) -> str:
    rows = [_bound_row(bound) for bound in (certificate.bound, certificate.bound_features)]
    text = (
        "## The bound\n\n"
        "| to | Lipschitz bound | log10 | norm | from |\n| --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\n"
        "Proved for the stored weights in real arithmetic, all figures rounded up; `lipschitz_certificate.json` states "
        "them exactly, with the function they are of.\n"
    )
    bounds = [bound for bound in (certificate.bound, certificate.bound_features) if bound.to in estimates]
    same = [bound for bound in bounds if estimates[bound.to].norm == bound.norm]
    found = " and ".join(_gap_text(bound, estimates[bound.to]) for bound in same)
    return f"{text}\nHow tight it is: a search found pairs of images with {found}.\n" if found else text


def _gap_text(bound: Bound, estimate: LowerEstimate) -> str:
    """A lower estimate beside its bound, both rounded outward."""
    low = decimal.Context(prec=5, rounding=decimal.ROUND_FLOOR).create_decimal(decimal.Decimal(estimate.value))
    return f"{bound.to} {low:f} times as far apart (the bound is {rounded_up(estimate.gap(bound.value), 4)} times that)"


def _bound_row(bound: Bound) -> str:
    value = rounded_up(bound.value, 10)
    norm, origin = _NORMS.get(bound.norm, bound.norm), _ORIGINS.get(bound.origin, bound.origin)
    return f"| {bound.to} | {value} | {log10_of(bound.value) + 0.0005:.3f} | {norm} | {origin} |"


def _accuracy_section(evaluation: Measured) -> str:
    result = evaluation.result
    figures = {f"certified at {radius_label(radius)}": value for radius, value in result.certified.items()}
    rows = [f"| {what} | {percent(value)} |" for what, value in {"clean": result.clean_accuracy, **figures}.items()]
    text = (
        "## Accuracy\n\n"
        f"Measured on {len(result.labels):,} images of `{evaluation.data}` ({evaluation.split}). *Certified at r* "
        "counts the images that are classified correctly and provably stay so for every change of l2 norm at most r "
        f"in pixel units. Claim: {result.claim}; logits and margins in float64, rounding subtracted.\n\n"
        "| | accuracy |\n| --- | --- |\n" + "\n".join(rows) + "\n\n"
        f"![Certified accuracy against the l2 radius]({PICTURE_FILE})\n"
    )
    for attack in evaluation.attacks:
        text += (
            f"\nAn attack ({attack['attack']}, {attack['steps']} steps, {attack['restarts']} restarts) just inside "
            f"each image's certified radius (by {attack['slack']:g}, pixel units) changed {attack['changed']} of "
            f"{attack['attacked']} predictions of the {attack['dtype']} model.\n"
        )
    return text


def rounded_up(value: float, digits: int = 5) -> str:
    """A bound in few digits, never below it."""
    return f"{decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING).create_decimal(decimal.Decimal(value)):f}"


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal, rounded down: an accuracy is never shown larger than it was."""
    return f"{math.floor(1000.0 * fraction + 1e-9) / 10.0:.1f} %"


def _promise_section(certificate: Certificate) -> str:
    bound = certificate.bound
    if bound.norm == "l2":
        moved = "two inputs at Euclidean distance e have logits"
    else:
        moved = "two inputs whose tokens each differ by at most e in Euclidean norm have logits"
    return (
        "## What the certificate promises, and what it does not\n\n"
        f"It promises that any {moved} at distance at most {rounded_up(bound.value)} * e, for the function that its "
        "bound program describes, with exactly these weights, in evaluation mode. `hf-lipschitz verify` re-derives the "
        "bound from the weights without running code of this repository, rebuilds the program from the model class and "
        "compares it, and runs both.\n\n"
        "It does not speak of\n\n"
        "- weights changed in any way: fine-tuned, cast, quantised, merged. Save the model again to certify it anew;\n"
        "- resizing, cropping or anything else that happens before the pixels reach the model;\n"
        "- floating-point forwards beyond the allowances it states: radii are those of the exact network;\n"
        "- whether a prediction is right, or how accurate the model is on other images;\n"
        "- changes of an image that are larger than its radius, or small in another sense than this norm.\n"
    )


def _use_section(repo_id: str) -> str:
    return f"""## Use

```bash
pip install hf-lipschitz
hf-lipschitz verify {repo_id}
```

```python
import hf_lipschitz  # registers the model; or pass trust_remote_code=True
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{repo_id}")
processor = AutoImageProcessor.from_pretrained("{repo_id}")
print(model.certificate.bound.value)
```

To fine-tune it, add the callback to a plain `Trainer`; it takes the constraint from this checkpoint, and what the
Trainer saves is certified again: `Trainer(model, ..., callbacks=[hf_lipschitz.LipschitzCallback()])`.
"""


def _training_section(folder: Path, recipe: str | None) -> list[str]:
    """How long training took, as the Trainer logged it, and the recipe; nothing where neither is known."""
    ran = _trainer_log(folder)
    text = ""
    if "train_runtime" in ran and "step" in ran:
        text += f"{ran['step']:,} steps in {ran['train_runtime']:.0f} s of wall-clock time.\n"
    if recipe is not None:
        fence = "`" * 3
        text += f"\nThe recipe (`hf-lipschitz train {RECIPE_FILE}`):\n\n{fence}yaml\n{recipe.rstrip()}\n{fence}\n"
    return [f"## Training\n\n{text.lstrip()}"] if text else []


def _trainer_log(folder: Path) -> dict[str, Any]:
    """The summary line of ``trainer_state.json``, if there is one."""
    try:
        history = json.loads((folder / "trainer_state.json").read_bytes())["log_history"]
        return next((line for line in reversed(history) if "train_runtime" in line), {})
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _versions_section(certificate: Certificate) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(certificate.versions.items()))
    return f"## Versions\n\nCertified with {versions}.\n"


def _replace(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in the same folder and rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp gives the file to its owner alone
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
