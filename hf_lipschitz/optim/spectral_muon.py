"""``SpectralMuon``: orthogonalised momentum for matrices, AdamW for everything else, in one optimizer object.

A matrix moves by ``lr`` times a matrix of spectral norm at most ``UPDATE_NORM_BOUND`` (1.005), so ``lr`` is the step
in the unit in which the caps are stated. Momentum is an exponential average; weight decay is decoupled: W is multiplied
by ``1 - lr * weight_decay``. Constraints are kept by an ``Enforcer`` attached to the optimizer, not by the optimizer.

Parameter groups hold numbers, texts and booleans only, and no state refers to a parameter except through them, so that
accelerate, FSDP and checkpoints may copy and replace what they like.

Processes that train equal copies share the orthogonalisation (work_split.py). Of sharded parameters (FSDP2) each
process averages and moves its part; directions are orthogonalised whole (sharding.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hf_lipschitz.caps.orthogonalize import UPDATE_NORM_BOUND, update_dtype
from hf_lipschitz.caps.schedules import schedule
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.gradients import NonFiniteGradientError as NonFiniteGradientError
from hf_lipschitz.optim.gradients import check_gradients
from hf_lipschitz.optim.routing import Constraint, bare_model, constraints_of, read_constraints, route
from hf_lipschitz.optim.sharding import divided_like, gradient, is_sharded, local, refuse_partitioned, sharing_group
from hf_lipschitz.optim.stack_steps import step_alone, step_shared
from hf_lipschitz.optim.stacks import Stack, build_stack, stacked_parameters
from hf_lipschitz.optim.work_split import data_parallel_group, in_rounds, processes_of, trainer_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Equal matrices are orthogonalised as one stack up to this size; benchmarks/stacking.py measures where it stops to pay.
STACK_ENTRIES = 256 * 256
# Shared updates are exchanged whenever there are this many entries: it bounds the memory that they take on a process.
ROUND_ENTRIES = 2**28

_ROLE_KEYS = {
    "matrix": ("lr", "momentum", "nesterov", "weight_decay", "steps", "split"),
    "other": ("lr", "beta1", "beta2", "eps", "weight_decay"),
}


class SpectralMuon(torch.optim.Optimizer):
    """Muon whose learning rate is the spectral norm of an update, with AdamW inside for what is not a matrix.

    Args:
        groups: parameter groups, each with ``"params"`` and ``"role"``, "matrix" or "other"; a group may override any
            number below under its own name (matrix: lr, momentum, nesterov, weight_decay, steps, split; other: lr,
            beta1, beta2, eps, weight_decay). ``split`` is the number of row blocks of a matrix that are orthogonalised
            each for itself (heads of an attention, or a fused q/k/v). ``from_model`` builds the groups.
        lr: spectral norm of one update of a matrix.
        momentum: share of the old average in the new one, in [0, 1).
        nesterov: orthogonalise the mix of gradient and average instead of the average.
        weight_decay: decoupled decay of matrices, a step multiplies by 1 - lr * weight_decay.
        steps: quintic steps of ``orthogonalize``.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: AdamW's, for the role "other".
        process_group: processes that hold equal weights and get equal gradients, as under DistributedDataParallel: they
            share the orthogonalisation of plain matrices. None: each does all of it. It is part of no state dict and no
            pickle. Sharded matrices need none, they name their processes themselves.

    Behaviour worth knowing:
        - A NaN or infinite gradient makes ``step`` raise before anything is changed, so that weights and constraint
          stay true; a GradScaler skips such steps before they get here.
        - A zero gradient leaves AdamW's and Muon's averages decaying; a matrix whose average is zero does not move.
        - Parameters without gradient are skipped. State is kept in the parameter's dtype, as torch's optimizers do.
        - With shared work or sharded parameters ``step`` is collective: all processes make it, with gradients for the
          same parameters, and where one refuses a gradient all do.

    Raises:
        ValueError: a group without a role, a matrix group with a parameter that is not a matrix, a number out of range.
    """

    #: Who shares the work on plain matrices; may be changed between steps, on all processes alike.
    process_group: ProcessGroup | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        steps: int = 4,
        adamw_lr: float = 3e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        beta1, beta2 = adamw_betas
        self._role_defaults: dict[str, dict[str, float | bool]] = {
            "matrix": {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "steps": steps,
                "split": 1,
            },
            "other": {
                "lr": adamw_lr,
                "beta1": beta1,
                "beta2": beta2,
                "eps": adamw_eps,
                "weight_decay": adamw_weight_decay,
            },
        }
        #: The rules from which ``from_model`` built the groups, as plain data; None for groups given by hand.
        self.constraints: list[dict[str, Any]] | None = None
        self.process_group = process_group
        self._forget()
        super().__init__(groups, {"lr": lr})

    def _forget(self) -> None:
        """Drop what is derived from groups and states: stacks by group, and work memory."""
        self._stacks: dict[int, list[Stack]] = {}
        self._work: dict[Any, Tensor] = {}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        constraints: Sequence[Constraint | Mapping[str, Any]] | None = None,
        *,
        lr: float,
        **settings: Any,
    ) -> SpectralMuon:
        """Build the groups: what a cap of the spectral norm bounds is a "matrix", everything else is "other".

        A matrix with a cap on each head is orthogonalised head by head. The processes of a DistributedDataParallel
        model share the work; ``process_group=None`` prevents that.

        Args:
            model: the model; parameters that do not require a gradient are left out.
            constraints: rules or their plain data; None takes ``model.config.constraints``.
            lr: see the class; ``settings`` as well.

        Raises:
            UserError: see ``routing.route``; no trainable matrix is constrained.
        """
        settings.setdefault("process_group", data_parallel_group(model))
        model = bare_model(model)
        parameters = dict(model.named_parameters())
        rules = read_constraints(constraints_of(model) if constraints is None else constraints)
        members: dict[int, list[Tensor]] = {}
        for line in route(parameters.items(), rules):
            if parameters[line.name].requires_grad:
                heads = line.constraint.heads if line.constraint is not None else None
                members.setdefault((heads or 1) if line.role == "matrix" else 0, []).append(parameters[line.name])
        others = members.pop(0, [])
        if not members:
            raise UserError(
                "no trainable matrix has a cap of its spectral norm, so SpectralMuon would be plain AdamW: add a rule, "
                "or use torch.optim.AdamW"
            )
        # Matrices first: the Trainer logs the first group's learning rate.
        groups: list[dict[str, Any]] = [
            {"params": members[split], "role": "matrix", "split": split} for split in sorted(members)
        ]
        if others:
            groups.append({"params": others, "role": "other"})
        optimizer = cls(groups, lr=lr, **settings)
        optimizer.constraints = [rule.to_dict() for rule in rules]
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_role_defaults": self._role_defaults, "constraints": self.constraints}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            if group.get("role") == "matrix":
                group.setdefault("split", 1)  # states saved before there was one

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys."""
        role = param_group.get("role") if isinstance(param_group, dict) else None
        if role not in _ROLE_KEYS:
            raise UserError(
                f"each parameter group of SpectralMuon needs a role, 'matrix' or 'other', not {role!r}: use "
                "SpectralMuon.from_model(model, ...), or spectral_muon in the Trainer's optimizer_cls_and_kwargs"
            )
        group = {**self._role_defaults[role], **param_group}
        _check_group(group, role)
        super().add_param_group(group)
        if role == "matrix":
            try:
                for parameter in self.param_groups[-1]["params"]:
                    _check_matrix(parameter, group["split"])
            except UserError:
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update.

        Args:
            closure: computes the loss and the gradients anew, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            NonFiniteGradientError: a gradient holds NaN or infinite entries; nothing was changed.
            UserError: a matrix is none any more, or processes that share work have gradients for different parameters.
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients([p for group in self.param_groups for p in group["params"]], self.process_group)
        shared: dict[Any, list[tuple[Stack, dict[str, Any]]]] = {}
        for index, group in enumerate(self.param_groups):
            if group["role"] == "other":
                self._step_others(group)
                continue
            for stack in self._stacks_of(index, group):
                processes = self._sharing(stack)
                if processes is None:
                    step_alone(stack, group, self._memory)
                else:
                    shared.setdefault((processes, stack.parameters[0].device), []).append((stack, group))
        for (processes, _), work in shared.items():
            for members in in_rounds([stack.lot for stack, _ in work], ROUND_ENTRIES):
                step_shared(work[members.start : members.stop], processes, self._memory)
        return loss

    def _sharing(self, stack: Stack) -> ProcessGroup | None:
        """Who shares the work on a stack; None: every process does it."""
        first = stack.parameters[0]
        group = sharing_group(first) if is_sharded(first) else self.process_group
        return group if processes_of(group) > 1 else None

    def _stacks_of(self, index: int, group: dict[str, Any]) -> list[Stack]:
        """The group's matrices that have a gradient, in stacks: those of the last step, where nothing has changed."""
        members = stacked_parameters((p for p in group["params"] if p.grad is not None), STACK_ENTRIES)
        stacks = self._stacks.get(index, [])
        same = len(stacks) == len(members) and all(
            stack.split == group["split"] and stack.holds(parameters, self.state)
            for stack, parameters in zip(stacks, members, strict=True)
        )
        if not same:
            for parameters in members:
                _check_matrix(parameters[0], group["split"])
            stacks = [build_stack(parameters, group["split"], self.state) for parameters in members]
            self._stacks[index] = stacks
        return stacks

    def work_memory(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory to compute in, one for each shape, on the device of ``like`` and at least float32.

        It is kept from step to step; whoever asks next may overwrite it.
        """
        return self._memory("work", shape, torch.promote_types(like.dtype, torch.float32), like.device)

    def _memory(self, use: str | int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (use, tuple(shape), dtype, device)
        if key not in self._work:
            self._work[key] = torch.empty(key[1], dtype=dtype, device=device)
        return self._work[key]

    def update_norm(self, group: Mapping[str, Any], parameter: Tensor) -> float:
        """A bound of the spectral norm of what a step subtracts from each block of a matrix, in units of ``lr``."""
        return UPDATE_NORM_BOUND[update_dtype(parameter)]

    def _step_others(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            if is_sharded(parameter):
                state.update({key: divided_like(state[key], parameter) for key in ("exp_avg", "exp_avg_sq")})
        states = [self.state[parameter] for parameter in parameters]
        # AdamW is entrywise: it works on parts, and on a mix of plain and sharded parameters.
        adamw(
            [local(parameter) for parameter in parameters],
            [gradient(parameter) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["beta1"],
            beta2=group["beta2"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_matrix(parameter: Tensor, split: int) -> None:
    """Raise UserError for what cannot be orthogonalised."""
    shape = tuple(parameter.shape)
    refuse_partitioned(f"of shape {shape}", parameter)
    if parameter.ndim != 2:
        raise UserError(
            f"a parameter of shape {shape} is no matrix: put it in a group with the role 'other', and shard with "
            "fully_shard (FSDP2) rather than FSDP1 or DeepSpeed ZeRO, which flatten matrices"
        )
    if parameter.shape[0] % split:
        raise UserError(f"the rows of a parameter of shape {shape} do not divide into split={split} blocks")


def _check_group(group: Mapping[str, Any], role: str) -> None:
    """Raise UserError for numbers with which an update makes no sense."""
    ranges = {"lr": math.inf, "weight_decay": math.inf, "eps": math.inf, "momentum": 1.0, "beta1": 1.0, "beta2": 1.0}
    for key in _ROLE_KEYS[role]:
        if key in ranges and not 0.0 <= group[key] < ranges[key]:
            raise UserError(
                f"SpectralMuon: {key} of the role {role!r} must be in [0, {ranges[key]:g}), not {group[key]!r}"
            )
    if role == "matrix":
        schedule(group["steps"])


def spectral_muon() -> Callable[..., SpectralMuon]:
    """The factory for ``Trainer(optimizer_cls_and_kwargs=(spectral_muon, {...}))``.

    The Trainer calls it without arguments, then calls what it returns with the model and the dictionary. It does
    *not* add its ``learning_rate``, so give it: ``{"args": training_arguments}`` takes ``learning_rate`` and
    ``weight_decay`` (both for matrices) from the TrainingArguments, whose default of 5e-5 suits AdamW and hardly moves
    a matrix by this measure; ``{"lr": 0.05}`` sets it directly. ``{"constraints": [...]}`` replaces
    ``model.config.constraints``; the remaining keys are those of ``SpectralMuon``. With ``"args"`` the processes of a
    run under DistributedDataParallel share the work (``work_split.trainer_group``).
    """
    return _from_trainer


def _from_trainer(
    model: nn.Module,
    *,
    constraints: Sequence[Constraint | Mapping[str, Any]] | None = None,
    lr: float | None = None,
    args: Any = None,
    **settings: Any,
) -> SpectralMuon:
    """What ``spectral_muon`` returns.

    Raises:
        UserError: no learning rate is given; see also ``SpectralMuon.from_model``.
    """
    if args is not None:
        lr = args.learning_rate if lr is None else lr
        settings.setdefault("weight_decay", args.weight_decay)
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            settings.setdefault("process_group", trainer_group(args))
    if lr is None:
        raise UserError(
            'spectral_muon got no learning rate, and the Trainer does not pass its own: add "args": training_arguments '
            'or "lr": 0.05 to the dictionary in optimizer_cls_and_kwargs'
        )
    return SpectralMuon.from_model(model, constraints, lr=lr, **settings)
