"""The Enforcer keeps constraints after any optimizer's step, measures them with proofs, and names what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hf_lipschitz.caps.arithmetic import NonFiniteWeightError
from hf_lipschitz.caps.registry import CAPS
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim import enforcement
from hf_lipschitz.optim.enforcement import Enforcer, inner_optimizer
from hf_lipschitz.optim.spectral_muon import SpectralMuon
from tests.optim.models import CONSTRAINTS, small_net, train

OPTIMIZERS: dict[str, Callable[[nn.Module, Any], torch.optim.Optimizer]] = {
    "SpectralMuon": lambda model, rules: SpectralMuon.from_model(model, rules, lr=0.2, adamw_lr=0.1),
    "AdamW": lambda model, rules: torch.optim.AdamW(model.parameters(), lr=0.1),
    "SGD": lambda model, rules: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
}
PROMISING = sorted(name for name, cap in CAPS.items() if cap.promises)
DTYPES = [torch.float32, torch.bfloat16]


class TwoWeights(nn.Module):
    """A square and a wide weight, without a forward: gradients are set by the test."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.square = nn.Parameter(torch.randn(8, 8, generator=generator).to(dtype))
        self.wide = nn.Parameter(torch.randn(5, 12, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))


def push(model: nn.Module, step: int) -> None:
    """Adversarial gradients: descent grows the top singular direction, now and then violently or the other way."""
    strength = (1.0, 1e-3, 1e6, 0.0, -1.0, 30.0)[step % 6]
    for parameter in model.parameters():
        if parameter.ndim == 2 and step % 11 != 10:
            u, _, vh = torch.linalg.svd(parameter.detach().double())
            parameter.grad = (-strength * u[:, :1] @ vh[:1]).to(parameter.dtype)
        elif parameter.ndim == 2:  # everything at once
            parameter.grad = -parameter.detach().clone()
        else:
            parameter.grad = torch.ones_like(parameter)


def rate(step: int) -> float:
    """A factor of the learning rate: warm-up and decay with a restart every 150 steps."""
    phase = step % 150
    return min(1.0, (phase + 1) / 20) * (1.0 - phase / 150)


def constraint(cap: str, value: float) -> list[dict[str, Any]]:
    norm = CAPS[cap].norm
    return [{"pattern": "square|wide", "cap": cap, "norm": norm, "value": value}]


def excess_under_pushes(optimizer_name: str, cap: str, dtype: torch.dtype, steps: int, headroom: float = 0.0) -> float:
    """The largest proved excess after any of the steps."""
    model, value = TwoWeights(dtype), 0.8
    rules = constraint(cap, value)
    if optimizer_name == "SpectralMuon" and CAPS[cap].norm != "spectral":
        rules = [{**constraint("stiefel", value)[0], "pattern": "wide"}, {**rules[0], "pattern": "square"}]
    enforcer = Enforcer(model, rules, headroom=headroom)
    optimizer = OPTIMIZERS[optimizer_name](model, rules)
    enforcer.attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    worst = -1.0
    for step in range(steps):
        push(model, step)
        optimizer.step()
        schedule.step()
        worst = max(worst, enforcer.max_excess())
    return worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", PROMISING)
@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_the_constraint_holds_after_each_of_500_adversarial_steps(
    optimizer_name: str, cap: str, dtype: torch.dtype
) -> None:
    assert excess_under_pushes(optimizer_name, cap, dtype, steps=500) <= 0.0


