"""Does it pay to treat equal matrices as one stack? Times ``orthogonalize`` and ``stiefel`` both ways, by width.

The thresholds ``STACK_ENTRIES`` of optim/spectral_muon.py and optim/enforcement.py come from this table: run
``python benchmarks/stacking.py [--threads N]`` and look where the ratio crosses 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_lipschitz.caps.arithmetic import matmul_dtype
from hf_lipschitz.caps.orthogonalize import orthogonalize
from hf_lipschitz.caps.stiefel import stiefel

COUNT = 12
STEP = 0.03  # spectral norm of the update that stiefel repairs


def median_ms(functions: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """Median milliseconds of each function; rounds interleave, so that both meet the same load."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:  # the first round warms up
                found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


def compare(name: str, function: Callable[[Tensor], Tensor], stack_SMN: Tensor, rounds: int) -> None:
    """Print one row: the stack and the single matrices, stacking and copying back included."""
    matrices = list(stack_SMN.unbind())
    targets = [torch.empty_like(matrix) for matrix in matrices]

    def as_stack() -> None:
        for target, result in zip(targets, function(torch.stack(matrices)), strict=True):
            target.copy_(result)

    def one_by_one() -> None:
        for target, matrix in zip(targets, matrices, strict=True):
            target.copy_(function(matrix))

    stacked, single = median_ms((as_stack, one_by_one), rounds)
    shape = " x ".join(map(str, stack_SMN.shape))
    print(f"{name:14} {shape:16} stack {stacked:8.2f} ms  one by one {single:8.2f} ms  ratio {stacked / single:.2f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {device}, {arguments.threads} threads, products in {matmul_dtype(device)}")
    for rows, columns in ((64, 64), (128, 128), (256, 256), (256, 1024), (512, 512), (768, 768)):
        gaussian = torch.randn(COUNT, rows, columns, device=device)
        compare("orthogonalize", orthogonalize, gaussian, arguments.rounds)
        moved = stiefel(gaussian) + STEP * orthogonalize(torch.randn_like(gaussian))
        compare("stiefel", stiefel, moved, arguments.rounds)


if __name__ == "__main__":
    main()
