"""Equal matrices side by side: one product for all of them, in memory that stays from step to step.

Batched products make small matrices fast. Stacking averages and directions anew in each step would lose that again, to
the pages that a fresh allocation touches: so averages live in one tensor, of which each parameter's state is a view,
and directions are written into a tensor that is kept.

Sharded parameters have no whole average anywhere: ``ShardedStack`` averages and moves parts, and gathers a direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)

from hf_lipschitz.caps.arithmetic import stack_pays
from hf_lipschitz.caps.orthogonalize import update_dtype
from hf_lipschitz.optim.sharding import (
    divided_like,
    gradient,
    is_sharded,
    layout,
    like_parameter,
    local,
    part_of,
    whole,
)
from hf_lipschitz.optim.work_split import Lot

KEY = "momentum_buffer"


class Stack(ABC):
    """Matrices of one shape, dtype and device, divided in one way.

    Attributes:
        parameters: P parameters, each of which is ``split`` blocks of equal rows.
        split: row blocks of a parameter.
    """

    parameters: list[Tensor]
    split: int

    @property
    def lot(self) -> Lot:
        """What its updates are, for whoever divides the work."""
        rows, columns = self.parameters[0].shape
        dtype = update_dtype(self.parameters[0])
        return Lot(len(self.parameters), self.split, rows // self.split, columns, dtype)

    def blocks(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Tensors of the parameters' shape as (split, m, n) each: views, where their memory allows it."""
        return [tensor.reshape(self.split, -1, tensor.shape[-1]) for tensor in tensors]

    def apart(self, stack_SMN: Tensor) -> list[Tensor]:
        """A stack as one tensor a parameter, in its shape."""
        return [block.reshape(self.parameters[0].shape) for block in stack_SMN.unflatten(0, (-1, self.split))]

    @abstractmethod
    def average(self, momentum: float) -> None:
        """Let the gradients into the averages: ``momentum * average + (1 - momentum) * gradient``."""

    @abstractmethod
    def direct(self, work_SMN: Tensor, momentum: float, *, nesterov: bool, members: range | None = None) -> None:
        """Write what is to be orthogonalised: the averages, or ``momentum * average + (1 - momentum) * gradient``.

        The averages themselves must not be handed on, because ``work_SMN`` is overwritten.

        Args:
            work_SMN: float32 or float64, ``split`` blocks for each of the members; whole matrices.
            momentum: share of the average.
            nesterov: which of the two.
            members: consecutive parameters; None: all.
        """

    def move(self, *updates_SMN: Tensor, step: float, keep: float) -> None:
        """``parameter = keep * parameter + step * update``; updates are one or more stacks that follow each other."""
        updates = [update for stack_SMN in updates_SMN for update in self.apart(stack_SMN)]
        parts = [local(parameter) for parameter in self.parameters]
        if keep != 1.0:
            _foreach_mul_(parts, keep)
        moves = [part_of(update, parameter) for update, parameter in zip(updates, self.parameters, strict=True)]
        _foreach_add_(parts, moves, alpha=step)

    def holds(self, parameters: list[Tensor], states: MutableMapping[Tensor, Any]) -> bool:
        """Whether these are its parameters, and their states its averages: false after a state was loaded."""
        return [id(parameter) for parameter in parameters] == [id(parameter) for parameter in self.parameters]