@pytest.mark.slow
@pytest.mark.parametrize("headroom", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", PROMISING)
@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_the_constraint_holds_after_each_of_2000_adversarial_steps(
    optimizer_name: str, cap: str, dtype: torch.dtype, headroom: float
) -> None:
    assert excess_under_pushes(optimizer_name, cap, dtype, steps=2000, headroom=headroom) <= 0.0


@pytest.mark.parametrize("cap", PROMISING)
@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_a_cap_that_allows_a_little_more_is_found(
    optimizer_name: str, cap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = CAPS[cap]

    def too_much(weight, *, value, **settings):
        return row.function(weight, value=1.2 * value, **settings)

    monkeypatch.setitem(CAPS, cap, replace(row, function=too_much, correction=None))
    assert excess_under_pushes(optimizer_name, cap, torch.float32, steps=60) > 0.0


def test_the_excess_is_relative_to_the_value_and_of_the_right_norm() -> None:
    model = small_net()
    with torch.no_grad():
        model.blocks[0].weight.copy_(3.0 * torch.eye(6))
        model.blocks[1].weight.copy_(torch.eye(6))
        model.attention.weight.copy_(torch.cat([torch.full((4, 6), 0.1), torch.zeros(4, 6)]))
        model.head.weight.copy_(torch.eye(4, 8) * 0.25)
    excess = Enforcer(model, CONSTRAINTS).excess()
    expected = {
        "blocks.0.weight": 2.0,
        "blocks.1.weight": 0.0,
        "attention.weight": 0.24**0.5 / 0.5 - 1.0,
        "head.weight": -0.75,
    }
    assert excess == pytest.approx(expected, abs=1e-6)
    assert Enforcer(model, CONSTRAINTS).max_excess() == pytest.approx(2.0)


@pytest.mark.parametrize("entries", [0, 10**9], ids=["one by one", "stacked"])
def test_apply_is_the_cap_of_each_parameter(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enforcement, "STACK_ENTRIES", entries)
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    Enforcer(model, CONSTRAINTS).apply()
    expected = {
        "blocks.0.weight": CAPS["stiefel"].function(before["blocks.0.weight"], value=1.0),
        "blocks.1.weight": CAPS["stiefel"].function(before["blocks.1.weight"], value=1.0),
        "attention.weight": CAPS["spectral_normalize"].function(before["attention.weight"].view(2, 4, 6), value=0.5),
        "head.weight": CAPS["row_normalize"].function(before["head.weight"], value=1.0),
    }
    for name, after in model.state_dict().items():
        wanted = expected.get(name, before[name]).reshape(after.shape)
        assert torch.allclose(after, wanted, rtol=0, atol=2e-5), name
        assert name in expected or torch.equal(after, before[name])


def test_parameters_are_looked_up_by_name_each_time() -> None:
    model = small_net()
    enforcer = Enforcer(model, CONSTRAINTS)
    model.head.weight = nn.Parameter(torch.full((4, 8), 7.0))
    assert enforcer.max_excess() > 10.0
    enforcer.apply()
    assert enforcer.max_excess() <= 0.0
    del model.head
    with pytest.raises(UserError, match=r"the constrained parameter 'head\.weight' is gone"):
        enforcer.apply()


def test_a_parameter_that_is_not_finite_is_named() -> None:
    model = small_net()
    with torch.no_grad():
        model.blocks[1].weight[2, 3] = float("nan")
    enforcer = Enforcer(model, CONSTRAINTS)
    with pytest.raises(NonFiniteWeightError, match=r"stiefel: parameter 'blocks.1.weight' holds NaN"):
        enforcer.apply()
    with pytest.raises(UserError, match=r"parameter 'blocks.1.weight' has no norm: .*NaN"):
        enforcer.excess()
    with torch.no_grad():
        model.blocks[1].weight.copy_(torch.eye(6))
        model.attention.weight[5, 0] = float("inf")  # the second head of the stack
    with pytest.raises(NonFiniteWeightError, match=r"parameter 'attention.weight' holds infinite"):
        enforcer.apply()


def test_weights_that_others_partition_or_flatten_are_refused() -> None:
    model = small_net()
    enforcer = Enforcer(model, CONSTRAINTS)
    model.head.weight = nn.Parameter(torch.empty(0))  # as DeepSpeed ZeRO-3 leaves it
    for use in (enforcer.apply, enforcer.excess):
        with pytest.raises(UserError, match=r"'head.weight' has no entries on this process, as under .*ZeRO-3"):
            use()
    model.head.weight = nn.Parameter(torch.ones(4, 8))
    model.head.weight.ds_id = 1  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="ZeRO-3"):
        enforcer.apply()
    flattened = type("FullyShardedDataParallel", (nn.Sequential,), {})(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"FullyShardedDataParallel \(FSDP1\) flattens matrices"):
        Enforcer(flattened, CONSTRAINTS)


def test_frozen_parameters_are_left_to_the_user_after_a_step() -> None:
    model = small_net()
    with torch.no_grad():
        model.blocks[0].weight.mul_(10.0).requires_grad_(False)
    frozen = model.blocks[0].weight.clone()
    enforcer = Enforcer(model, CONSTRAINTS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    enforcer.attach(optimizer)
    train(model, optimizer, 1)
    assert torch.equal(model.blocks[0].weight, frozen)
    assert [name for name, value in enforcer.excess().items() if value > 0.0] == ["blocks.0.weight"]
    enforcer.apply()
    assert enforcer.max_excess() <= 0.0


def test_a_removed_handle_caps_no_more() -> None:
    model = small_net()
    enforcer = Enforcer(model, CONSTRAINTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    handle = enforcer.attach(optimizer)
    train(model, optimizer, 1)
    assert enforcer.max_excess() <= 0.0
    handle.remove()
    train(model, optimizer, 1)
    assert enforcer.max_excess() > 0.0


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_a_step_that_the_grad_scaler_skips_touches_nothing(optimizer_name: str) -> None:
    model = small_net()  # not capped yet: a hook that fires would be seen
    enforcer = Enforcer(model, CONSTRAINTS)
    optimizer = OPTIMIZERS[optimizer_name](model, CONSTRAINTS)
    enforcer.attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for scale, is_skipped in ((float("inf"), True), (1.0, False)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert unchanged == is_skipped
    assert enforcer.max_excess() <= 0.0


def test_the_hook_goes_to_the_optimizer_inside_accelerates_wrapper() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        accelerator = accelerate.Accelerator(cpu=True)
        model = small_net()
        optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1)
        prepared_model, prepared = accelerator.prepare(model, optimizer)
        assert inner_optimizer(prepared) is optimizer
        enforcer = Enforcer(prepared_model, CONSTRAINTS)
        enforcer.attach(prepared)
        train(prepared_model, prepared, 2)
        assert enforcer.max_excess() <= 0.0
        assert [group["role"] for group in optimizer.param_groups] == ["matrix", "matrix", "other"]
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def test_constraints_of_the_config_are_the_default() -> None:
    model = small_net()
    model.config = type("Config", (), {"constraints": CONSTRAINTS})()
    assert [line.name for line in Enforcer(model).routes if line.constraint] == [
        "blocks.0.weight",
        "blocks.1.weight",
        "attention.weight",
        "head.weight",
    ]
    assert Enforcer(torch.compile(model, backend="eager")).routes == Enforcer(model).routes
