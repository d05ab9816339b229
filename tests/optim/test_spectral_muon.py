"""SpectralMuon: its update is the stated one, AdamW inside is torch's, its state survives what trainers do to it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.caps.orthogonalize import orthogonalize
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim import spectral_muon as module
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.spectral_muon import NonFiniteGradientError, SpectralMuon, spectral_muon
from hf_lipschitz.optim.stacks import MatrixStack
from tests.caps.matrices import gaussian
from tests.optim.models import CONSTRAINTS, small_net, train

MATRIX_NAMES = ["blocks.0.weight", "blocks.1.weight", "attention.weight"]


def one_matrix(weight: Tensor, **settings: Any) -> tuple[nn.Parameter, SpectralMuon]:
    parameter = nn.Parameter(weight.clone())
    return parameter, SpectralMuon([{"params": [parameter], "role": "matrix"}], **{"lr": 0.1, **settings})


def by_hand(
    weight: Tensor, gradients: list[Tensor], *, lr: float, momentum: float, nesterov: bool, decay: float
) -> Tensor:
    """The documented update, matrix by matrix."""
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + (1.0 - momentum) * gradient
        direction = momentum * average + (1.0 - momentum) * gradient if nesterov else average
        weight = (1.0 - lr * decay) * weight - lr * orthogonalize(direction)
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)], ids=str)
def test_matrices_follow_the_documented_update(shape: tuple[int, int], nesterov: bool, decay: float) -> None:
    weight = gaussian(*shape)
    gradients = [gaussian(*shape, seed=seed) for seed in range(1, 4)]
    parameter, optimizer = one_matrix(weight, momentum=0.8, nesterov=nesterov, weight_decay=decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
    expected = by_hand(weight, gradients, lr=0.1, momentum=0.8, nesterov=nesterov, decay=decay)
    assert torch.allclose(parameter, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [1e-20, 1.0, 1e20])
def test_the_learning_rate_is_the_spectral_norm_of_an_update(strength: float) -> None:
    parameter, optimizer = one_matrix(torch.zeros(12, 30), lr=0.25)
    parameter.grad = strength * gaussian(12, 30).float()
    optimizer.step()
    norms = torch.linalg.svdvals(parameter.detach().double())
    assert 0.76 * 0.25 <= norms[0] <= 1.005 * 0.25
    assert norms.median() >= 0.76 * 0.25


def test_adamw_inside_is_torchs_to_the_bit() -> None:
    ours, theirs = small_net(), small_net()
    others = [name for name, _ in ours.named_parameters() if name not in MATRIX_NAMES]
    optimizer = SpectralMuon.from_model(
        ours, CONSTRAINTS, lr=0.0, adamw_lr=0.01, adamw_betas=(0.8, 0.9), adamw_weight_decay=0.1
    )
    parameters = [parameter for name, parameter in theirs.named_parameters() if name in others]
    reference = torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    train(ours, optimizer, 5)
    train(theirs, reference, 5)
    for name in others:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name


@pytest.mark.parametrize("entries", [0, 10**9], ids=["one by one", "stacked"])
def test_stacks_change_nothing_but_rounding(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STACK_ENTRIES", entries)
    model = small_net(torch.float64)
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.05)
    train(model, optimizer, 3)
    monkeypatch.setattr(module, "STACK_ENTRIES", 36)
    other = small_net(torch.float64)
    train(other, SpectralMuon.from_model(other, CONSTRAINTS, lr=0.05), 3)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, its, rtol=0, atol=1e-10)


def is_average_kept(nesterov: bool, dtype: torch.dtype) -> bool:
    """Whether a step leaves the average as the documented formula has it, and the gradient alone."""
    parameter, optimizer = one_matrix(torch.zeros(5, 5, dtype=dtype), nesterov=nesterov, momentum=0.5)
    gradient = (100.0 * gaussian(5, 5)).to(dtype)
    parameter.grad = gradient.clone()
    optimizer.step()
    average = optimizer.state[parameter]["momentum_buffer"]
    return torch.equal(average, 0.5 * gradient) and torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
def test_orthogonalisation_works_on_a_copy_of_the_average(nesterov: bool, dtype: torch.dtype) -> None:
    assert is_average_kept(nesterov, dtype)


def test_orthogonalising_the_average_in_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def direct(stack: MatrixStack, work: Tensor, momentum: float, *, nesterov: bool) -> None:
        work.copy_(stack.averages_SMN.mul_(2.0))

    monkeypatch.setattr(MatrixStack, "direct", direct)
    assert not is_average_kept(False, torch.bfloat16)


def continued(model: nn.Module, optimizer: SpectralMuon, dtype: torch.dtype) -> tuple[nn.Module, SpectralMuon]:
    """A new model and optimizer from the saved states, as a resumed run builds them."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = small_net(dtype, seed=99)
    other.load_state_dict(saved["model"])
    fresh = SpectralMuon.from_model(other, CONSTRAINTS, lr=123.0, momentum=0.0, adamw_lr=123.0)
    fresh.load_state_dict(saved["optimizer"])
    return other, fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_net(dtype)
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.05, weight_decay=0.1)
    Enforcer(model, CONSTRAINTS).attach(optimizer)
    train(model, optimizer, 4)
    other, fresh = continued(model, optimizer, dtype)
    Enforcer(other, CONSTRAINTS).attach(fresh)
    train(model, optimizer, 4, seed=1)
    train(other, fresh, 4, seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_a_state_that_loses_the_average_is_found() -> None:
    model = small_net()
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.05)
    train(model, optimizer, 4)
    other, fresh = continued(model, optimizer, torch.float32)
    for parameter in fresh.param_groups[0]["params"]:
        del fresh.state[parameter]
    train(model, optimizer, 1, seed=1)
    train(other, fresh, 1, seed=1)
    assert not torch.equal(model.blocks[0].weight, other.get_parameter("blocks.0.weight"))


