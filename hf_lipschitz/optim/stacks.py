"""Equal matrices side by side: one product for all of them, in memory that stays from step to step.

Batched products make small matrices fast. Stacking averages and directions anew in each step would lose that again, to
the pages that a fresh allocation touches: so averages live in one tensor, of which each parameter's state is a view,
and directions are written into a tensor that is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, MutableMapping
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

KEY = "momentum_buffer"


@dataclass
class MatrixStack:
    """Matrices of one shape, dtype and device.

    Attributes:
        parameters: P parameters, each of which is ``split`` blocks of equal rows.
        averages_SMN: their momentum, S = P split matrices.
        split: row blocks of a parameter.
    """

    parameters: list[Tensor]
    averages_SMN: Tensor
    split: int

    def blocks(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Tensors of the parameters' shape as (split, m, n) each: views, where their memory allows it."""
        return [tensor.reshape(self.split, -1, tensor.shape[-1]) for tensor in tensors]

    def apart(self, stack_SMN: Tensor) -> list[Tensor]:
        """A stack as one tensor a parameter, in its shape."""
        return [block.reshape(self.parameters[0].shape) for block in stack_SMN.unflatten(0, (-1, self.split))]

    def average(self, momentum: float) -> None:
        """Let the gradients into the averages: ``momentum * average + (1 - momentum) * gradient``."""
        _foreach_lerp_(
            self.apart(self.averages_SMN), [_gradient(parameter) for parameter in self.parameters], 1.0 - momentum
        )

    def direct(self, work_SMN: Tensor, momentum: float, *, nesterov: bool) -> None:
        """Write what is to be orthogonalised: the averages, or ``momentum * average + (1 - momentum) * gradient``.

        The averages themselves must not be handed on, because ``work_SMN`` is overwritten.
        """
        if not nesterov:
            work_SMN.copy_(self.averages_SMN)
            return
        gradients = self.blocks(_gradient(parameter) for parameter in self.parameters)
        if work_SMN.dtype == self.averages_SMN.dtype:
            torch.cat(gradients, out=work_SMN).lerp_(self.averages_SMN, momentum)
        else:  # 16-bit weights
            work_SMN.copy_(torch.cat(gradients).lerp_(self.averages_SMN, momentum))

    def move(self, updates_SMN: Tensor, *, step: float, keep: float) -> None:
        """``parameter = keep * parameter + step * update``."""
        if keep != 1.0:
            _foreach_mul_(self.parameters, keep)
        _foreach_add_(self.parameters, self.apart(updates_SMN), alpha=step)

    def holds(self, parameters: list[Tensor], states: MutableMapping[Tensor, Any]) -> bool:
        """Whether these are its parameters, and their states its averages: false after a state was loaded."""
        if [id(parameter) for parameter in parameters] != [id(parameter) for parameter in self.parameters]:
            return False
        stored = [states[parameter].get(KEY) for parameter in parameters]
        start, step = self.averages_SMN.data_ptr(), self.averages_SMN.element_size() * parameters[0].numel()
        return all(
            isinstance(tensor, Tensor) and tensor.data_ptr() == start + index * step
            for index, tensor in enumerate(stored)
        )


def stacked_parameters(parameters: Iterable[Tensor], entries: int) -> list[list[Tensor]]:
    """Parameters in groups that are worth a stack: on a CPU up to ``entries`` entries each, larger ones alone."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        alone = None if stack_pays(parameter, entries) else index
        groups[parameter.shape, parameter.dtype, parameter.device, alone].append(parameter)
    return list(groups.values())


def build_stack(parameters: list[Tensor], split: int, states: MutableMapping[Tensor, Any]) -> MatrixStack:
    """A stack with the averages that ``states`` holds, or zero; the states are views of it afterwards."""
    first = parameters[0]
    shape = (len(parameters) * split, first.shape[0] // split, first.shape[1])
    averages_SMN = torch.zeros(shape, dtype=first.dtype, device=first.device)
    stack = MatrixStack(parameters, averages_SMN, split)
    for parameter, view in zip(parameters, stack.apart(averages_SMN), strict=True):
        if KEY in states[parameter]:
            view.copy_(states[parameter][KEY])
        states[parameter][KEY] = view
    return stack


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
