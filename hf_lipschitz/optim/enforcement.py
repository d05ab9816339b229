"""``Enforcer``: makes the constraints of a model true, and says with proved norms how true they are.

It works after any optimizer's step, because it looks at weights only. Parameters are looked up by name each time:
FSDP and accelerate replace parameter objects after construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.caps.arithmetic import NonFiniteWeightError, stack_pays
from hf_lipschitz.caps.verified_norms import NORMS, split_heads
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.routing import Constraint, Route, bare_model, constraints_of, route

# Equal matrices are capped as one stack up to this many entries; benchmarks/stacking.py measures where it stops to pay.
STACK_ENTRIES = 128 * 128


class Enforcer:
    """Caps the constrained parameters of a model in place.

    Args:
        model: the model, possibly compiled or wrapped for distributed data parallelism.
        constraints: rules in order, or their plain data; None takes ``model.config.constraints``.

    Raises:
        UserError: see ``routing.route``.
    """

    def __init__(self, model: nn.Module, constraints: Sequence[Constraint | Mapping[str, Any]] | None = None) -> None:
        self.model = bare_model(model)
        rules = constraints_of(model) if constraints is None else constraints
        self.routes: tuple[Route, ...] = tuple(route(self.model.named_parameters(), rules))

    @torch.no_grad()
    def apply(self, *, frozen: bool = True) -> None:
        """Apply every constraint's cap in place; afterwards each stored parameter satisfies it.

        Args:
            frozen: also cap parameters that do not require a gradient; the optimizer's hook leaves those out.

        Raises:
            NonFiniteWeightError: a constrained parameter holds NaN or infinite entries; it is named.
            UserError: a parameter is missing or sharded.
        """
        groups: dict[Any, list[tuple[str, Tensor]]] = defaultdict(list)
        for rule, name, parameter in self._constrained():
            if frozen or parameter.requires_grad:
                alone = None if stack_pays(parameter, STACK_ENTRIES) else name
                action = replace(rule, pattern="")  # two rules that differ in the pattern only are one action
                groups[action, parameter.shape, parameter.dtype, parameter.device, alone].append((name, parameter))
        for (action, *_), members in groups.items():
            _cap_in_place(action, members)

    def excess(self) -> dict[str, float]:
        """By parameter name: (proved norm - value) / value of the stored numbers; at most 0 where the constraint holds.

        Costs an eigenvalue decomposition in float64 for each matrix.

        Raises:
            UserError: a parameter is missing, sharded, or not finite.
        """
        found: dict[str, float] = {}
        for rule, name, parameter in self._constrained():
            try:
                norm = NORMS[rule.norm](parameter, rule.heads)
            except KernelError as error:
                raise UserError(f"parameter {name!r} has no norm: {error}") from error
            found[name] = (norm - rule.value) / rule.value
        return found

    def max_excess(self) -> float:
        """The largest entry of ``excess``."""
        return max(self.excess().values())

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Apply the caps after each real step of an optimizer, until the handle's ``remove()``.

        The hook is registered on the torch optimizer inside wrappers such as accelerate's, so it does not fire for
        steps that a GradScaler skips.
        """

        def after_step(*_: Any) -> None:
            self.apply(frozen=False)

        return inner_optimizer(optimizer).register_step_post_hook(after_step)

    def _constrained(self) -> list[tuple[Constraint, str, Tensor]]:
        parameters = dict(self.model.named_parameters())
        found: list[tuple[Constraint, str, Tensor]] = []
        for line in self.routes:
            if line.constraint is None:
                continue
            if line.name not in parameters:
                raise UserError(
                    f"the constrained parameter {line.name!r} is gone: build a new Enforcer after changing a model"
                )
            parameter = parameters[line.name]
            if hasattr(parameter, "to_local"):
                raise UserError(
                    f"parameter {line.name!r} is sharded, and a shard says nothing about its matrix: gather it first"
                )
            found.append((line.constraint, line.name, parameter))
        return found


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that keep it as ``.optimizer`` (accelerate's AcceleratedOptimizer)."""
    inner = getattr(optimizer, "optimizer", None)
    return inner_optimizer(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def _cap_in_place(rule: Constraint, members: list[tuple[str, Tensor]]) -> None:
    """Cap equal parameters, as one stack where there are several."""
    weights = [parameter if rule.heads is None else split_heads(parameter, rule.heads) for _, parameter in members]
    weight = weights[0] if len(weights) == 1 else torch.stack(weights)
    try:
        capped = rule.capping.function(weight, value=rule.value)
    except NonFiniteWeightError as error:
        name = members[error.index // (rule.heads or 1)][0]
        raise NonFiniteWeightError(error.cap, error.index, error.entry, name) from None
    for (_, parameter), new in zip(members, capped.reshape(len(members), *members[0][1].shape), strict=True):
        parameter.copy_(new)
