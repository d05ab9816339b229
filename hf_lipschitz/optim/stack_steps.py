"""One step of stacks of matrices: average, orthogonalise, move; by each process alone, or shared among several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hf_lipschitz.caps.orthogonalize import orthogonalize_
from hf_lipschitz.optim.stacks import Stack
from hf_lipschitz.optim.work_split import WorkSplit, exchange, processes_of, rank_in

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group = Mapping[str, Any]


class Memory(Protocol):
    """Gives memory that is kept from step to step, another one for each use."""

    def __call__(self, use: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory whose content is whatever was written last."""
        ...


def step_alone(stack: Stack, group: Group, memory: Memory) -> None:
    """Move the matrices of a stack; the group gives momentum, nesterov, steps, lr and weight_decay."""
    lot = stack.lot
    stack.average(group["momentum"])
    work_SMN = _directions(stack, range(lot.count), "work", memory)
    stack.direct(work_SMN, group["momentum"], nesterov=group["nesterov"])
    updates_SMN = orthogonalize_(work_SMN, steps=group["steps"], compute_dtype=lot.dtype)
    stack.move(updates_SMN, **_factors(group))


def step_shared(work: Sequence[tuple[Stack, Group]], processes: ProcessGroup, memory: Memory) -> None:
    """Move the matrices of stacks of one device: each process orthogonalises what it owns, and all get all updates.

    Collective; all processes call it with the same stacks. Everybody applies the bytes that came back, also to the
    matrices of its own.
    """
    count, rank = processes_of(processes), rank_in(processes)
    split = WorkSplit([stack.lot for stack, _ in work], count)
    device = work[0][0].parameters[0].device
    owned: list[Tensor] = []
    # All are directed before any is orthogonalised: directing gathers what is sharded, and would wait for the others.
    for index, (stack, group) in enumerate(work):
        stack.average(group["momentum"])
        members = split.owned(index, rank)
        work_SMN = _directions(stack, members, index, memory)
        stack.direct(work_SMN, group["momentum"], nesterov=group["nesterov"], members=members)
        owned.append(work_SMN)
    message = memory("message", (split.message_size,), torch.uint8, device)
    for (_, group), work_SMN, update_SMN in zip(work, owned, split.updates(message, rank), strict=True):
        if len(work_SMN):
            update_SMN.copy_(orthogonalize_(work_SMN, steps=group["steps"], compute_dtype=update_SMN.dtype))
    messages = exchange(message, memory("received", (count * len(message),), torch.uint8, device), processes)
    updates = [split.updates(each, sender) for sender, each in enumerate(messages)]
    for index, (stack, group) in enumerate(work):
        stack.move(*(each[index] for each in updates), **_factors(group))


def _directions(stack: Stack, members: range, use: Any, memory: Memory) -> Tensor:
    """Memory for the directions of some matrices of a stack, whole, at least float32."""
    lot, first = stack.lot, stack.parameters[0]
    shape = (len(members) * lot.blocks, lot.rows, lot.columns)
    return memory(use, shape, torch.promote_types(first.dtype, torch.float32), first.device)


def _factors(group: Group) -> dict[str, float]:
    """What weight and update are multiplied with in a step."""
    return {"step": -group["lr"], "keep": 1.0 - group["lr"] * group["weight_decay"]}