def test_groups_hold_plain_values_only() -> None:
    groups = SpectralMuon.from_model(small_net(), CONSTRAINTS, lr=0.1).state_dict()["param_groups"]
    assert [(group["role"], len(group["params"])) for group in groups] == [("matrix", 2), ("matrix", 1), ("other", 5)]
    for group in groups:
        assert all(isinstance(value, str | float | int) for key, value in group.items() if key != "params")


def test_parameters_may_be_replaced_in_the_groups() -> None:
    """What FSDP2 does when it is prepared."""
    model = small_net()
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1)
    replaced = {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [replaced[id(p)] for p in group["params"]]
    for parameter in replaced.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(p, replaced[id(p)]) for p in model.parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_are_whole(clone: Callable[[SpectralMuon], SpectralMuon]) -> None:
    copied = clone(one_matrix(gaussian(3, 3), lr=0.3)[1])
    copied.add_param_group({"params": [nn.Parameter(torch.ones(2))], "role": "other"})
    copied.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "role": "matrix", "lr": 0.7})
    assert [group["lr"] for group in copied.param_groups] == [0.3, 3e-3, 0.7]


def test_schedulers_scale_both_roles() -> None:
    optimizer = SpectralMuon.from_model(small_net(), CONSTRAINTS, lr=0.1, adamw_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.005]


def test_a_closure_is_evaluated_with_gradients() -> None:
    model = small_net()
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1)
    before, losses = model.blocks[0].weight.clone(), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        losses.append(loss)
        return loss

    assert optimizer.step(closure) is losses[0]
    assert not torch.equal(model.blocks[0].weight, before)
    assert optimizer.step() is None


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.weight", "head.bias"])
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(name: str, entry: float) -> None:
    model = small_net()
    optimizer = SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1)
    enforcer = Enforcer(model, CONSTRAINTS)
    enforcer.attach(optimizer)
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    bad = model.get_parameter(name)
    assert bad.grad is not None
    bad.grad.view(-1)[1] = entry
    with pytest.raises(NonFiniteGradientError, match="holds NaN or infinite entries and nothing was updated") as caught:
        optimizer.step()
    assert str(tuple(bad.shape)) in str(caught.value)
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(before[0][key], value) for key, value in after[0].items())
    for key, state in after[1]["state"].items():
        for part, value in state.items():
            assert torch.equal(torch.as_tensor(before[1]["state"][key][part]), torch.as_tensor(value))
    assert enforcer.max_excess() <= 0.0


def test_huge_finite_gradients_are_fine() -> None:
    parameter, optimizer = one_matrix(torch.zeros(4, 4))
    parameter.grad = torch.full((4, 4), 3e38)
    optimizer.step()
    assert torch.isfinite(parameter).all()


