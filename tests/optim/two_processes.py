"""One process of several that train together, or the only one: trains small models, and saves what it ended with.

`torchrun --nproc_per_node 2 -m tests.optim.two_processes FOLDER` makes two of them; without torchrun there is one,
which trains on what the two see together. Numbers of rows do not divide by two, and one matrix has a single row.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_lipschitz.caps.spectral_normalize import spectral_normalize
from hf_lipschitz.optim import stack_steps
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.norm_bounds import StaleStateWarning
from hf_lipschitz.optim.sharding import local
from hf_lipschitz.optim.spectral_muon import NonFiniteGradientError, SpectralMuon, spectral_muon
from hf_lipschitz.optim.work_split import processes_of
from tests.leaving import leave_together

RULES: list[dict[str, Any]] = [
    {"pattern": r"(first|gate)\.weight", "cap": "spectral_soft_cap", "norm": "spectral", "value": 0.6},
    {"pattern": r"blocks\.\d\.weight", "cap": "stiefel", "norm": "spectral", "value": 1.0},
    {"pattern": r"attention\.weight", "cap": "spectral_normalize", "norm": "per_head", "value": 0.5, "heads": 2},
    {"pattern": r"head\.weight", "cap": "row_normalize", "norm": "row", "value": 0.3},
]
STEPS = 6
BATCH = 8


class Net(nn.Module):
    """(B, 6) to (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.attention = nn.Linear(7, 8, bias=False)
        self.gate = nn.Linear(8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x).abs()
        x = self.attention(x)
        return self.head(x * (1.0 + self.gate(x)))


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


class Process:
    """This process: its place, and how it trains."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.mesh: DeviceMesh | None = init_device_mesh("cpu", (self.count,)) if self.count > 1 else None

    def replicated(self, dtype: torch.dtype) -> nn.Module:
        """The model, wrapped for data parallelism where there are several processes."""
        return net(dtype) if self.mesh is None else nn.parallel.DistributedDataParallel(net(dtype))

    def sharded(self, dtype: torch.dtype) -> nn.Module:
        """The model, sharded where there are several processes."""
        model = net(dtype)
        if self.mesh is not None:
            for block in model.blocks:
                fully_shard(block, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)
        return model

    def gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Of this process's share of the batch of a step."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 6, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        share = x.chunk(self.count)[self.rank]
        (model(share) - 1.0).square().mean().backward()

    def train(self, model: nn.Module, optimizer: SpectralMuon, steps: range) -> list[float]:
        """The largest norm over cap of the gathered weights after each step."""
        worst = []
        for step in steps:
            self.gradients(model, optimizer, step)
            optimizer.step()
            worst.append(largest_share(gathered(model)))
        return worst


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """All weights, whole, under their plain names; not by the package's own functions."""
    bare: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found = {}
    for name, parameter in bare.named_parameters():
        values: Any = parameter.detach()
        found[name] = values.full_tensor() if hasattr(values, "full_tensor") else values.clone()
    return found


def norm(matrix: Tensor) -> float:
    """The largest singular value, of all matrices of a stack."""
    return float(torch.linalg.matrix_norm(matrix.double(), 2).max())


def largest_share(weights: dict[str, Tensor]) -> float:
    """The largest norm over its cap, by an SVD in float64."""
    return max(
        norm(weights["first.weight"]) / 0.6,
        norm(weights["gate.weight"]) / 0.6,
        *(norm(weights[f"blocks.{index}.weight"]) for index in range(3)),
        norm(weights["attention.weight"].view(2, 4, 7)) / 0.5,
        float(weights["head.weight"].double().norm(dim=1).max()) / 0.3,
    )


def attached(model: nn.Module) -> tuple[SpectralMuon, Enforcer]:
    optimizer = SpectralMuon.from_model(model, RULES, lr=0.1, weight_decay=0.1, adamw_lr=0.02)
    enforcer = Enforcer(model, RULES, headroom=0.2)
    enforcer.attach(optimizer)
    return optimizer, enforcer


def run(process: Process, model: nn.Module) -> dict[str, Any]:
    optimizer, enforcer = attached(model)
    shares = process.train(model, optimizer, range(STEPS))
    bounds = [float(state["norm_bound"]) for state in optimizer.state.values() if "norm_bound" in state]
    excess = enforcer.max_excess()
    return {"weights": gathered(model), "shares": shares, "bounds": bounds, "excess": excess}


def without_sending(process: Process) -> dict[str, Any]:
    """A planted mistake: what the second process computed never arrives."""
    exchange = stack_steps.exchange

    def forgetful(message: Tensor, *others: Any) -> list[Tensor]:
        return [part * (rank == 0) for rank, part in enumerate(exchange(message, *others))]

    stack_steps.exchange = forgetful
    try:
        return run(process, process.replicated(torch.float64))
    finally:
        stack_steps.exchange = exchange


def capped_in_parts(process: Process) -> dict[str, Any]:
    """A planted mistake: every process caps its part as if that were the matrix."""
    model = process.sharded(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(STEPS):
        process.gradients(model, optimizer, step)
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name == "first.weight":
                part = local(parameter).detach()
                part.copy_(spectral_normalize(part, value=0.6))
    return {"shares": [norm(gathered(model)["first.weight"]) / 0.6]}


def continued(process: Process, folder: Path) -> dict[str, Any]:
    """Trains on, and once more from a checkpoint of the middle, which torch.distributed.checkpoint wrote and read."""
    model = process.sharded(torch.float32)
    optimizer, _ = attached(model)
    process.train(model, optimizer, range(3))
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "state")
    whole_state = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    process.train(model, optimizer, range(3, STEPS))
    other = process.sharded(torch.float32)
    optimizer, _ = attached(other)
    state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, optimizer)}
    dcp.load(state, checkpoint_id=folder / "state")
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, optimizer, state["optimizer"])
    kinds = {type(each["momentum_buffer"]).__name__ for each in optimizer.state.values() if "momentum_buffer" in each}
    process.train(other, optimizer, range(3, STEPS))
    states = whole_state.get("state", {})  # on the first process only
    shapes = {name: tuple(each["momentum_buffer"].shape) for name, each in states.items() if "momentum_buffer" in each}
    return {"weights": gathered(model), "resumed": gathered(other), "kinds": sorted(kinds), "shapes": shapes}


