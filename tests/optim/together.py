"""Several processes played by threads: torch.distributed's functions for a group of them, in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor


class Together:
    """A process group of threads; exchanges wait for all, at most some seconds."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: list[int] = []  # bytes of each message of the first process
        self._barrier = threading.Barrier(size, timeout=10.0)
        self._slots: dict[int, Tensor] = {}
        self._local = threading.local()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let torch.distributed know no other group than this."""
        patch.setattr(dist, "get_world_size", lambda group: group.size)
        patch.setattr(dist, "get_rank", lambda group: group.rank)
        patch.setattr(dist, "all_gather_single", lambda out, message, group: group.gather(out, message), raising=False)
        patch.setattr(dist, "all_reduce", lambda tensor, operation, group: group.reduce(tensor, operation))

    @property
    def rank(self) -> int:
        """Which process this thread plays."""
        return self._local.rank

    def run(self, job: Callable[[int], Any]) -> list[Any]:
        """What the job returns on each process."""

        def as_process(rank: int) -> Any:
            self._local.rank = rank
            torch.set_num_threads(1)
            try:
                return job(rank)
            except BaseException:
                self._barrier.abort()  # or the others would wait for it
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(as_process, rank) for rank in range(self.size)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def gather(self, out: Tensor, message: Tensor) -> None:
        """As ``torch.distributed.all_gather_single``."""
        if self.rank == 0:
            self.sent.append(len(message))
        out.copy_(torch.cat(self._all(message)))

    def reduce(self, tensor: Tensor, operation: Any) -> None:
        """As ``torch.distributed.all_reduce`` with the maximum."""
        assert operation == dist.ReduceOp.MAX
        tensor.copy_(torch.stack(self._all(tensor)).amax(dim=0))

    def _all(self, tensor: Tensor) -> list[Tensor]:
        self._slots[self.rank] = tensor.clone()
        self._barrier.wait()
        found = [self._slots[rank] for rank in range(self.size)]
        self._barrier.wait()
        return found