def test_zero_and_missing_gradients_move_nothing() -> None:
    parameter, optimizer = one_matrix(gaussian(4, 4))
    before = parameter.detach().clone()
    optimizer.step()
    assert parameter not in optimizer.state
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, before)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = SpectralMuon([{"params": list(embedding.parameters()), "role": "other"}], lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="needs dense gradients"):
        optimizer.step()


def test_matrices_that_others_partition_or_flatten_are_refused() -> None:
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_id = 3  # as DeepSpeed ZeRO-3 marks it
    for parameter in (partitioned, nn.Parameter(torch.empty(0, 4))):
        with pytest.raises(UserError, match=r"no entries on this process, as under DeepSpeed ZeRO-3"):
            SpectralMuon([{"params": [parameter], "role": "matrix"}], lr=0.1)
    parameter, optimizer = one_matrix(torch.ones(2, 2))
    flat = nn.Parameter(torch.ones(4))
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]  # as FSDP1 and ZeRO do after construction
    with pytest.raises(UserError, match=r"shape \(4,\) is no matrix: .* rather than FSDP1 or DeepSpeed ZeRO"):
        optimizer.step()


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        ({"role": None}, {}, r"needs a role, 'matrix' or 'other', not None: use SpectralMuon.from_model"),
        ({"role": "vector"}, {}, "not 'vector'"),
        ({"params": [nn.Parameter(torch.ones(3))]}, {}, r"a parameter of shape \(3,\) is no matrix"),
        ({}, {"lr": -0.1}, r"lr of the role 'matrix' must be in \[0, inf\), not -0.1"),
        ({}, {"lr": float("nan")}, "lr of the role 'matrix' must be"),
        ({}, {"momentum": 1.0}, r"momentum of the role 'matrix' must be in \[0, 1\), not 1.0"),
        ({}, {"weight_decay": -1.0}, "weight_decay of the role 'matrix'"),
        ({}, {"steps": 99}, "1 to 8 steps, not 99"),
        ({"role": "other"}, {"adamw_betas": (0.9, 1.0)}, r"beta2 of the role 'other' must be in \[0, 1\)"),
        ({"role": "other", "eps": -1.0}, {}, "eps of the role 'other'"),
    ],
)
def test_wrong_settings_are_refused(group: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralMuon(
            [{"params": [nn.Parameter(torch.ones(2, 2))], "role": "matrix", **group}], **{"lr": 0.1, **settings}
        )


def test_plain_parameters_are_refused_with_the_way_to_go() -> None:
    with pytest.raises(UserError, match=r"use SpectralMuon\.from_model"):
        SpectralMuon(small_net().parameters(), lr=0.1)  # type: ignore[arg-type]


def test_from_model_leaves_out_what_is_frozen_and_refuses_plain_adamw() -> None:
    model = small_net()
    for name in MATRIX_NAMES[:2]:
        model.get_parameter(name).requires_grad_(False)
    assert len(SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1).param_groups[0]["params"]) == 1
    with pytest.raises(UserError, match="no trainable matrix has a cap of its spectral norm"):
        SpectralMuon.from_model(model, CONSTRAINTS[2:], lr=0.1)


def test_the_factory_needs_a_learning_rate_and_takes_the_trainers() -> None:
    model = small_net()
    model.config = type("Config", (), {"constraints": CONSTRAINTS})()
    with pytest.raises(UserError, match="spectral_muon got no learning rate, and the Trainer does not pass its own"):
        spectral_muon()(model)
    arguments = type("Arguments", (), {"learning_rate": 0.07, "weight_decay": 0.3})()
    matrices, _, others = spectral_muon()(model, args=arguments, adamw_lr=0.02).param_groups
    assert (matrices["lr"], matrices["weight_decay"], others["lr"], others["weight_decay"]) == (0.07, 0.3, 0.02, 0.0)
    matrices, *_ = spectral_muon()(model, args=arguments, lr=0.5, weight_decay=0.0).param_groups
    assert (matrices["lr"], matrices["weight_decay"]) == (0.5, 0.0)
    assert spectral_muon()(model, lr=0.5, constraints=CONSTRAINTS[:1] + CONSTRAINTS[2:]).param_groups[1]["lr"] == 3e-3
