"""``Enforcer``: makes the constraints of a model true, and says with proved norms how true they are.

It works after any optimizer's step, because it looks at weights only; where the optimizer knows the norm of its
updates it carries bounds along instead (``NormBounds``), computes no norm in a step, and caps only what may exceed.
Parameters are looked up by name each time: FSDP and accelerate replace parameter objects after construction.

Sharded parameters (FSDP2) are gathered, measured and capped whole by every process, and each writes its part: no part
is ever judged by its own norm. ``apply``, ``excess`` and the hooks are collective then: all processes must run them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.caps.arithmetic import NonFiniteWeightError, stack_pays
from hf_lipschitz.caps.reach import correct_
from hf_lipschitz.caps.verified_norms import NORMS, split_heads
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.norm_bounds import NormBounds
from hf_lipschitz.optim.routing import Constraint, Route, bare_model, constraints_of, route
from hf_lipschitz.optim.sharding import is_sharded, layout, local, part_of, refuse_flattened, refuse_partitioned, whole

# Equal matrices are capped as one stack up to this many entries; benchmarks/stacking.py measures where it stops to pay.
STACK_ENTRIES = 128 * 128


class Enforcer:
    """Caps the constrained parameters of a model in place.

    Args:
        model: the model, possibly compiled or wrapped for distributed data parallelism.
        constraints: rules, or their plain data; None takes ``model.config.constraints``.
        headroom: share of a cap by which a *tracked* matrix is brought below it once its bound exceeds it. The next
            cap of that matrix is due after about ``headroom value / lr`` steps; 0 caps in each step once the bound has
            reached the value. The constraint holds after every step either way.

    Raises:
        UserError: see ``routing.route``; a headroom that is not in [0, 1); a model whose matrices FSDP1 has flattened.
    """

    def __init__(
        self,
        model: nn.Module,
        constraints: Sequence[Constraint | Mapping[str, Any]] | None = None,
        *,
        headroom: float = 0.0,
    ) -> None:
        self.headroom = checked_headroom(headroom)
        self.model = bare_model(model)
        refuse_flattened(self.model)
        rules = constraints_of(model) if constraints is None else constraints
        self.routes: tuple[Route, ...] = tuple(route(self.model.named_parameters(), rules))

    def apply(self, *, frozen: bool = True) -> None:
        """Apply every constraint's cap in place; afterwards each stored parameter satisfies it, if the cap promises so.

        Args:
            frozen: also cap parameters that do not require a gradient; the optimizer's hook leaves those out.

        Raises:
            NonFiniteWeightError: a constrained parameter holds NaN or infinite entries; it is named.
            UserError: a parameter is missing, or partitioned by DeepSpeed ZeRO-3.
        """
        self._apply([each for each in self._constrained() if frozen or each[2].requires_grad], bounds=None)

    def repair(self) -> None:
        """Cap what exceeds its constraint by a proved norm, and leave all else as it is, bit for bit.

        A cap may move even what satisfies it: a resumed run would differ from one that was never interrupted, and
        frozen weights from the checkpoint's. What only pushes towards a value (``promises`` is false) is left alone.

        Raises:
            NonFiniteWeightError, UserError: see ``excess`` and ``apply``.
        """
        excess = self.excess()
        self._apply(
            [each for each in self._constrained() if each[0].capping.promises and excess[each[1]] > 0.0], bounds=None
        )

    @torch.no_grad()
    def _apply(self, constrained: list[tuple[Constraint, str, Tensor]], *, bounds: NormBounds | None) -> None:
        groups: dict[Any, list[_Member]] = defaultdict(list)
        for rule, name, parameter in constrained:
            reach = None
            if bounds is not None and bounds.tracks(rule, parameter):
                reach = bounds.follow(rule, parameter)
                if reach <= rule.value and rule.capping.keeps:
                    continue
            # What must be gathered is not gathered all at once, whatever the device.
            is_small = (
                parameter.numel() <= STACK_ENTRIES if is_sharded(parameter) else stack_pays(parameter, STACK_ENTRIES)
            )
            alone = None if is_small else name
            # Two rules that differ in the pattern only are one action.
            action = (replace(rule, pattern=""), reach is not None)
            kind = (parameter.shape, parameter.dtype, parameter.device, layout(parameter))
            groups[action, kind, alone].append(_Member(name, parameter, reach))
        for ((rule, is_tracked), *_), members in groups.items():
            value = rule.value * (1.0 - self.headroom) if is_tracked and rule.capping.keeps else rule.value
            if bounds is None or not is_tracked:
                _cap_in_place(rule, value, members)
                continue
            if not _correct_in_place(rule, value, members, bounds):
                _cap_in_place(rule, value, members)
            for member in members:
                bounds.capped(member.parameter, value)

    def excess(self) -> dict[str, float]:
        """By parameter name: (proved norm - value) / value of the stored numbers; at most 0 where the constraint holds.

        Costs an eigenvalue decomposition in float64 for each matrix.

        Raises:
            UserError: a parameter is missing, not finite, or partitioned by DeepSpeed ZeRO-3.
        """
        found: dict[str, float] = {}
        for rule, name, parameter in self._constrained():
            try:
                norm = NORMS[rule.norm](whole(parameter), rule.heads)
            except KernelError as error:
                raise UserError(f"parameter {name!r} has no norm: {error}") from error
            found[name] = (norm - rule.value) / rule.value
        return found

    def max_excess(self) -> float:
        """The largest entry of ``excess``."""
        return max(self.excess().values())

    def attach(self, optimizer: torch.optim.Optimizer) -> Handles:
        """Apply the caps after each real step of an optimizer, until the handle's ``remove()``.

        The hooks are registered on the torch optimizer inside wrappers such as accelerate's, so they do not fire for
        steps that a GradScaler skips.
        """
        inner: Any = inner_optimizer(optimizer)
        bounds = NormBounds(inner) if hasattr(inner, "update_norm") else None

        def before_step(*_: Any) -> None:
            if bounds is not None:
                trained = [line for line in self._constrained() if line[2].requires_grad]
                bounds.confirm([(rule, name, each) for rule, name, each in trained if bounds.tracks(rule, each)])

        def after_step(*_: Any) -> None:
            self._apply([each for each in self._constrained() if each[2].requires_grad], bounds=bounds)

        return Handles(inner.register_step_pre_hook(before_step), inner.register_step_post_hook(after_step))

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
            refuse_partitioned(line.name, parameter)
            found.append((line.constraint, line.name, parameter))
        return found


def checked_headroom(headroom: float) -> float:
    """The headroom; UserError unless it is in [0, 1)."""
    if not 0.0 <= headroom < 1.0:
        raise UserError(f"headroom is {headroom!r}: give the share of a cap to go below it, in [0, 1)")
    return headroom


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that keep it as ``.optimizer`` (accelerate's AcceleratedOptimizer)."""
    inner = getattr(optimizer, "optimizer", None)
    return inner_optimizer(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


@dataclass(frozen=True)
class _Member:
    """A parameter to cap, and the tracked bound of its norm, if there is one."""

    name: str
    parameter: Tensor
    reach: float | None


class Handles:
    """Several hooks that are removed together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove them all."""
        for handle in self._handles:
            handle.remove()


def _cap_in_place(rule: Constraint, value: float, members: list[_Member]) -> None:
    """Cap equal parameters, as one stack where there are several."""
    weights = [_as_matrices(rule, whole(member.parameter)) for member in members]
    weight = weights[0] if len(weights) == 1 else torch.stack(weights)
    heads = rule.heads or 1
    settings: dict[str, Any] = {}
    if rule.capping.uses_reach and members[0].reach is not None:
        settings["reach"] = [member.reach for member in members for _ in range(heads)]
    try:
        capped = rule.capping.function(weight, value=value, **settings)
    except NonFiniteWeightError as error:
        raise NonFiniteWeightError(error.cap, error.index, error.entry, members[error.index // heads].name) from None
    _write(members, capped.reshape(len(members), *members[0].parameter.shape))


def _correct_in_place(rule: Constraint, value: float, members: list[_Member], bounds: NormBounds) -> bool:
    """The fast way, for caps that subtract a correction from float32 weights; False where there is none."""
    if rule.capping.correction is None or members[0].parameter.dtype != torch.float32:
        return False
    heads = rule.heads or 1
    wholes = [whole(member.parameter) for member in members]
    matrices = [block for weight in wholes for block in weight.view(heads, -1, weight.shape[-1])]
    reach = [member.reach for member in members if member.reach is not None for _ in range(heads)]
    work_SMN = bounds.optimizer.work_memory((len(matrices), *matrices[0].shape), matrices[0])
    if not correct_(matrices, work_SMN, rule.capping.correction, value=value, reach=reach):
        return False
    if is_sharded(members[0].parameter):  # else the parameters themselves were corrected
        _write(members, wholes)
    return True


def _write(members: Sequence[_Member], weights: Iterable[Tensor]) -> None:
    """Store whole weights; of a sharded parameter each process stores its part."""
    for member, weight in zip(members, weights, strict=True):
        local(member.parameter).copy_(part_of(weight, member.parameter))


def _as_matrices(rule: Constraint, parameter: Tensor) -> Tensor:
    """What a cap sees of a parameter: a matrix, its heads, or, for an interval, all entries as one row."""
    if rule.norm == "interval":
        return parameter.reshape(1, -1)
    return parameter if rule.heads is None else split_heads(parameter, rule.heads)
