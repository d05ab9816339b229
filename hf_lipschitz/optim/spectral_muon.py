"""``SpectralMuon``: orthogonalised momentum for matrices, AdamW for everything else, in one optimizer object.

A matrix moves by ``lr`` times a matrix of spectral norm at most ``UPDATE_NORM_BOUND`` (1.005), so ``lr`` is the step
in the unit in which the caps are stated. Momentum is an exponential average; weight decay is decoupled: W is multiplied
by ``1 - lr * weight_decay``. Constraints are kept by an ``Enforcer`` attached to the optimizer, not by the optimizer.

Parameter groups hold numbers, texts and booleans only, and no state refers to a parameter except through them, so that
accelerate, FSDP and checkpoints may copy and replace what they like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hf_lipschitz.caps.orthogonalize import UPDATE_NORM_BOUND, orthogonalize_, update_dtype
from hf_lipschitz.caps.schedules import schedule
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.routing import Constraint, bare_model, constraints_of, read_constraints, route
from hf_lipschitz.optim.stacks import MatrixStack, build_stack, stacked_parameters

# Equal matrices are orthogonalised as one stack up to this size; benchmarks/stacking.py measures where it stops to pay.
STACK_ENTRIES = 256 * 256

_ROLE_KEYS = {
    "matrix": ("lr", "momentum", "nesterov", "weight_decay", "steps", "split"),
    "other": ("lr", "beta1", "beta2", "eps", "weight_decay"),
}


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or infinite entries; no parameter and no state was changed."""


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

    Behaviour worth knowing:
        - A NaN or infinite gradient makes ``step`` raise before anything is changed, so that weights and constraint
          stay true; a GradScaler skips such steps before they get here.
        - A zero gradient leaves AdamW's and Muon's averages decaying; a matrix whose average is zero does not move.
        - Parameters without gradient are skipped. State is kept in the parameter's dtype, as torch's optimizers do.

    Raises:
        ValueError: a group without a role, a matrix group with a parameter that is not a matrix, a number out of range.
    """

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
        self._forget()
        super().__init__(groups, {"lr": lr})

    def _forget(self) -> None:
        """Drop what is derived from groups and states: stacks by group, and work memory."""
        self._stacks: dict[int, list[MatrixStack]] = {}
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

        A matrix with a cap on each head is orthogonalised head by head.

        Args:
            model: the model; parameters that do not require a gradient are left out.
            constraints: rules or their plain data; None takes ``model.config.constraints``.
            lr: see the class; ``settings`` as well.

        Raises:
            UserError: see ``routing.route``; no trainable matrix is constrained.
        """
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
            for parameter in self.param_groups[-1]["params"]:
                if parameter.ndim != 2:
                    shape = tuple(parameter.shape)
                    self.param_groups.pop()
                    raise UserError(
                        f"a parameter of shape {shape} is no matrix: put it in a group with the role 'other'"
                    )
                if parameter.shape[0] % group["split"]:
                    shape = tuple(parameter.shape)
                    self.param_groups.pop()
                    raise UserError(
                        f"the rows of a parameter of shape {shape} do not divide into split={group['split']} blocks"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update.

        Args:
            closure: computes the loss and the gradients anew, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            NonFiniteGradientError: a gradient holds NaN or infinite entries; nothing was changed.
            ValueError: a gradient is sparse, or a parameter sharded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for index, group in enumerate(self.param_groups):
            if group["role"] == "matrix":
                self._step_matrices(index, group)
            else:
                self._step_others(group)
        return loss

    def _check_gradients(self) -> None:
        """Refuse what must not reach the weights, before anything is changed."""
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in found:
            if parameter.grad.is_sparse:
                raise ValueError("SpectralMuon needs dense gradients: create the embedding with sparse=False")
            if hasattr(parameter, "to_local"):
                raise ValueError(
                    "SpectralMuon cannot update sharded parameters, a shard has another norm than its matrix"
                )
        # A sum is finite only if all its terms are, and several times faster than a largest magnitude; finite terms may
        # overflow it, so it never refuses alone.
        sums = [parameter.grad.sum() for parameter in found]
        if not sums or bool(torch.isfinite(torch.stack([total.to(sums[0]) for total in sums])).all()):
            return
        bad = next((p for p in found if not torch.isfinite(p.grad).all()), None)
        if bad is not None:
            raise NonFiniteGradientError(
                f"the gradient of a parameter of shape {tuple(bad.shape)} holds NaN or infinite entries and nothing "
                "was updated: lower the learning rate, clip gradients, or train in a dtype of wider range"
            )

    def _step_matrices(self, index: int, group: dict[str, Any]) -> None:
        for stack in self._stacks_of(index, group):
            stack.average(group["momentum"])
            work_SMN = self.work_memory(stack.averages_SMN.shape, stack.averages_SMN)
            stack.direct(work_SMN, group["momentum"], nesterov=group["nesterov"])
            compute = update_dtype(stack.averages_SMN)
            updates_SMN = orthogonalize_(work_SMN, steps=group["steps"], compute_dtype=compute)
            stack.move(updates_SMN, step=-group["lr"], keep=1.0 - group["lr"] * group["weight_decay"])

    def _stacks_of(self, index: int, group: dict[str, Any]) -> list[MatrixStack]:
        """The group's matrices that have a gradient, in stacks: those of the last step, where nothing has changed."""
        members = stacked_parameters((p for p in group["params"] if p.grad is not None), STACK_ENTRIES)
        stacks = self._stacks.get(index, [])
        same = len(stacks) == len(members) and all(
            stack.split == group["split"] and stack.holds(parameters, self.state)
            for stack, parameters in zip(stacks, members, strict=True)
        )
        if not same:
            stacks = [build_stack(parameters, group["split"], self.state) for parameters in members]
            self._stacks[index] = stacks
        return stacks

    def work_memory(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory to compute in, one for each shape, on the device of ``like`` and at least float32.

        It is kept from step to step; whoever asks next may overwrite it.
        """
        key = (tuple(shape), torch.promote_types(like.dtype, torch.float32), like.device)
        if key not in self._work:
            self._work[key] = torch.empty(key[0], dtype=key[1], device=key[2])
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
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
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
    ``model.config.constraints``; the remaining keys are those of ``SpectralMuon``.
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
    if lr is None:
        raise UserError(
            'spectral_muon got no learning rate, and the Trainer does not pass its own: add "args": training_arguments '
            'or "lr": 0.05 to the dictionary in optimizer_cls_and_kwargs'
        )
    return SpectralMuon.from_model(model, constraints, lr=lr, **settings)
