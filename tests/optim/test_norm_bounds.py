"""Tracked bounds: never below the norm, believed only where they belong, and no norm is computed in a step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.caps.verified_norms import NORMS
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim import norm_bounds
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.norm_bounds import KEY, NormBounds, StaleStateWarning
from hf_lipschitz.optim.spectral_muon import SpectralMuon
from tests.caps.matrices import SPECTRA, gaussian, with_spectrum
from tests.optim.models import CONSTRAINTS, small_net, train

TRACKING = ["decay", "spectral_normalize", "spectral_power_cap", "spectral_soft_cap"]


class OneWeight(nn.Module):
    """A matrix whose gradients are set by the test."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def rules(cap: str, value: float, heads: int | None = None) -> list[dict[str, Any]]:
    rule = {"pattern": "weight", "cap": cap, "norm": "spectral" if heads is None else "per_head", "value": value}
    return [rule if heads is None else {**rule, "heads": heads}]


def attached(
    weight: Tensor, cap: str, value: float, *, headroom: float = 0.0, heads: int | None = None, **settings: Any
) -> tuple[OneWeight, SpectralMuon, Enforcer]:
    model, constraints = OneWeight(weight), rules(cap, value, heads)
    optimizer = SpectralMuon.from_model(model, constraints, **{"lr": 0.05, **settings})
    enforcer = Enforcer(model, constraints, headroom=headroom)
    enforcer.attach(optimizer)
    return model, optimizer, enforcer


def norm_of(model: OneWeight) -> float:
    return NORMS["spectral"](model.weight, None)


def push(model: OneWeight, optimizer: SpectralMuon, gradient: Tensor) -> None:
    model.weight.grad = gradient.to(model.weight.dtype)
    optimizer.step()


def least_room(understated: float = 1.0, decay: float = 0.0) -> float:
    """The smallest (bound - norm) / lr while nothing caps, under pushes that grow all singular values together."""
    start = with_spectrum(SPECTRA["flat"](8), 8, 12).float()
    model, optimizer, _ = attached(start, "spectral_soft_cap", 1e6, weight_decay=decay, momentum=0.0)
    true_norm = optimizer.update_norm
    monkey: Any = optimizer
    monkey.update_norm = lambda group, parameter: understated * true_norm(group, parameter)
    room = []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + step % 3)
        push(model, optimizer, -start if step % 5 else gaussian(8, 12, seed=step))
        room.append((optimizer.state[model.weight][KEY] - norm_of(model)) / 0.05)
    return min(room)


@pytest.mark.parametrize("decay", [0.0, 0.3, 30.0])
def test_the_bound_is_never_below_the_norm_and_is_sharp(decay: float) -> None:
    assert 0.0 <= least_room(decay=decay) < 0.4


@pytest.mark.parametrize("understated", [0.0, 0.5, 0.7])
def test_an_understated_update_is_found(understated: float) -> None:
    assert least_room(understated) < 0.0


