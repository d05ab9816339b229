"""Processes that hold equal matrices and averages share the work of orthogonalising them.

Every matrix has an owner. All processes keep all averages, so that the state of each is whole; the owner alone
orthogonalises; its update goes to all others as bytes, which every backend can move whatever the dtype. All processes
then add the same numbers, so that weights which were equal stay equal bit for bit.

Who owns what follows from the shapes alone, so nothing has to be agreed on: matrices go, the most expensive first, to
the process with the least work so far. Of a stack of equal matrices each process gets one piece, because batched
products make them cheap.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# How accelerate's launcher asks for something else than plain data parallelism.
_LAUNCHED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")
_ALIGNMENT = 16  # bytes: a view in another dtype must start at a multiple of its entries' size


@dataclass(frozen=True)
class Lot:
    """The updates of one stack.

    Attributes:
        count: matrices that have an owner each.
        blocks: row blocks of a matrix, orthogonalised each for itself.
        rows, columns: of a block.
        dtype: of an update.
    """

    count: int
    blocks: int
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def cost(self) -> int:
        """Of one matrix: the products of k x n with n x k matrices dominate."""
        return self.blocks * min(self.rows, self.columns) ** 2 * max(self.rows, self.columns)

    def size(self, count: int) -> int:
        """Bytes that the updates of so many matrices take in a message."""
        size = count * self.blocks * self.rows * self.columns * self.dtype.itemsize
        return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


class WorkSplit:
    """Who computes which updates, and where they stand in the messages.

    Args:
        lots: the stacks, in the same order on every process.
        processes: how many share the work.
    """

    def __init__(self, lots: Sequence[Lot], processes: int) -> None:
        self.lots = tuple(lots)
        self._starts = [_running(counts) for counts in owned_counts(lots, processes)]
        sizes = [sum(lot.size(len(own)) for lot, own in self._own(rank)) for rank in range(processes)]
        #: Bytes of a message: that of the process that sends most.
        self.message_size = max(sizes, default=0)

    def owned(self, lot: int, rank: int) -> range:
        """Which matrices of a lot a process orthogonalises."""
        return range(self._starts[lot][rank], self._starts[lot][rank + 1])

    def updates(self, message: Tensor, rank: int) -> list[Tensor]:
        """The updates of each lot in the message of a process, as views of it: (own matrices * blocks, rows, columns).

        Args:
            message: uint8, of ``message_size`` bytes.
            rank: whose message it is.
        """
        views: list[Tensor] = []
        start = 0
        for lot, own in self._own(rank):
            entries = len(own) * lot.blocks * lot.rows * lot.columns
            taken = message[start : start + entries * lot.dtype.itemsize]
            views.append(taken.view(lot.dtype).view(len(own) * lot.blocks, lot.rows, lot.columns))
            start += lot.size(len(own))
        return views

    def _own(self, rank: int) -> list[tuple[Lot, range]]:
        return [(lot, self.owned(index, rank)) for index, lot in enumerate(self.lots)]


def owned_counts(lots: Sequence[Lot], processes: int) -> list[list[int]]:
    """How many matrices of each lot each process owns: the most expensive first, each to who has least work so far."""
    counts = [[0] * processes for _ in lots]
    load = [0] * processes
    for index in sorted(range(len(lots)), key=lambda index: -lots[index].cost):
        for _ in range(lots[index].count):
            rank = load.index(min(load))
            load[rank] += lots[index].cost
            counts[index][rank] += 1
    return counts


def _running(counts: Sequence[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def in_rounds(lots: Sequence[Lot], entries: int) -> list[range]:
    """Consecutive lots of at most ``entries`` entries together, at least one each: what is exchanged at once."""
    rounds: list[range] = []
    start = total = 0
    for index, lot in enumerate(lots):
        size = lot.count * lot.blocks * lot.rows * lot.columns
        if index > start and total + size > entries:
            rounds.append(range(start, index))
            start, total = index, 0
        total += size
    return [*rounds, range(start, len(lots))] if lots else rounds


def exchange(message: Tensor, received: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Send a message of bytes to all processes of the group; returns the messages of all, in the order of ranks.

    Args:
        message: (size,) uint8.
        received: (processes * size,) uint8, overwritten; the result are views of it.
        group: who takes part.
    """
    # torch 2.14 renamed it and warns of the old name.
    gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, message, group=group)
    return list(received.split(len(message)))


def largest(numbers: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """The largest of each number over the processes of a group; all of them must call it."""
    tensor = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return [int(number) for number in tensor.tolist()]


def processes_of(group: dist.ProcessGroup | None) -> int:
    """How many processes share work: 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup) -> int:
    """The place of this process among those of a group."""
    return dist.get_rank(group)


def data_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The process group of a DistributedDataParallel model, also inside or around ``torch.compile``; None of others."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.process_group
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner


def trainer_group(args: Any) -> dist.ProcessGroup | None:
    """The processes among which a Trainer's run is data-parallel by DistributedDataParallel; None where it is not.

    Not for FSDP, whose parameters name their own group, nor for tensor or context parallelism, nor for DeepSpeed: there
    processes hold different matrices or different gradients.

    Args:
        args: TrainingArguments.
    """
    mode = getattr(getattr(args, "parallel_mode", None), "value", None)
    if mode != "distributed" or not (dist.is_available() and dist.is_initialized()):
        return None
    layout = getattr(args, "parallelism_config", None)
    replicas = args.world_size if layout is None else layout.dp_replicate_size
    is_asked_for = any(getattr(args, key, None) for key in ("fsdp", "deepspeed"))
    is_launched = any(os.environ.get(key, "false").lower() in ("1", "true") for key in _LAUNCHED)
    if is_asked_for or is_launched or not 1 < dist.get_world_size() == args.world_size == replicas:
        return None
    return dist.group.WORLD
