"""What the demo does, step by step; each function is one step and returns what the later ones and the table need.

Nothing here is special to the demo: these are the calls that a user would make.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lipschitz.cli.demo_progress import Step

if TYPE_CHECKING:
    from hf_lipschitz.evaluation.certified import CertifiedEvaluation
    from hf_lipschitz.training.data import ImageData
    from hf_lipschitz.training.recipe import Recipe

FILES = (
    *("config.json", "model.safetensors", "preprocessor_config.json", "lipschitz_certificate.json"),
    *("hf_lipschitz_remote.py", "README.md", "trainer_state.json"),
)
RELOADED_IMAGES = 16


class DemoFailure(Exception):
    """Something that must hold does not; the message says what."""


@dataclass(frozen=True)
class Settings:
    """What the options of the command come to."""

    out: Path
    recipe: Recipe
    attacked_images: int | None
    fine_tuning_steps: int
    repo: str
    endpoint: str | None
    token: str | None
    is_loopback: bool

    @property
    def digits(self) -> Path:
        """The folder of the trained model."""
        return self.out / "digits"

    @property
    def odd_even(self) -> Path:
        """The folder of the fine-tuned model."""
        return self.out / "odd-even"


@dataclass
class Outcome:
    """What has been found so far; ``as_dict`` is what ``--json`` prints of it."""

    training: dict[str, Any] = field(default_factory=dict)
    reload: dict[str, Any] = field(default_factory=dict)
    evaluation: CertifiedEvaluation | None = None
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    pushed: dict[str, Any] = field(default_factory=dict)
    fine_tuned: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def train(settings: Settings, step: Step) -> tuple[Any, dict[str, Any]]:
    """Step 1: train with the Trainer, SpectralMuon and LipschitzCallback; the trainer, and its last log line."""
    from transformers import PrinterCallback, set_seed

    from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
    from hf_lipschitz.training.data import load_image_data
    from hf_lipschitz.training.run import build_config, build_trainer

    recipe = settings.recipe
    set_seed(recipe.trainer.seed)
    data = load_image_data(recipe.data, "train")
    config = build_config(recipe)
    config.id2label = dict(enumerate(data.label_names))
    config.label2id = {name: index for index, name in enumerate(data.label_names)}
    trainer = build_trainer(recipe, LipViTForImageClassification(config), data, settings.digits, progress=False)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(show_steps(step))
    trainer.train()
    last = last_figures(trainer)
    step.say(f"{last['step']:,} steps, loss {last['loss']:.3f}, bound {last['lipschitz_bound']:.4f}")
    return trainer, last


def last_figures(trainer: Any) -> dict[str, Any]:
    """The last line of the Trainer's log with a loss, and the seconds that training took."""
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    return {**last, "seconds": trainer.state.log_history[-1]["train_runtime"]}


def show_steps(step: Step) -> Any:
    """A Trainer callback that moves the bar and shows loss, bound and the largest excess over a cap."""
    from transformers import TrainerCallback

    class ShowSteps(TrainerCallback):
        """Moves the bar of a demo step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step.expect(state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step.advance()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and {"loss", "lipschitz_bound", "cap_excess_max"} <= set(logs):
                figures = (float(logs[key]) for key in ("loss", "lipschitz_bound", "cap_excess_max"))
                step.say("loss {:.3f}, bound {:.4f}, excess over caps {:.1e}".format(*figures))

    return ShowSteps()


def save(settings: Settings, trainer: Any, step: Step) -> None:
    """Step 2: save the checkpoint folder; the model's own save_pretrained writes the certificate."""
    from hf_lipschitz.model_card import write_model_card
    from hf_lipschitz.training.run import save_processor

    trainer.model.to("cpu").eval()
    trainer.model.save_pretrained(settings.digits)
    save_processor(settings.digits, trainer.model.config)
    trainer.save_state()
    write_model_card(settings.digits, recipe=settings.recipe.to_yaml(), repo_id=settings.repo)
    if missing := [name for name in FILES if not (settings.digits / name).is_file()]:
        raise DemoFailure(f"{settings.digits} was saved without {', '.join(missing)}")
    step.say(f"{len(FILES)} files in {settings.digits}")


