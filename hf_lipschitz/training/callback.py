"""``LipschitzCallback``: the constraint holds after every optimizer step, and every checkpoint is certified."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lipschitz.bounds.certificate import FILE_NAME
from hf_lipschitz.bounds.engine import bound_program
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import own_program, state_arrays
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.optim.disagreement import ConstraintMismatchWarning, disagreements
from hf_lipschitz.optim.enforcement import Enforcer, bare_model, checked_headroom
from hf_lipschitz.optim.routing import read_constraints, routing_table
from hf_lipschitz.optim.sharding import is_sharded
from hf_lipschitz.remote_code import REMOTE_FILE_NAME
from hf_lipschitz.training.lower_tracking import LowerTracking

BOUND_KEY = "lipschitz_bound"
EXCESS_KEY = "cap_excess_max"
LOWER_KEY = "lipschitz_lower_estimate"

_NO_FIGURES = (
    "the model is sharded, so it is kept within its caps but log lines carry neither its bound nor its excess: save it "
    "gathered (state dict type FULL_STATE_DICT) and the checkpoint is certified, or run hf-lipschitz certify on one"
)

_LOGGER = logging.getLogger(__name__)


class LipschitzCallback(TrainerCallback):
    """Keep every constrained parameter within its cap after every real optimizer step, with any optimizer.

    The caps run in the optimizer's own post-step hook, so gradient accumulation, autocast and steps that a GradScaler
    skips are right. Log lines gain ``lipschitz_bound`` (proved bound to the logits of the weights at that moment) and
    ``cap_excess_max`` (largest proved excess of a norm over its cap, relative; at most 0 where the constraint holds).

    Args:
        constraint: rules as in ``config.constraints``; None takes those of the model, which are those of the
            checkpoint it was loaded from.
        headroom: share of a cap by which a matrix is brought below it once its tracked bound exceeds it, so that it
            need not be capped in each step (see Enforcer); with an optimizer that knows its updates, as SpectralMuon.
        log_bound: whether log lines carry the two figures (they cost float64 norms of all matrices).
        estimate_every: steps after which the next log line also carries ``lipschitz_lower_estimate``, a lower estimate
            of what the bound bounds (l2, to the logits); None: never. Training is the same with it, bit for bit. It
            costs a float64 copy of the model and, on four images, 9 forward and 16 backward passes.
        estimate_inputs: example inputs to search from; None draws random images (see LowerTracking).

    Where constraint, optimizer and model disagree, as after a head was replaced, one ``ConstraintMismatchWarning`` says
    how, before the first step. The logger of this module gets the routing table at INFO.

    A model without ``bound_program`` is kept within its caps too, with an ``UncertifiedWarning``: neither its log lines
    nor its checkpoints can state a bound.

    A sharded model (FSDP2) is kept within its caps as well. Its log lines carry no figures, which need the whole
    weights: one process writes them and cannot gather alone. A warning says so once.

    Raises:
        UserError: a rule of ``constraint`` is malformed, a headroom is no share, or ``estimate_every`` is below 1.
    """

    def __init__(
        self,
        constraint: Sequence[Mapping[str, Any]] | None = None,
        *,
        headroom: float = 0.0,
        log_bound: bool = True,
        estimate_every: int | None = None,
        estimate_inputs: torch.Tensor | None = None,
    ) -> None:
        self.constraint = None if constraint is None else [rule.to_dict() for rule in read_constraints(constraint)]
        self.headroom = checked_headroom(headroom)
        self.log_bound = log_bound
        self.enforcer: Enforcer | None = None
        self.tracking = None if estimate_every is None else LowerTracking(estimate_every, estimate_inputs)
        self._step = 0
        self._hook: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse ``hub_always_push``, under which a commit can pair new weights with an old certificate."""
        _refuse_always_push(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Route the constraint, make the initial weights satisfy it, and attach the caps to the optimizer.

        Raises:
            UserError: the constraint does not fit the model, a weight is not finite or partitioned by ZeRO-3, or
                hub_always_push.
        """
        _refuse_always_push(args)  # again: a callback added later misses on_init_end
        self._detach()  # of a run that an error ended
        self._step = state.global_step
        if self.tracking is not None:
            self.tracking.last = state.global_step
        model: Any = bare_model(kwargs["model"])
        self.enforcer = Enforcer(model, self.constraint, headroom=self.headroom)
        self.enforcer.repair()
        if state.is_world_process_zero:
            _LOGGER.info("which parameter carries which constraint:\n%s", self.routing_table())
            _warn_of(disagreements(model, self.constraint, kwargs["optimizer"]))
            if self.log_bound and _is_sharded(model):
                warnings.warn(_NO_FIGURES, UncertifiedWarning, stacklevel=2)
        if self.constraint is not None and hasattr(model, "config"):
            model.config.constraints = self.constraint  # saved with the checkpoint, for whoever trains on
        if not hasattr(model, "bound_program"):
            warnings.warn(
                f"{type(model).__name__} states no bound program, so its norms are kept but neither log lines nor "
                "checkpoints get a Lipschitz bound: give the class a bound_program method to have one",
                UncertifiedWarning,
                stacklevel=2,
            )
        self._hook = self.enforcer.attach(kwargs["optimizer"])

    def routing_table(self) -> str:
        """Which parameter carries which constraint, as text, a line each.

        Raises:
            UserError: no training has begun, so that no model is known.
        """
        if self.enforcer is None:
            raise UserError("there is no routing table before training begins: call it in or after trainer.train()")
        return routing_table(self.enforcer.routes)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from the optimizer."""
        self._detach()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint prove all norms, and cap what exceeds; remember the step, by which an estimate is due.

        The caps hold by tracked bounds and tested rounding (caps/reach.py); what is saved holds by proof.
        """
        self._step = state.global_step
        if control.should_save and self.enforcer is not None:
            self.enforcer.repair()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to training log lines: for later callbacks, and in ``trainer_state.json``."""
        if logs is None or "loss" not in logs or not self.log_bound or not state.is_world_process_zero:
            return
        keys = (BOUND_KEY, EXCESS_KEY, LOWER_KEY)
        figures = {key: logs[key] for key in keys if key in logs} or self.figures(kwargs["model"])
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def figures(self, model: torch.nn.Module) -> dict[str, float]:
        """``lipschitz_bound`` and ``cap_excess_max`` of the weights as they are now, the former only where it is known;
        ``lipschitz_lower_estimate`` where it is due; none of a sharded model.

        Raises:
            UserError: the weights have no bound; the message names the tensor.
        """
        bare: Any = bare_model(model)
        if _is_sharded(bare):
            return {}
        enforcer = self.enforcer or Enforcer(model, self.constraint)
        found = {EXCESS_KEY: enforcer.max_excess()}
        if hasattr(bare, "bound_program"):
            try:
                bound = bound_program(own_program(type(bare))(bare), state_arrays(bare), BUILT_IN)
            except KernelError as error:
                raise UserError(f"the weights have no Lipschitz bound ({error}): load the last good ones") from error
            found[BOUND_KEY] = bound.outputs["logits"].lipschitz
        if self.tracking is not None and self.tracking.due(self._step):
            found[LOWER_KEY] = self.tracking.estimate(bare, self._step)
        return found

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where a checkpoint was written without a certificate (NaN weights, a sharded format)."""
        if state.is_world_process_zero and hasattr(bare_model(kwargs["model"]), "bound_program"):
            _require_certificate(_checkpoint(args, state))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the certificate of the checkpoint about to be pushed beside its weights.

        The Trainer copies a fixed list of files from the checkpoint to ``output_dir`` and uploads that; this runs
        before.

        Raises:
            UserError: the checkpoint has no certificate, so that pushing it would pair its weights with an older one.
        """
        checkpoint, target = _checkpoint(args, state), Path(args.output_dir or ".")
        if not state.is_world_process_zero or not checkpoint.is_dir():
            return
        if hasattr(bare_model(kwargs["model"]), "bound_program"):
            _require_certificate(checkpoint)
        for name in (FILE_NAME, REMOTE_FILE_NAME):
            if (checkpoint / name).is_file():
                _replace(checkpoint / name, target / name)


def _is_sharded(model: torch.nn.Module) -> bool:
    """Whether a process holds parts of parameters only."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def _refuse_always_push(args: TrainingArguments) -> None:
    if args.push_to_hub and args.hub_always_push:
        raise UserError(
            "hub_always_push=True overwrites files that an earlier push still reads, so a commit can pair new "
            "weights with an old certificate: leave it False"
        )


def _warn_of(sentences: Sequence[str]) -> None:
    """One warning with everything that does not fit together."""
    if sentences:
        listed = "".join(f"\n- {sentence}" for sentence in sentences)
        message = f"constraint, optimizer and model disagree:{listed}"
        warnings.warn(message, ConstraintMismatchWarning, stacklevel=3)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts the checkpoint of the present step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _require_certificate(checkpoint: Path) -> None:
    if checkpoint.is_dir() and not (checkpoint / FILE_NAME).exists():
        raise UserError(
            f"{checkpoint.name} was written without a certificate: see the warning above (weights not finite, or "
            "a sharded checkpoint format, which cannot carry one)"
        )


def _replace(source: Path, target: Path) -> None:
    """Copy a file in one step, so that nobody reads half of it; the Trainer never uploads names that start with _."""
    temporary = target.with_name(f"_{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)
