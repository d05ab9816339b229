"""``LipschitzCallback``: after every optimizer step of a Trainer the constraint holds, and every checkpoint is
certified.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lipschitz.bounds.certificate import FILE_NAME
from hf_lipschitz.bounds.engine import bound_program
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import state_arrays
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.enforcement import Enforcer, bare_model
from hf_lipschitz.remote_code import REMOTE_FILE_NAME

BOUND_KEY = "lipschitz_bound"
EXCESS_KEY = "cap_excess_max"


class LipschitzCallback(TrainerCallback):
    """Keep every constrained parameter within its cap after every real optimizer step, with any optimizer.

    The caps run in the optimizer's own post-step hook, so gradient accumulation, autocast and steps that a GradScaler
    skips are right. Log lines gain ``lipschitz_bound`` (proved bound to the logits of the weights at that moment) and
    ``cap_excess_max`` (largest proved excess of a norm over its cap, relative; at most 0 where the constraint holds).

    Args:
        constraint: rules as in ``config.constraints``; None takes those of the model, which are those of the
            checkpoint it was loaded from.
        log_bound: whether log lines carry the two figures (they cost float64 norms of all matrices).
    """

    def __init__(self, constraint: Sequence[Mapping[str, Any]] | None = None, *, log_bound: bool = True) -> None:
        self.constraint = list(constraint) if constraint is not None else None
        self.log_bound = log_bound
        self.enforcer: Enforcer | None = None
        self._hook: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse ``hub_always_push``, under which a commit can pair new weights with an old certificate."""
        if args.push_to_hub and args.hub_always_push:
            raise UserError(
                "hub_always_push=True overwrites files that an earlier push still reads, so a commit can pair new "
                "weights with an old certificate: leave it False"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Route the constraint, make the initial weights satisfy it, and attach the caps to the optimizer."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self.constraint is not None:
            model.config.constraints = self.constraint  # saved with the checkpoint, for whoever trains on
        self.enforcer = Enforcer(model, self.constraint)
        self.enforcer.apply()
        self._hook = self.enforcer.attach(optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the two figures to training log lines: for later callbacks, and in ``trainer_state.json``."""
        if logs is None or "loss" not in logs or not self.log_bound or not state.is_world_process_zero:
            return
        figures = {key: logs[key] for key in (BOUND_KEY, EXCESS_KEY) if key in logs} or self.figures(kwargs["model"])
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def figures(self, model: torch.nn.Module) -> dict[str, float]:
        """``lipschitz_bound`` and ``cap_excess_max`` of the weights as they are now."""
        enforcer = self.enforcer or Enforcer(model, self.constraint)
        bare = bare_model(model)
        found = {EXCESS_KEY: enforcer.max_excess()}
        if hasattr(bare, "bound_program"):
            bound = bound_program(bare.bound_program(), state_arrays(bare), BUILT_IN)  # pyright: ignore
            found[BOUND_KEY] = bound.outputs["logits"].lipschitz
        return found

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where a checkpoint was written without a certificate (NaN weights, a sharded format)."""
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        certifies = hasattr(bare_model(kwargs["model"]), "bound_program")
        if state.is_world_process_zero and certifies and folder.is_dir() and not (folder / FILE_NAME).exists():
            raise UserError(
                f"{folder.name} was written without a certificate: see the warning above (weights not finite, or "
                "a sharded checkpoint format, which cannot carry one)"
            )

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the certificate of the checkpoint about to be pushed beside its weights.

        The Trainer copies a fixed list of files from the checkpoint to ``output_dir`` and uploads that; this runs
        before.
        """
        checkpoint = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not checkpoint.is_dir():
            return
        for name in (FILE_NAME, REMOTE_FILE_NAME):
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, Path(args.output_dir or ".") / name)
