"""Certified accuracy as a metric of the Trainer: the same figures as evaluate_certified, for the weights at hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_lipschitz.certify import certify
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.certified import evaluate_certified
from hf_lipschitz.training.data import BatchedImages
from hf_lipschitz.training.metrics import CertifiedMetrics
from tests.training.small import tiny_arguments, tiny_images, tiny_model, tiny_trainer

RADII = (0.0, 1 / 255, 36 / 255, 0.3)
LABELS = ("0", "1", "36", "0.3")
KEYS = {"accuracy", *(f"certified_accuracy_{label}" for label in LABELS)}
DATA = tiny_images(40, seed=2)


def prediction(**values: Any) -> Any:
    return SimpleNamespace(**{"inputs": DATA.pixel_values.float() / 255, "label_ids": DATA.labels, **values})


def expected(model: Any, radii: tuple[float, ...] = RADII) -> dict[str, float]:
    """Straight from evaluate_certified, in the metric's order."""
    result = evaluate_certified(
        model, DATA.pixel_values.float() / 255, DATA.labels, certificate=certify(model), radii=radii
    )
    return {"accuracy": result.clean_accuracy, **{str(radius): result.certified[radius] for radius in radii}}


@pytest.mark.parametrize("batch_size", [3, 500])
def test_figures_are_those_of_evaluate_certified(batch_size: int) -> None:
    model = tiny_model()
    found = CertifiedMetrics(model, RADII, batch_size)(prediction())
    assert set(found) == KEYS
    assert list(found.values()) == list(expected(model).values())
    assert found["accuracy"] >= found["certified_accuracy_1"] >= found["certified_accuracy_0.3"]
    as_numpy = prediction(inputs=prediction().inputs.numpy(), label_ids=DATA.labels.numpy())
    assert CertifiedMetrics(model, RADII)(as_numpy) == found


def test_figures_are_of_the_weights_at_that_moment() -> None:
    model = tiny_model()
    metrics = CertifiedMetrics(model, RADII)
    before = metrics(prediction())
    with torch.no_grad():
        model.classifier.bias[0] = 9.0  # class 0 is predicted everywhere, with a large margin
    share = float((DATA.labels == 0).double().mean())
    assert metrics(prediction()) == dict.fromkeys(KEYS, share) != before


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_the_trainer_evaluates_with_them(tmp_path: Path, bf16: bool) -> None:
    """Also under autocast, whose logits are coarse: the figures come from a float64 forward of their own."""
    model = tiny_model(seed=4)
    arguments = tiny_arguments(tmp_path, include_for_metrics=["inputs"], bf16=bf16, per_device_eval_batch_size=7)
    trainer = Trainer(
        model,
        arguments,
        eval_dataset=BatchedImages(DATA),
        data_collator=BatchedImages.collate,
        compute_metrics=CertifiedMetrics(model),
    )
    found = trainer.evaluate()
    wanted = list(expected(model, (36 / 255, 72 / 255)).values())
    keys = ("accuracy", "certified_accuracy_36", "certified_accuracy_72")
    assert [found[f"eval_{key}"] for key in keys] == wanted
    assert model.dtype == torch.float32 and all(parameter.requires_grad for parameter in model.parameters())


def test_the_best_checkpoint_can_be_chosen_by_them(tmp_path: Path) -> None:
    model = tiny_model()
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 6,
        "metric_for_best_model": "certified_accuracy_36",
        "load_best_model_at_end": True,
        "include_for_metrics": ["inputs"],
    }
    options = {"eval_dataset": BatchedImages(DATA), "compute_metrics": CertifiedMetrics(model)}
    trainer = tiny_trainer(tmp_path, model, optimizer="spectral_muon", options=options, **settings)
    trainer.train()
    scores = [line["eval_certified_accuracy_36"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(scores) == 6 and len(set(scores)) > 1  # there is something to choose
    assert trainer.state.best_metric == max(scores) == trainer.evaluate()["eval_certified_accuracy_36"]


def test_without_the_images_it_says_what_to_set(tmp_path: Path) -> None:
    model = tiny_model()
    options = {"eval_dataset": BatchedImages(DATA), "compute_metrics": CertifiedMetrics(model)}
    trainer = tiny_trainer(tmp_path, model, options=options)
    with pytest.raises(UserError, match=r'needs the images: set TrainingArguments\(include_for_metrics=\["inputs"\]\)'):
        trainer.evaluate()


def test_images_outside_the_unit_interval_and_strange_labels_are_refused() -> None:
    model = tiny_model()
    for wrong in ({"inputs": DATA.pixel_values.float()}, {"label_ids": DATA.labels + 1}):
        with pytest.raises(UserError):
            CertifiedMetrics(model)(prediction(**wrong))
