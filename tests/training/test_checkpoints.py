"""Every checkpoint that a Trainer writes has the certificate of exactly its weights, and a run resumes bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState

from hf_lipschitz import verify
from hf_lipschitz.bounds.certificate import FILE_NAME
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.remote_code import REMOTE_FILE_NAME
from hf_lipschitz.training.callback import LipschitzCallback
from hf_lipschitz.training.data import BatchedImages
from hf_lipschitz.training.metrics import CertifiedMetrics
from tests.training.small import (
    equal_weights,
    tiny_arguments,
    tiny_images,
    tiny_model,
    tiny_trainer,
    weights_of,
)


def assert_certified(folder: Path) -> None:
    """The folder verifies, weights included, by all three claims."""
    verdict = verify(folder)
    assert verdict.ok, verdict.reasons
    assert (folder / REMOTE_FILE_NAME).is_file()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def evaluated(model: Any) -> dict[str, Any]:
    """What a Trainer needs to choose its best checkpoint by certified accuracy."""
    return {"eval_dataset": BatchedImages(tiny_images(12)), "compute_metrics": CertifiedMetrics(model)}


BY_METRIC = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "certified_accuracy_36",
    "include_for_metrics": ["inputs"],
}
SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "every second step": ({}, ["checkpoint-2", "checkpoint-4"]),
    "weights only": ({"save_only_model": True}, ["checkpoint-2", "checkpoint-4"]),
    "rotation": ({"save_steps": 1, "save_total_limit": 2}, ["checkpoint-3", "checkpoint-4"]),
    "every epoch": (
        {"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1},
        ["checkpoint-12", "checkpoint-6"],
    ),
    "bf16": ({"bf16": True, "save_steps": 4}, ["checkpoint-4"]),
    "the last step though it is no multiple": ({"max_steps": 3}, ["checkpoint-2", "checkpoint-3"]),
}


@pytest.mark.parametrize(("settings", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_every_checkpoint_verifies(tmp_path: Path, settings: dict[str, Any], expected: list[str]) -> None:
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    trainer.save_model()
    assert checkpoints(tmp_path) == expected
    for name in expected:
        assert_certified(tmp_path / name)
    assert_certified(tmp_path)
    assert equal_weights(weights_of(tmp_path), dict(trainer.model.state_dict()))
    if len(expected) == 2:
        assert not equal_weights(*(weights_of(tmp_path / name) for name in expected))
        assert len({(tmp_path / name / FILE_NAME).read_bytes() for name in expected}) == 2


def test_a_certificate_of_the_step_before_is_not_accepted(tmp_path: Path) -> None:
    """What the tests here would see if a stale certificate were copied along."""
    tiny_trainer(tmp_path).train()
    shutil.copyfile(tmp_path / "checkpoint-2" / FILE_NAME, tmp_path / "checkpoint-4" / FILE_NAME)
    verdict = verify(tmp_path / "checkpoint-4", require="bound")
    assert not verdict.ok and "of other weights" in verdict.reasons[0]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_is_kept_loaded_and_certified(tmp_path: Path, limit: int) -> None:
    model = tiny_model()
    settings = {**BY_METRIC, "load_best_model_at_end": True, "save_total_limit": limit, "max_steps": 8}
    trainer = tiny_trainer(tmp_path, model, options=evaluated(model), **settings)
    trainer.train()
    scores = {
        line["step"]: line["eval_certified_accuracy_36"]
        for line in trainer.state.log_history
        if "eval_certified_accuracy_36" in line
    }
    best = max(scores, key=lambda step: (scores[step], -step))
    assert trainer.state.best_global_step == best and trainer.state.best_metric == scores[best]
    assert f"checkpoint-{best}" in checkpoints(tmp_path) and len(checkpoints(tmp_path)) <= limit
    for name in checkpoints(tmp_path):
        assert_certified(tmp_path / name)
    assert equal_weights(weights_of(tmp_path / f"checkpoint-{best}"), dict(model.state_dict()))
    trainer.save_model(str(tmp_path / "final"))
    assert_certified(tmp_path / "final")
    certificates = [(path / FILE_NAME).read_bytes() for path in (tmp_path / "final", tmp_path / f"checkpoint-{best}")]
    assert certificates[0] == certificates[1] and model.certificate is not None


class Sharded(LipViTForImageClassification):
    """Stores every few tensors in a file of their own, as a model of many gigabytes does."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **{**kwargs, "max_shard_size": 400})