def refused(process: Process) -> dict[str, Any]:
    """One process has a gradient that is not finite: all raise, and nothing changes."""
    model = process.sharded(torch.float32)
    optimizer, _ = attached(model)
    process.train(model, optimizer, range(1))
    before = copy.deepcopy(gathered(model))
    process.gradients(model, optimizer, 1)
    if process.rank == process.count - 1:
        bad: Any = model.get_parameter("blocks.1.weight").grad
        local(bad)[0, 0] = float("nan")
    try:
        optimizer.step()
    except NonFiniteGradientError as error:
        said = str(error)
    else:
        said = "nothing"
    after = gathered(model)
    return {"said": said, "kept": all(torch.equal(before[name], after[name]) for name in before)}


def written_by_one(process: Process) -> dict[str, Any]:
    """Somebody writes to one process's part only: all must measure anew, or wait for each other for ever."""
    model = process.sharded(torch.float32)
    optimizer, _ = attached(model)
    process.train(model, optimizer, range(2))
    if process.rank == process.count - 1:
        with torch.no_grad():
            local(model.get_parameter("first.weight")).mul_(30.0)
    return {"shares": process.train(model, optimizer, range(2, STEPS))}


class Regression(nn.Module):
    """The model with a loss, as the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(torch.float64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - 1.0).square().mean()}


def trained_by_trainer(process: Process, folder: Path) -> dict[str, Any]:
    """The Trainer's factory finds out by itself that work can be shared."""
    from transformers import Trainer, TrainingArguments  # not before: others import this module for its models

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        learning_rate=0.1,
        per_device_train_batch_size=BATCH // process.count,
        max_steps=STEPS,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(6, generator=generator, dtype=torch.float64)} for _ in range(STEPS * BATCH)]
    rules = [{**rule, "pattern": r"net\." + rule["pattern"]} for rule in RULES]
    factory = (spectral_muon, {"args": arguments, "constraints": rules})
    model = Regression()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizer_cls_and_kwargs=factory)
    optimizer: Any = trainer.create_optimizer()
    Enforcer(model, rules).attach(optimizer)
    trainer.train()
    return {"weights": gathered(model.net), "shared among": processes_of(optimizer.process_group)}


def main(folder: Path) -> None:
    """Everything, one after the other."""
    process = Process()
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for dtype in (torch.float32, torch.float64):
        jobs[f"replicated {dtype}"] = lambda dtype=dtype: run(process, process.replicated(dtype))
        jobs[f"sharded {dtype}"] = lambda dtype=dtype: run(process, process.sharded(dtype))
    jobs["refused"] = lambda: refused(process)
    jobs["written by one"] = lambda: written_by_one(process)
    jobs["trainer"] = lambda: trained_by_trainer(process, folder)
    if process.count > 1:
        jobs["continued"] = lambda: continued(process, folder)
        jobs["without sending"] = lambda: without_sending(process)
        jobs["capped in parts"] = lambda: capped_in_parts(process)
    report = {name: job() for name, job in jobs.items()}
    torch.save(report, folder / f"report-{process.rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("error", StaleStateWarning)
    torch.set_num_threads(1)
    if "WORLD_SIZE" not in os.environ:
        main(Path(sys.argv[1]))
    else:
        dist.init_process_group("gloo")
        main(Path(sys.argv[1]))
        leave_together()