@pytest.mark.parametrize("cap", TRACKING)
def test_no_norm_is_computed_after_the_first_step(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = attached(gaussian(8, 12).float() / 8.0, cap, 1.0)
    push(model, optimizer, gaussian(8, 12))
    for name in NORMS:
        monkeypatch.setitem(norm_bounds.NORMS, name, lambda *_: pytest.fail("a norm was computed"))
    for seed in range(5):
        push(model, optimizer, gaussian(8, 12, seed=seed))


@pytest.mark.parametrize("headroom", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("cap", TRACKING)
def test_a_lazy_cap_acts_seldom_and_the_constraint_holds_always(
    cap: str, headroom: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    capped = NormBounds.capped

    def counted(self: NormBounds, parameter: Tensor, bound: float) -> None:
        calls.append(1)
        capped(self, parameter, bound)

    monkeypatch.setattr(NormBounds, "capped", counted)
    start = with_spectrum(SPECTRA["flat"](8), 8, 12).float()
    model, optimizer, enforcer = attached(0.99 * start, cap, 1.0, headroom=headroom, lr=0.02)
    for step in range(60):
        push(model, optimizer, -start if step % 7 else gaussian(8, 12, seed=step))
        assert enforcer.max_excess() <= 0.0
        assert optimizer.state[model.weight][KEY] <= 1.0
    period = max(1, int(headroom / (0.02 * 1.005)) + 1)
    assert 60 // period - 1 <= len(calls) <= 60 // period + 1


def test_a_headroom_that_is_no_share_is_refused() -> None:
    for headroom in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"headroom is .*the share of a cap to go below it"):
            Enforcer(OneWeight(torch.eye(2)), rules("decay", 1.0), headroom=headroom)


@pytest.mark.parametrize("cap", TRACKING)
def test_weights_that_somebody_else_wrote_are_measured_anew(cap: str) -> None:
    model, optimizer, enforcer = attached(gaussian(8, 12).float() / 8.0, cap, 1.0)
    push(model, optimizer, gaussian(8, 12))
    with torch.no_grad():
        model.weight.mul_(30.0)
    push(model, optimizer, gaussian(8, 12))
    assert enforcer.max_excess() <= 0.0
    model.load_state_dict({"weight": 20.0 * torch.eye(8, 12)})
    push(model, optimizer, gaussian(8, 12))
    assert enforcer.max_excess() <= 0.0


def test_weights_that_are_not_finite_are_named_before_the_step() -> None:
    model, optimizer, _ = attached(gaussian(4, 4).float(), "decay", 1.0)
    with torch.no_grad():
        model.weight[1, 1] = float("nan")
    with pytest.raises(UserError, match=r"parameter .weight. has no norm: .*NaN"):
        push(model, optimizer, torch.eye(4))


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_are_orthogonalised_and_bounded_each_for_itself(heads: int) -> None:
    start = 0.3 * with_spectrum(SPECTRA["flat"](8), 8, 12).float()
    model, optimizer, enforcer = attached(start, "spectral_soft_cap", 1.0, heads=heads, momentum=0.0, lr=0.1)
    assert optimizer.param_groups[0]["split"] == heads
    hot = torch.ones(8, 12)
    push(model, optimizer, hot)
    moved = (start - model.weight.detach()).unflatten(0, (heads, -1))
    norms = torch.linalg.matrix_norm(moved, 2)
    assert (norms - 0.1).abs().max() < 0.01  # each head by the learning rate, so the whole by sqrt(heads) of it
    for _ in range(40):
        push(model, optimizer, -hot)
        assert enforcer.max_excess() <= 0.0


@pytest.mark.parametrize("heads", [None, 2, 4, 8])
def test_an_optimizer_that_was_built_for_other_heads_is_followed_too(heads: int | None) -> None:
    """Each of four blocks moves by lr, so what holds several of them moves by more, and a part of one by no more."""
    start = torch.full((8, 12), 1e-3)
    model = OneWeight(start)
    optimizer = SpectralMuon.from_model(model, rules("spectral_soft_cap", 1e6, heads=4), lr=0.05, momentum=0.0)
    constraints = rules("spectral_soft_cap", 1e6, heads)
    Enforcer(model, constraints).attach(optimizer)
    for _ in range(30):
        push(model, optimizer, -torch.ones(8, 12))
        assert NORMS[constraints[0]["norm"]](model.weight, heads) <= optimizer.state[model.weight][KEY]


def saved_and_loaded(optimizer: SpectralMuon, model: nn.Module, constraints: list[dict[str, Any]]) -> SpectralMuon:
    fresh = SpectralMuon.from_model(model, constraints, lr=1.0)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh


def test_a_loaded_bound_is_kept_where_it_holds() -> None:
    model, optimizer, _ = attached(gaussian(8, 12).float() / 9.0, "spectral_soft_cap", 1.0)
    for seed in range(3):
        push(model, optimizer, gaussian(8, 12, seed=seed))
    bound = optimizer.state[model.weight][KEY]
    fresh = saved_and_loaded(optimizer, model, rules("spectral_soft_cap", 1.0))
    Enforcer(model, rules("spectral_soft_cap", 1.0)).attach(fresh)
    before = list(fresh._optimizer_step_pre_hooks.values())
    before[0](fresh, (), {})
    assert fresh.state[model.weight][KEY] == bound


def test_the_state_of_other_weights_is_reported_and_not_believed() -> None:
    model, optimizer, _ = attached(1e-3 * gaussian(8, 12).float(), "spectral_soft_cap", 1.0)
    push(model, optimizer, gaussian(8, 12))
    other = OneWeight(with_spectrum(SPECTRA["flat"](8), 8, 12).float())
    fresh = saved_and_loaded(optimizer, other, rules("spectral_soft_cap", 1.0))
    enforcer = Enforcer(other, rules("spectral_soft_cap", 1.0))
    enforcer.attach(fresh)
    with pytest.warns(StaleStateWarning, match="'weight' has a norm of at most .* belongs to other weights"):
        push(other, fresh, gaussian(8, 12))
    assert enforcer.max_excess() <= 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        push(other, fresh, gaussian(8, 12))


def test_an_older_state_loaded_in_between_is_checked_too() -> None:
    model, optimizer, enforcer = attached(1e-3 * gaussian(8, 12).float(), "spectral_soft_cap", 1.0)
    push(model, optimizer, gaussian(8, 12))
    early = optimizer.state_dict()
    early = {**early, "state": {key: dict(state) for key, state in early["state"].items()}}
    for _ in range(30):
        push(model, optimizer, -torch.eye(8, 12))
    optimizer.load_state_dict(early)
    with pytest.warns(StaleStateWarning):
        push(model, optimizer, -torch.eye(8, 12))
    assert enforcer.max_excess() <= 0.0


def test_sixteen_bit_weights_are_measured_and_not_tracked() -> None:
    model, optimizer, enforcer = attached(gaussian(8, 12).bfloat16(), "spectral_soft_cap", 1.0)
    for seed in range(3):
        push(model, optimizer, gaussian(8, 12, seed=seed))
        assert KEY not in optimizer.state[model.weight]
        assert enforcer.max_excess() <= 0.0


def test_bounds_belong_to_matrices_with_a_promised_spectral_norm() -> None:
    model = small_net()
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.05)
    Enforcer(model, CONSTRAINTS).attach(optimizer)
    train(model, optimizer, 2)
    tracked = {name for name, parameter in model.named_parameters() if KEY in optimizer.state[parameter]}
    assert tracked == {"blocks.0.weight", "blocks.1.weight", "attention.weight"}