def reload(settings: Settings, model: Any, step: Step) -> dict[str, Any]:
    """Step 3: a new process loads the folder with the Auto classes, classifies images, and verifies."""
    import numpy as np
    import torch

    pixel_values = held_out(settings).pixel_values[:RELOADED_IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        np.savez(images := Path(folder, "images.npz"), pixel_values=pixel_values.numpy())
        command = [sys.executable, "-m", "hf_lipschitz.cli.demo_reload", str(settings.digits), str(images)]
        process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if process.returncode != 0:
        raise DemoFailure(f"the new process could not load {settings.digits}: {process.stderr.strip()[-2000:]}")
    found = json.loads(process.stdout)
    if not found["verification"]["ok"]:
        raise DemoFailure(f"the new process does not verify it: {'; '.join(found['verification']['reasons'])}")
    if not found["has_certificate"]:
        raise DemoFailure("the model that the new process loaded has no certificate")
    with torch.no_grad():
        own = model(pixel_values.float() / 255).logits.argmax(dim=1).tolist()
    if found["predictions"] != own:
        raise DemoFailure(f"the new process predicts {found['predictions']}, the trained model {own}")
    step.say(f"{found['model']} loaded and verified: bound, program, rounding")
    return found


def held_out(settings: Settings) -> ImageData:
    """The images that training has not seen."""
    from hf_lipschitz.training.data import load_image_data

    return load_image_data(settings.recipe.data, "test")


def evaluate(settings: Settings, model: Any, step: Step) -> tuple[CertifiedEvaluation, dict[str, dict[str, Any]]]:
    """Step 4: clean and certified accuracy of the exact network, an attack inside the radii, and the card."""
    from hf_lipschitz.cli.attacking import attack_inside
    from hf_lipschitz.evaluation.certified import evaluate_certified
    from hf_lipschitz.model_card import Measured, percent, write_model_card

    data, radii = held_out(settings), settings.recipe.evaluation.radii
    evaluation = evaluate_certified(model, data.pixel_values, data.labels, certificate=model.certificate, radii=radii)
    few = slice(settings.attacked_images)
    pixels = data.pixel_values[few]
    on_few = evaluate_certified(model, pixels, data.labels[few], certificate=model.certificate, radii=radii)
    step.expect(3 * len(pixels))
    step.say(f"clean {percent(evaluation.clean_accuracy)}; attacking inside the radii")
    attacks = attack_inside(model, pixels, on_few, seed=settings.recipe.trainer.seed, advance=step.advance)
    inside = [attacks["float32"], attacks["float64"]]
    measured = Measured(evaluation, "digits", "test", inside)
    write_model_card(settings.digits, evaluation=measured, repo_id=settings.repo)
    changed = " + ".join(str(attack["changed"]) for attack in inside)
    step.say(f"clean {percent(evaluation.clean_accuracy)}, predictions changed by the attack: {changed}")
    return evaluation, attacks


def push_and_verify(settings: Settings, folder: Path, repo: str) -> dict[str, Any]:
    """Push a folder in one commit, fetch that commit back and verify it; where it lies and which commit it is."""
    from hf_lipschitz.hub import fetch, push
    from hf_lipschitz.verification import verify

    login: dict[str, Any] = {"endpoint": settings.endpoint, "token": settings.token}
    pushed = push(folder, repo, **login)
    fetched = fetch(f"{pushed.repo_id}@{pushed.commit}", cache_dir=settings.out / "fetched", **login)
    verdict = verify(fetched.path)
    if not verdict.ok:
        raise DemoFailure(f"what came back of {pushed.repo_id} does not verify: {'; '.join(verdict.reasons)}")
    return {"repo": pushed.repo_id, "commit": pushed.commit, "url": pushed.url, "fetched": str(fetched.path)}
