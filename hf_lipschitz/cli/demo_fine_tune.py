"""Step 6 of the demo: a fetched checkpoint is fine-tuned on another label set, and stays certified.

The constraint comes with the checkpoint, so a plain Trainer needs the callback and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_lipschitz.cli.demo_progress import Step
from hf_lipschitz.cli.demo_steps import DemoFailure, Settings, held_out, last_figures, push_and_verify, show_steps

if TYPE_CHECKING:
    from hf_lipschitz.training.data import ImageData


def fine_tune(settings: Settings, fetched: str, step: Step) -> dict[str, Any]:
    """Step 6: fine-tune the fetched checkpoint on odd/even with a plain Trainer, certify, evaluate and push it."""
    from hf_lipschitz.evaluation.certified import evaluate_certified
    from hf_lipschitz.model_card import Measured, percent, write_model_card
    from hf_lipschitz.verification import verify

    trainer = _fine_tuned(settings, fetched, show_steps(step))
    model = trainer.model
    data = parity(held_out(settings))
    evaluation = evaluate_certified(
        model, data.pixel_values, data.labels, certificate=model.certificate, radii=settings.recipe.evaluation.radii
    )
    repo = f"{settings.repo}-odd-even"
    write_model_card(
        settings.odd_even,
        evaluation=Measured(evaluation, "digits, odd or even", "test"),
        repo_id=repo,
        base_model=settings.repo if not settings.is_loopback else "the digits model of the same demo",
    )
    verdict = verify(settings.odd_even)
    if not verdict.ok:
        raise DemoFailure(f"{settings.odd_even} does not verify: {'; '.join(verdict.reasons)}")
    pushed = push_and_verify(settings, settings.odd_even, repo)
    step.say(f"clean {percent(evaluation.clean_accuracy)} on odd / even; certified, pushed and verified")
    training = last_figures(trainer)
    return {"training": training, "evaluation": evaluation, "pushed": pushed, "certificate": model.certificate}


def parity(data: ImageData) -> ImageData:
    """The same images under another question: is the digit odd?"""
    from hf_lipschitz.training.data import ImageData

    return ImageData(data.pixel_values, data.labels % 2, ["even", "odd"])


def _fine_tuned(settings: Settings, fetched: str, callback: Any) -> Any:
    """The part that a user would write: the Auto class, a plain Trainer with AdamW, and the callback."""
    import warnings

    from transformers import (
        AutoImageProcessor,
        AutoModelForImageClassification,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    from hf_lipschitz.models.certified_model import UncertifiedWarning
    from hf_lipschitz.training.callback import LipschitzCallback
    from hf_lipschitz.training.data import BatchedImages, load_image_data

    names = ["even", "odd"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncertifiedWarning)  # the head is new: until it is saved, nothing certifies it
        model = AutoModelForImageClassification.from_pretrained(
            fetched, num_labels=2, id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
        )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(settings.odd_even),
            max_steps=settings.fine_tuning_steps,
            per_device_train_batch_size=128,
            learning_rate=3e-3,
            logging_steps=max(1, settings.fine_tuning_steps // 4),
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
            seed=settings.recipe.trainer.seed,
        ),
        train_dataset=BatchedImages(parity(load_image_data(settings.recipe.data, "train"))),
        data_collator=BatchedImages.collate,
        callbacks=[LipschitzCallback(), callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.to("cpu").eval()
    model.save_pretrained(settings.odd_even)
    AutoImageProcessor.from_pretrained(fetched).save_pretrained(settings.odd_even)
    trainer.save_state()
    return trainer
