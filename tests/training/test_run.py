"""From a recipe to a certified folder, on real digits, in twenty steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_lipschitz import verify
from hf_lipschitz.bounds.certificate import FILE_NAME
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.optim.spectral_muon import SpectralMuon
from hf_lipschitz.training import run
from hf_lipschitz.training.data import ImageData, load_image_data
from hf_lipschitz.training.losses import CertifiedLoss
from hf_lipschitz.training.recipe import Recipe, load_recipe, packaged_recipe
from hf_lipschitz.training.run import TrainedModel, build_config, build_trainer, train, training_arguments
from tests.training.small import bound_of, equal_weights, weights_of

FILES = {
    *("config.json", "model.safetensors", "preprocessor_config.json", "lipschitz_certificate.json"),
    *("hf_lipschitz_remote.py", "trainer_state.json"),
}
SHORT = {
    "model.config.stages": "[{depth: 1, width: 16}, {depth: 0, width: 16}]",
    "data.crop": "1",
    "data.flip": "true",
    "trainer.max_steps": "20",
    "trainer.batch_size": "64",
    "trainer.logging_steps": "5",
    "trainer.save_steps": "10",
}


def recipe(**overrides: str) -> Recipe:
    """The digits recipe, shortened; __ stands for a dot."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe(packaged_recipe("lip_vit_digits.yaml"), {**SHORT, **dotted})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """One run that the tests below look at; nobody writes into its folder."""
    torch.set_num_threads(1)
    return train(recipe(), tmp_path_factory.mktemp("runs") / "digits", progress=False)


def test_the_folder_holds_a_certified_checkpoint(trained: TrainedModel) -> None:
    assert {path.name for path in trained.folder.iterdir() if path.is_file()} == FILES
    assert {path.name for path in trained.folder.iterdir() if path.is_dir()} == {"checkpoint-10", "checkpoint-20"}
    for folder in (trained.folder, trained.folder / "checkpoint-10", trained.folder / "checkpoint-20"):
        verdict = verify(folder)
        assert verdict.ok and set(verdict.claims.values()) == {"ok"}, verdict.reasons
        assert (folder / "preprocessor_config.json").is_file()
    assert equal_weights(weights_of(trained.folder), weights_of(trained.folder / "checkpoint-20"))


def test_the_model_is_the_one_in_the_folder(trained: TrainedModel) -> None:
    assert not trained.model.training and trained.model.certificate is not None
    loaded = AutoModelForImageClassification.from_pretrained(trained.folder)
    assert equal_weights(dict(loaded.state_dict()), dict(trained.model.state_dict()))
    assert loaded.config.id2label == {index: str(index) for index in range(10)}
    assert loaded.config.label2id == {str(index): index for index in range(10)}
    assert trained.recipe == recipe() and trained.seconds > 0.0


def test_the_log_is_in_the_folder(trained: TrainedModel) -> None:
    history = json.loads((trained.folder / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    assert history == trained.history and [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(line["cap_excess_max"] <= 0.0 for line in lines)
    assert lines[-1]["lipschitz_bound"] == bound_of(trained.folder)
    assert lines[1]["lipschitz_bound"] == bound_of(trained.folder / "checkpoint-10")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_processor_makes_the_pixels_that_the_model_was_trained_on(trained: TrainedModel) -> None:
    processor = AutoImageProcessor.from_pretrained(trained.folder)
    pixels = load_image_data(trained.recipe.data, "test").pixel_values[:4]
    images = [Image.fromarray(np.asarray(image[0])) for image in pixels]
    made = processor(images, return_tensors="pt")["pixel_values"]
    assert made.shape == (4, 1, 8, 8) and (made - pixels.float() / 255).abs().max() <= 2.0**-24


def test_a_run_can_be_repeated_and_the_seed_matters(trained: TrainedModel, tmp_path: Path) -> None:
    data = load_image_data(recipe().data, "train")
    again = train(recipe(), tmp_path / "again", progress=False, data=data)
    assert equal_weights(dict(again.model.state_dict()), dict(trained.model.state_dict()))
    other = train(recipe(trainer__seed="1"), tmp_path / "other", progress=False, data=data)
    assert not equal_weights(dict(other.model.state_dict()), dict(trained.model.state_dict()))


def test_a_resumed_run_ends_with_the_same_bits(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augmentation, the schedule and the growing radius of the loss go on where they were, for the last ten steps."""
    loss, steps = CertifiedLoss.__call__, []
    monkeypatch.setattr(CertifiedLoss, "__call__", lambda self, *a, **k: steps.append(1) or loss(self, *a, **k))
    folder = tmp_path / "interrupted"
    shutil.copytree(trained.folder / "checkpoint-10", folder / "checkpoint-10")
    resumed = train(recipe(), folder, progress=False, resume=True)
    assert len(steps) == 10
    assert equal_weights(dict(resumed.model.state_dict()), dict(trained.model.state_dict()))
    assert [line for line in resumed.history if "loss" in line] == [line for line in trained.history if "loss" in line]
    assert (folder / FILE_NAME).read_bytes() == (trained.folder / FILE_NAME).read_bytes()
    assert verify(folder).ok


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer__name": "adamw", "optimizer__lr": "0.003", "optimizer__weight_decay": "0.1"},
        {"trainer__bf16": "true", "model__config__batch_centering": "true"},
        {"data__resize": "true", "model__config__image_size": "12", "model__config__num_channels": "3"},
        {"loss__name": "gloro", "trainer__save_steps": "null", "trainer__arguments": "{max_grad_norm: 1.0}"},
    ],
    ids=lambda overrides: ", ".join(overrides),
)
def test_other_recipes(tmp_path: Path, overrides: dict[str, str]) -> None:
    shorter = {"trainer__max_steps": "4", "trainer__logging_steps": "2", **overrides}
    done = train(recipe(**shorter), tmp_path / "run", progress=False)
    verdict = verify(done.folder)
    assert verdict.ok, verdict.reasons
    assert all(line["cap_excess_max"] <= 0.0 for line in done.history if "loss" in line)
    assert all(value.dtype == torch.float32 for value in done.model.parameters())