Sharded.__name__ = "LipViTForImageClassification"  # the class that config.json names


def test_sharded_checkpoints(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, Sharded(tiny_model().config))
    trainer.train()
    for name in ("checkpoint-2", "checkpoint-4"):
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 2
        assert_certified(tmp_path / name)
    loaded = LipViTForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert equal_weights(dict(loaded.state_dict()), dict(trainer.model.state_dict()))
    assert loaded.certificate is not None
    trainer.model.__class__ = LipViTForImageClassification  # and unsharded into the same folder
    trainer.save_model(str(tmp_path / "checkpoint-2"))
    assert_certified(tmp_path / "checkpoint-2")


def test_torch_compile(tmp_path: Path) -> None:
    """Keys stay clean, and the constraint holds, where the Trainer compiles the model."""
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "bf16": True}
    trainer = tiny_trainer(tmp_path, optimizer="spectral_muon", **settings)
    names = set(trainer.model.state_dict())
    trainer.train()
    trainer.save_model()
    assert set(weights_of(tmp_path / "checkpoint-4")) == names and not any("_orig_mod" in name for name in names)
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert_certified(folder)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4 and all(line["cap_excess_max"] <= 0.0 for line in lines)
    torch.compiler.reset()


# the explicit constraint is another than the config's, and the callback says so
@pytest.mark.filterwarnings("ignore:constraint, optimizer and model disagree:UserWarning")
@pytest.mark.parametrize("callback_knows", [False, True], ids=["config", "explicit constraint"])
@pytest.mark.parametrize("optimizer", ["spectral_muon", "adamw"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str, callback_knows: bool) -> None:
    rules = [{**rule, "value": 0.7} for rule in tiny_model().config.constraints] if callback_knows else None
    settings = {"optimizer": optimizer, "seed": 3}
    whole = tiny_trainer(tmp_path / "whole", tiny_model(), LipschitzCallback(rules), **settings)
    whole.train()
    resumed = tiny_trainer(tmp_path / "resumed", tiny_model(seed=5), LipschitzCallback(rules), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4 and checkpoints(tmp_path / "resumed") == ["checkpoint-4"]
    assert equal_weights(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    files = [tmp_path / run / "checkpoint-4" for run in ("whole", "resumed")]
    assert (files[0] / FILE_NAME).read_bytes() == (files[1] / FILE_NAME).read_bytes()
    assert_certified(files[1])
    states = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in files]
    assert states[0] == states[1]  # figures included


# A checkpoint that cannot be certified


def event(folder: Path, model: Any, step: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the Trainer hands to a callback."""
    state = TrainerState(global_step=step)
    state.is_world_process_zero = True
    return (tiny_arguments(folder), state, TrainerControl()), {"model": model}


def test_a_push_puts_the_certificate_of_its_checkpoint_into_the_output_folder(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    (tmp_path / FILE_NAME).write_text("of another step")
    for step in (2, 4):
        positional, named = event(tmp_path, trainer.model, step)
        LipschitzCallback().on_push_begin(*positional, **named)
        for name in (FILE_NAME, REMOTE_FILE_NAME):
            assert (tmp_path / name).read_bytes() == (tmp_path / f"checkpoint-{step}" / name).read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_push_of_a_checkpoint_without_certificate_is_refused(tmp_path: Path) -> None:
    """Otherwise its weights would stand beside the certificate that an earlier push left in the output folder."""
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    (tmp_path / "checkpoint-2" / FILE_NAME).unlink()
    positional, named = event(tmp_path, trainer.model)
    for method in ("on_push_begin", "on_save"):
        with pytest.raises(UserError, match="checkpoint-2 was written without a certificate"):
            getattr(LipschitzCallback(), method)(*positional, **named)
    foreign = SimpleNamespace()  # a model that states no program may go without
    LipschitzCallback().on_save(*positional, model=foreign)
    LipschitzCallback().on_push_begin(*positional, model=foreign)


def test_a_stale_certificate_does_not_outlive_its_weights(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert_certified(tmp_path)
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    with pytest.warns(UncertifiedWarning, match="saved without a certificate"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE_NAME).exists() and (tmp_path / "model.safetensors").exists()


def test_a_subfolder_for_every_kind_of_trainer(tmp_path: Path) -> None:
    """The certificate does not depend on the callback: the model writes it."""
    Trainer(tiny_model(), tiny_arguments(tmp_path)).save_model(str(tmp_path / "plain"))
    assert_certified(tmp_path / "plain")