@dataclass
class MatrixStack(Stack):
    """Whole matrices.

    Attributes:
        averages_SMN: their momentum, S = P split matrices.
    """

    parameters: list[Tensor]
    averages_SMN: Tensor
    split: int

    def average(self, momentum: float) -> None:
        """See ``Stack``."""
        _foreach_lerp_(self.apart(self.averages_SMN), [gradient(p) for p in self.parameters], 1.0 - momentum)

    def direct(self, work_SMN: Tensor, momentum: float, *, nesterov: bool, members: range | None = None) -> None:
        """See ``Stack``."""
        members = range(len(self.parameters)) if members is None else members
        if not members:
            return
        averages_SMN = self.averages_SMN[members.start * self.split : members.stop * self.split]
        if not nesterov:
            work_SMN.copy_(averages_SMN)
            return
        gradients = self.blocks(gradient(parameter) for parameter in self.parameters[members.start : members.stop])
        if work_SMN.dtype == averages_SMN.dtype:
            torch.cat(gradients, out=work_SMN).lerp_(averages_SMN, momentum)
        else:  # 16-bit weights
            work_SMN.copy_(torch.cat(gradients).lerp_(averages_SMN, momentum))

    def holds(self, parameters: list[Tensor], states: MutableMapping[Tensor, Any]) -> bool:
        """See ``Stack``."""
        if not super().holds(parameters, states):
            return False
        stored = [states[parameter].get(KEY) for parameter in parameters]
        start, step = self.averages_SMN.data_ptr(), self.averages_SMN.element_size() * parameters[0].numel()
        return all(
            isinstance(tensor, Tensor) and not is_sharded(tensor) and tensor.data_ptr() == start + index * step
            for index, tensor in enumerate(stored)
        )


@dataclass
class ShardedStack(Stack):
    """Matrices of which each process holds a part; ``direct`` is collective.

    Attributes:
        averages: their momentum, divided like the parameters.
    """

    parameters: list[Tensor]
    averages: list[Tensor]
    split: int

    def average(self, momentum: float) -> None:
        """See ``Stack``."""
        parts = [local(average) for average in self.averages]
        _foreach_lerp_(parts, [gradient(parameter) for parameter in self.parameters], 1.0 - momentum)

    def direct(self, work_SMN: Tensor, momentum: float, *, nesterov: bool, members: range | None = None) -> None:
        """See ``Stack``; a process gathers all directions, whichever of them it writes."""
        members = range(len(self.parameters)) if members is None else members
        kept = iter(work_SMN.unflatten(0, (len(members), self.split))) if members else iter(())
        for index, (parameter, average) in enumerate(zip(self.parameters, self.averages, strict=True)):
            parts = local(average)
            if nesterov:
                parts = gradient(parameter).lerp(parts, momentum)
            direction = whole(like_parameter(parts, parameter))
            if index in members:
                next(kept).copy_(self.blocks([direction])[0])

    def holds(self, parameters: list[Tensor], states: MutableMapping[Tensor, Any]) -> bool:
        """See ``Stack``."""
        if not super().holds(parameters, states):
            return False
        return all(states[p].get(KEY) is average for p, average in zip(parameters, self.averages, strict=True))


def stacked_parameters(parameters: Iterable[Tensor], entries: int) -> list[list[Tensor]]:
    """Parameters in groups that are worth a stack: on a CPU up to ``entries`` entries each, larger ones alone.

    So are large sharded ones on any device, so that not all of them must be whole at once.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        is_small = parameter.numel() <= entries if is_sharded(parameter) else stack_pays(parameter, entries)
        alone = None if is_small else index
        groups[parameter.shape, parameter.dtype, parameter.device, layout(parameter), alone].append(parameter)
    return list(groups.values())


def build_stack(parameters: Sequence[Tensor], split: int, states: MutableMapping[Tensor, Any]) -> Stack:
    """A stack with the averages that ``states`` holds, or zero; the states are views of it afterwards."""
    first = parameters[0]
    if is_sharded(first):
        averages = [_sharded_average(parameter, states[parameter]) for parameter in parameters]
        return ShardedStack(list(parameters), averages, split)
    shape = (len(parameters) * split, first.shape[0] // split, first.shape[1])
    averages_SMN = torch.zeros(shape, dtype=first.dtype, device=first.device)
    stack = MatrixStack(list(parameters), averages_SMN, split)
    for parameter, view in zip(parameters, stack.apart(averages_SMN), strict=True):
        if KEY in states[parameter]:
            view.copy_(states[parameter][KEY])
        states[parameter][KEY] = view
    return stack


def _sharded_average(parameter: Tensor, state: MutableMapping[str, Any]) -> Tensor:
    """The state's average, or zero, divided like the parameter."""
    stored = state.get(KEY)
    state[KEY] = torch.zeros_like(parameter) if stored is None else divided_like(stored, parameter)
    return state[KEY]
