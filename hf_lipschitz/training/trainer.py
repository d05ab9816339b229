"""``LipschitzTrainer``: transformers' Trainer with our figures in every sink and our card kept.

``LipschitzCallback`` works with the plain Trainer. Two things need a subclass: log values that come in time for
TensorBoard and Trackio, and a README.md that the Trainer does not replace by its own before it pushes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lipschitz.training.callback import LipschitzCallback
from hf_lipschitz.training.losses import CertifiedLoss


class LipschitzTrainer(Trainer):
    """A Trainer whose log lines carry the callback's figures from the start, and which keeps an existing card."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add ``lipschitz_bound`` and ``cap_excess_max`` before any sink sees the line."""
        callback = next((c for c in self.callback_handler.callbacks if isinstance(c, LipschitzCallback)), None)
        if callback is not None and callback.log_bound and "loss" in logs and self.is_world_process_zero():
            assert self.model is not None
            logs.update(callback.figures(self.model))
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where output_dir has a card already: it states a certificate, the Trainer's own does not."""
        if not (Path(self.args.output_dir or ".") / "README.md").exists():
            super().create_model_card(*args, **kwargs)


class LossProgress(TrainerCallback):
    """Tells a CertifiedLoss how much of the training is done, so that its radius grows on schedule (also on resume)."""

    def __init__(self, loss: CertifiedLoss) -> None:
        self.loss = loss

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the progress from the step count."""
        self.loss.progress = min(1.0, state.global_step / max(1, state.max_steps))
