"""``compute_metrics`` for certified accuracy, so that a Trainer can choose its best checkpoint by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_lipschitz.certify import certify
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.certified import evaluate_certified


class CertifiedMetrics:
    """Clean and certified accuracy of the model as it is, from a float64 forward; claim "exact network".

    Use as ``Trainer(compute_metrics=CertifiedMetrics(model))`` with
    ``TrainingArguments(include_for_metrics=["inputs"])``: the float32 or bfloat16 logits of the evaluation loop are too
    coarse to certify from, so the images are run again. Keys: ``accuracy`` and ``certified_accuracy_<radius>`` with the
    radius in 1/255 where it is a multiple of it, so ``metric_for_best_model="certified_accuracy_36"``.

    Args:
        model: the model being trained.
        radii: l2 radii in pixel units.
        batch_size: images at a time.
    """

    def __init__(self, model: Any, radii: Sequence[float] = (36 / 255, 72 / 255), batch_size: int = 500) -> None:
        self.model, self.radii, self.batch_size = model, tuple(radii), batch_size

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Raises UserError where the inputs were not handed on."""
        if prediction.inputs is None:
            raise UserError(
                'certified accuracy needs the images: set TrainingArguments(include_for_metrics=["inputs"])'
            )
        result = evaluate_certified(
            self.model,
            torch.as_tensor(prediction.inputs),
            torch.as_tensor(prediction.label_ids),
            certificate=certify(self.model),
            radii=self.radii,
            batch_size=self.batch_size,
        )
        figures = {"accuracy": result.clean_accuracy}
        figures.update({f"certified_accuracy_{_label(radius)}": value for radius, value in result.certified.items()})
        return figures


def _label(radius: float) -> str:
    steps = round(radius * 255)
    return str(steps) if abs(radius * 255 - steps) < 1e-9 else f"{radius:g}"