def test_the_loss_hears_of_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its radius grows: from a tenth of epsilon to three times epsilon, with the default loss."""
    loss: Callable[..., torch.Tensor] = CertifiedLoss.__call__
    radii: list[float] = []

    def heard(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        radii.append(self.epsilon * 255)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(CertifiedLoss, "__call__", heard)
    train(recipe(trainer__max_steps="4", trainer__save_steps="null"), tmp_path / "run", progress=False)
    assert radii == pytest.approx([3.6, 3.6 + 0.5 * (108 - 3.6), 108, 108])


# The output folder


def filled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "model.safetensors").write_text("old")
    return folder


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    with pytest.raises(UserError, match=r"run is not empty: choose another folder, or pass --overwrite or --resume"):
        train(recipe(), folder, progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file: choose another output folder"):
        train(recipe(), tmp_path / "file", progress=False, overwrite=True)
    assert (folder / "config.json").read_text() == "{}" and (tmp_path / "file").read_text() == "mine"


def test_other_processes_may_come_after_the_first_has_begun_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run._earlier_run(filled(tmp_path / "run"), resume=False, overwrite=False) is None
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="is not empty"):
        run._earlier_run(tmp_path / "run", resume=False, overwrite=False)


@pytest.mark.parametrize("through_link", [False, True])
def test_overwrite_replaces_what_the_folder_holds(tmp_path: Path, through_link: bool) -> None:
    folder = filled(tmp_path / "run")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "kept")
    if through_link:
        (tmp_path / "named").symlink_to(folder)
    target = tmp_path / "named" if through_link else folder
    done = train(recipe(trainer__max_steps="10"), target, progress=False, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {*FILES, "checkpoint-10"}
    assert verify(done.folder).ok and (tmp_path / "kept" / "file").read_text() == "mine"


def test_a_mistake_in_the_recipe_deletes_nothing(tmp_path: Path) -> None:
    folder = filled(tmp_path / "run")
    for mistake in (
        {"model__config__width": "3"},
        {"data__path": "./nowhere"},
        {"loss__name": "x"},
        {"trainer__schedule": "x"},
    ):
        with pytest.raises(UserError):
            train(recipe(**mistake), folder, progress=False, overwrite=True)
    assert (folder / "checkpoint-7" / "model.safetensors").read_text() == "old"


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(UserError, match="holds no checkpoint-N to go on from: leave out --resume"):
            train(recipe(), folder, progress=False, resume=True)


# Mistakes

MISTAKES: list[tuple[dict[str, str], str]] = [
    ({"model__config__widht": "3"}, "model.config.widht is no LipViT configuration key: choose among abs_fraction"),
    ({"model__preset": "huge"}, "model: unknown preset 'huge'; known: nano"),
    ({"model__config__patch_size": "3"}, "model: patch_size 3 does not divide image_size 8"),
    ({"model__config__image_size": "many"}, "model: image_size is 'many'"),
    ({"model__config__id2label": "3"}, "model: "),
    ({"model__config__image_size": "16"}, r"images have shape \(1, 8, 8\), the model takes \(1, 16, 16\)"),
    ({"model__config__constraints": "[{pattern: x, cap: stiefel, value: 1}]"}, "constraint 'x' matches no parameter"),
    ({"trainer__arguments__max_step": "3"}, "trainer.arguments.max_step is no key of transformers.TrainingArguments"),
    ({"trainer__arguments__max_steps": "3"}, r"max_steps is set twice: leave it out and use trainer\.max_steps"),
    ({"trainer__arguments__output_dir": "x"}, "output_dir is set twice: leave it out and use the output folder"),
    ({"trainer__arguments__eval_strategy": "steps"}, "trainer: .*eval_dataset"),
    ({"trainer__arguments__report_to": "wandb"}, "trainer: WandbCallback requires wandb"),
    ({"trainer__schedule": "square"}, "trainer: square is not a valid SchedulerType"),
    ({"trainer__batch_size": "2000"}, r"a batch takes 2000 images and there are 1438: lower trainer\.batch_size"),
    ({"loss__name": "hinge"}, "there is no loss named 'hinge': choose one of"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistakes_get_one_sentence(tmp_path: Path, overrides: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        train(recipe(**overrides), tmp_path / "run", progress=False)
    assert "\n" not in str(error.value)


def test_a_single_class_is_no_task(tmp_path: Path) -> None:
    one = ImageData(torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64), ["only"])
    with pytest.raises(UserError, match="needs at least 2 classes"):
        train(recipe(), tmp_path / "run", progress=False, data=one)


@pytest.mark.parametrize("optimizer", ["spectral_muon", "adamw"])
def test_a_run_that_diverges_stops_with_one_sentence(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss: Callable[..., torch.Tensor] = CertifiedLoss.__call__
    calls: list[int] = []

    def diverges(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return loss(self, *args, **kwargs) * (torch.inf if len(calls) > 12 else 1.0)

    monkeypatch.setattr(CertifiedLoss, "__call__", diverges)
    with pytest.raises(UserError, match=r"training stopped after step 12: .*lower") as error:
        train(recipe(optimizer__name=optimizer), tmp_path / "run", progress=False)
    assert "\n" not in str(error.value)
    assert verify(tmp_path / "run" / "checkpoint-10").ok  # the last good weights are there


def test_a_model_that_cannot_be_certified_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoilt(run.LipViTForImageClassification):
        def eval(self) -> Any:
            with torch.no_grad():
                self.classifier.bias[0] = torch.nan
            return super().eval()

    Spoilt.__name__ = "LipViTForImageClassification"
    monkeypatch.setattr(run, "LipViTForImageClassification", Spoilt)
    with (
        pytest.warns(UncertifiedWarning, match="classifier.bias"),
        pytest.raises(UserError, match="was saved without a certificate"),
    ):
        train(recipe(trainer__max_steps="2", trainer__save_steps="null"), tmp_path / "run", progress=False)


# What a recipe becomes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16_auto_follows_what_the_device_multiplies_fast(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "matmul_dtype", lambda device: dtype)
    assert training_arguments(recipe(trainer__bf16="auto"), tmp_path).bf16 is (dtype == torch.bfloat16)
    assert training_arguments(recipe(trainer__bf16="true"), tmp_path).bf16 is True
    assert training_arguments(recipe(), tmp_path).bf16 is False


def test_every_number_of_a_recipe_arrives(tmp_path: Path) -> None:
    chosen = recipe(
        optimizer__lr="0.07", optimizer__adamw_lr="0.002", optimizer__momentum="0.8", optimizer__weight_decay="0.01",
        optimizer__nesterov="false", loss__epsilon="72/255", loss__scale="5", trainer__schedule="cosine",
        trainer__warmup_fraction="0.25", trainer__arguments="{save_total_limit: 5}", trainer__seed="9",
    )  # fmt: skip
    arguments = training_arguments(chosen, tmp_path, progress=False)
    assert (arguments.warmup_steps, arguments.lr_scheduler_type, arguments.seed) == (5, "cosine", 9)
    assert (arguments.max_steps, arguments.per_device_train_batch_size, arguments.logging_steps) == (20, 64, 5)
    assert (arguments.save_strategy, arguments.save_steps, arguments.save_total_limit) == ("steps", 10, 5)
    assert training_arguments(recipe(trainer__save_steps="null"), tmp_path).save_strategy == "no"
    config = build_config(chosen)
    trainer = build_trainer(
        chosen,
        run.LipViTForImageClassification(config),
        load_image_data(chosen.data, "train"),
        tmp_path,
        progress=False,
    )
    optimizer: Any = trainer.create_optimizer()
    assert isinstance(optimizer, SpectralMuon)
    matrix, other = optimizer.param_groups
    assert (matrix["lr"], matrix["momentum"], matrix["nesterov"], matrix["weight_decay"]) == (0.07, 0.8, False, 0.01)
    assert other["lr"] == 0.002
    loss: Any = trainer.compute_loss_func
    assert (loss.name, loss.base_epsilon, loss.scale, loss.lipschitz) == ("emma", 72 / 255, 5.0, 1.0)
    dataset: Any = trainer.train_dataset
    assert (dataset.crop, dataset.flip) == (1, True)


def test_a_preset_is_overridden_by_keys() -> None:
    config = build_config(recipe(model="{preset: nano, config: {token_mixer: orthogonal}}"))
    assert (config.token_mixer, config.batch_centering, config.image_size) == ("orthogonal", True, 32)


def test_constraints_that_do_not_fit_leave_no_folder(tmp_path: Path) -> None:
    rules = '[{pattern: ".*weight", cap: decay, value: 1.0}, {pattern: ".*", cap: decay, value: 1.0}]'
    with pytest.raises(UserError, match=r"two constraints, .* claim the parameter"):
        train(recipe(model__config__constraints=rules), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
