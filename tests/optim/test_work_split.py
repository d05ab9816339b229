"""Shared work: every matrix has one owner, the load is even, and all processes end with the same bits."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim import spectral_muon as optimizer_module
from hf_lipschitz.optim import stack_steps
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.spectral_muon import NonFiniteGradientError, SpectralMuon, spectral_muon
from hf_lipschitz.optim.work_split import (
    Lot,
    WorkSplit,
    data_parallel_group,
    in_rounds,
    owned_counts,
    processes_of,
    trainer_group,
)
from tests.optim.models import CONSTRAINTS, small_net, train
from tests.optim.together import Together

LOTS = [
    Lot(1, 1, 64, 64, torch.bfloat16),
    Lot(12, 1, 16, 32, torch.float32),
    Lot(3, 2, 5, 7, torch.bfloat16),
    Lot(2, 1, 3, 3, torch.float64),
]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 40])
def test_every_matrix_has_one_owner_and_pieces_follow_each_other(processes: int) -> None:
    split = WorkSplit(LOTS, processes)
    for index, lot in enumerate(LOTS):
        owned = [split.owned(index, rank) for rank in range(processes)]
        assert [member for own in owned for member in own] == list(range(lot.count))
        assert all(before.stop == after.start for before, after in pairwise(owned))


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_no_process_works_much_longer_than_it_must(processes: int) -> None:
    counts = owned_counts(LOTS, processes)
    load = [sum(lot.cost * own[rank] for lot, own in zip(LOTS, counts, strict=True)) for rank in range(processes)]
    best = max(sum(load) / processes, max(lot.cost for lot in LOTS))
    assert max(load) <= (4 / 3) * best  # Graham's bound of this rule
    assert LOTS[0].cost == 64**3 and LOTS[2].cost == 2 * 5**2 * 7


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_messages_hold_every_update_apart(processes: int) -> None:
    split = WorkSplit(LOTS, processes)
    for rank in range(processes):
        message = torch.zeros(split.message_size, dtype=torch.uint8)
        views = split.updates(message, rank)
        for index, (view, lot) in enumerate(zip(views, LOTS, strict=True)):
            assert view.dtype == lot.dtype
            assert view.shape == (len(split.owned(index, rank)) * lot.blocks, lot.rows, lot.columns)
            view.fill_(index + 1)
        for index, view in enumerate(split.updates(message.clone(), rank)):
            assert (view == index + 1).all()
    assert WorkSplit([], 2).message_size == 0


def test_rounds_are_as_large_as_allowed_and_at_least_one_stack() -> None:
    sizes = [64 * 64, 12 * 16 * 32, 3 * 2 * 5 * 7, 2 * 9]
    assert in_rounds(LOTS, sum(sizes)) == [range(4)]
    assert in_rounds(LOTS, sizes[0] + sizes[1]) == [range(2), range(2, 4)]
    assert in_rounds(LOTS, 1) == [range(index, index + 1) for index in range(4)]
    assert in_rounds([], 1) == []


START = small_net()  # once: threads share torch's random state


def trained(group: Any, dtype: torch.dtype, steps: int = 4) -> tuple[nn.Module, SpectralMuon]:
    model = copy.deepcopy(START).to(dtype)
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.05, weight_decay=0.1, process_group=group)
    Enforcer(model, CONSTRAINTS).attach(optimizer)
    train(model, optimizer, steps)
    return model, optimizer


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((mine.double() - its.double()).abs().max()) for mine, its in pairs)


@pytest.mark.parametrize("entries", [1, 2**28], ids=["many rounds", "one round"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processes", [2, 3])
def test_sharing_changes_nothing_but_rounding(
    processes: int, dtype: torch.dtype, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = trained(None, dtype)
    monkeypatch.setattr(optimizer_module, "ROUND_ENTRIES", entries)
    group = Together(processes)
    group.install(monkeypatch)
    models = [model for model, _ in group.run(lambda _: trained(group, dtype))]
    assert all(distance(model, models[0]) == 0.0 for model in models)
    tolerance = {torch.float32: 2e-3, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert distance(models[0], alone) < tolerance
    assert len(group.sent) == 4 * (2 if entries == 1 else 1)
    assert max(group.sent) > 0


def test_an_update_that_is_not_sent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = trained(None, torch.float64)
    group = Together(2)
    group.install(monkeypatch)
    exchange = stack_steps.exchange

    def forgetful(message: Tensor, received: Tensor, processes: Any) -> list[Tensor]:
        messages = exchange(message, received, processes)
        return [messages[0], torch.zeros_like(messages[1])]

    monkeypatch.setattr(stack_steps, "exchange", forgetful)
    model = group.run(lambda _: trained(group, torch.float64))[0][0]
    assert distance(model, alone) > 1e-2


def test_averages_of_all_are_whole_so_that_any_state_is_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    _, alone = trained(None, torch.float64, steps=1)
    group = Together(2)
    group.install(monkeypatch)
    for _, optimizer in group.run(lambda _: trained(group, torch.float64, steps=1)):
        for key, state in optimizer.state_dict()["state"].items():
            expected = alone.state_dict()["state"][key]
            assert state.keys() == expected.keys()
            for name in state.keys() - {"norm_bound"}:
                assert torch.equal(state[name], expected[name])


def test_all_refuse_a_gradient_that_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Together(2)
    group.install(monkeypatch)

    def job(rank: int) -> list[str]:
        model, optimizer = trained(group, torch.float32, steps=1)
        before = copy.deepcopy(model.state_dict())
        said = []
        for spoil, error in ((float("nan"), NonFiniteGradientError), (None, UserError)):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            if rank == 1:
                parameter = model.get_parameter("blocks.0.weight")
                parameter.grad = None if spoil is None else torch.full_like(parameter, spoil)
            with pytest.raises(error) as caught:
                optimizer.step()
            said.append(str(caught.value))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        return said

    other, own = group.run(job)
    assert other[0].startswith("the gradient on another process holds NaN")
    assert own[0].startswith("the gradient of a parameter of shape (6, 6) holds NaN")
    assert other[1] == own[1] and "gradients for different parameters" in own[1]


def test_the_group_is_in_no_state_no_group_and_no_pickle() -> None:
    group = threading.Lock()  # which no pickle takes, like a process group
    model = small_net()
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1, process_group=group)
    assert not any("process_group" in each for each in optimizer.param_groups)
    torch.save(optimizer.state_dict(), io.BytesIO())
    assert pickle.loads(pickle.dumps(optimizer)).process_group is None
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.process_group is group


def test_the_group_of_a_wrapped_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.process_group = "group"

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapped)
    wrapped = Wrapped(small_net())
    for model, expected in (
        (wrapped, "group"),
        (torch.compile(wrapped, backend="eager"), "group"),
        (Wrapped(torch.compile(small_net(), backend="eager")), "group"),
        (small_net(), None),
        (torch.compile(small_net(), backend="eager"), None),
    ):
        assert data_parallel_group(model) == expected
        assert SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1).process_group == expected
        assert SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1, process_group=None).process_group is None
    assert processes_of(None) == 1


class Arguments:
    """What the factory reads of TrainingArguments in a run of four processes."""

    def __init__(self, mode: str = "distributed", world_size: int = 4, **more: Any) -> None:
        self.parallel_mode = SimpleNamespace(value=mode)
        self.world_size, self.learning_rate, self.weight_decay = world_size, 0.1, 0.0
        self.fsdp, self.deepspeed, self.parallelism_config = None, None, None
        self.__dict__.update(more)


@pytest.mark.parametrize(
    ("settings", "environment", "is_shared"),
    [
        ({}, {}, True),
        ({"parallelism_config": SimpleNamespace(dp_replicate_size=4)}, {}, True),
        ({"parallelism_config": SimpleNamespace(dp_replicate_size=2)}, {}, False),
        ({"mode": "not_distributed"}, {}, False),
        ({"mode": "not_parallel", "world_size": 1}, {}, False),
        ({"world_size": 2}, {}, False),
        ({"fsdp": "full_shard"}, {}, False),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, {}, False),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, False),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, False),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, False),
    ],
    ids=str,
)
def test_the_trainers_run_is_shared_where_it_is_plainly_data_parallel(
    settings: dict[str, Any], environment: dict[str, str], is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = object()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=world))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    arguments = Arguments(**settings)
    assert trainer_group(arguments) is (torch.distributed.group.WORLD if is_shared else None)
    optimizer = spectral_muon()(small_net(), constraints=CONSTRAINTS, args=arguments)
    assert (optimizer.process_group is not None) == is_shared
    assert spectral_muon()(small_net(), constraints=CONSTRAINTS, lr=0.1).process_group is None


def test_a_run_of_one_process_shares_nothing() -> None:
    assert trainer_group(Arguments()) is None  # torch.distributed is not in use
    assert trainer_group(SimpleNamespace()) is None


def test_threads_play_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in itself: what one sends all get, in the order of ranks."""
    group = Together(3)
    group.install(monkeypatch)

    def job(rank: int) -> list[int]:
        out = torch.empty(3, dtype=torch.uint8)
        group.gather(out, torch.full((1,), rank, dtype=torch.uint8))
        return out.tolist()

    assert group.run(job) == [[0, 1, 2]] * 3
