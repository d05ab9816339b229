"""Sharded parameters on a mesh of one process: the same numbers as plain ones, in states of the same layout."""

from __future__ import annotations

import copy
from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.norm_bounds import KEY
from hf_lipschitz.optim.sharding import gradient, is_sharded, like_parameter, local, mesh_groups, part_of, whole
from hf_lipschitz.optim.spectral_muon import NonFiniteGradientError, SpectralMuon
from hf_lipschitz.optim.stacks import ShardedStack
from tests.caps.matrices import gaussian
from tests.optim.two_processes import RULES, Net, largest_share, net

OPTIMIZERS: dict[str, Any] = {
    "SpectralMuon": lambda model: SpectralMuon.from_model(model, RULES, lr=0.1, weight_decay=0.1, adamw_lr=0.02),
    "no nesterov": lambda model: SpectralMuon.from_model(model, RULES, lr=0.1, nesterov=False),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
}


@pytest.fixture
def mesh() -> Generator[DeviceMesh, None, None]:
    """One process, which is destroyed whatever happens."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(mesh: DeviceMesh, dtype: torch.dtype = torch.float32, *, everything: bool = True) -> Net:
    """The model with sharded blocks, and with everything else sharded too."""
    model = net(dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    if everything:
        fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x.to(next(model.parameters()).dtype)) - 1.0).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def trained(model: Net, optimizer_name: str) -> tuple[Net, Any, Enforcer]:
    optimizer = OPTIMIZERS[optimizer_name](model)
    enforcer = Enforcer(model, RULES, headroom=0.1)
    enforcer.attach(optimizer)
    train(model, optimizer, range(4))
    return model, optimizer, enforcer


@pytest.mark.parametrize("everything", [True, False], ids=["all sharded", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_sharded_models_train_as_plain_ones_do(
    optimizer_name: str, dtype: torch.dtype, everything: bool, mesh: DeviceMesh
) -> None:
    plain, _, _ = trained(net(dtype), optimizer_name)
    model, _, enforcer = trained(sharded(mesh, dtype, everything=everything), optimizer_name)
    found, expected = weights(model), weights(plain)
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=0.0, atol=tolerance), name
        assert is_sharded(model.get_parameter(name)) == (everything or name.startswith("blocks"))
    assert enforcer.max_excess() <= 0.0 and largest_share(found) <= 1.0 + 1e-12


def test_excess_is_that_of_the_gathered_weights(mesh: DeviceMesh) -> None:
    assert Enforcer(sharded(mesh), RULES).excess() == Enforcer(net(torch.float32), RULES).excess()


def test_states_are_divided_like_their_parameters(mesh: DeviceMesh) -> None:
    model, optimizer, _ = trained(sharded(mesh), "SpectralMuon")
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for key in state.keys() & {"momentum_buffer", "exp_avg", "exp_avg_sq"}:
            assert isinstance(state[key], DTensor)
            assert state[key].placements == parameter.placements and state[key].shape == parameter.shape
    assert all(isinstance(stack, ShardedStack) for stacks in optimizer._stacks.values() for stack in stacks)
    tracked = {name for name, parameter in model.named_parameters() if KEY in optimizer.state[parameter]}
    assert len(tracked) == 6


def test_torchs_state_dict_functions_carry_the_whole_state(mesh: DeviceMesh) -> None:
    model, optimizer, _ = trained(sharded(mesh), "SpectralMuon")
    stored = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert stored["state"]["first.weight"].keys() == {"momentum_buffer", KEY}
    other = sharded(mesh)
    other.load_state_dict(model.state_dict())
    fresh = OPTIMIZERS["SpectralMuon"](other)
    set_optimizer_state_dict(other, fresh, stored)  # makes a step with zero gradients, which no cap should follow
    Enforcer(other, RULES, headroom=0.1).attach(fresh)
    assert fresh.state[other.first.weight][KEY] == optimizer.state[model.first.weight][KEY]
    train(model, optimizer, range(4, 7))
    train(other, fresh, range(4, 7))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(model).items())


def test_a_state_of_whole_tensors_is_divided_when_it_is_loaded(mesh: DeviceMesh) -> None:
    plain, optimizer, _ = trained(net(torch.float64), "SpectralMuon")
    model = sharded(mesh, torch.float64)
    with torch.no_grad():
        for name, value in weights(plain).items():
            local(model.get_parameter(name)).copy_(value)
    fresh = OPTIMIZERS["SpectralMuon"](model)
    Enforcer(model, RULES, headroom=0.1).attach(fresh)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(plain, optimizer, range(4, 6))
    train(model, fresh, range(4, 6))
    assert isinstance(fresh.state[model.first.weight]["momentum_buffer"], DTensor)
    assert isinstance(fresh.state[model.head.weight]["exp_avg"], DTensor)
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(model)[name], rtol=0.0, atol=1e-12)


def test_writes_to_a_part_are_noticed(mesh: DeviceMesh) -> None:
    model, optimizer, enforcer = trained(sharded(mesh), "SpectralMuon")
    with torch.no_grad():
        local(model.first.weight).mul_(30.0)
    train(model, optimizer, range(4, 5))
    assert enforcer.max_excess() <= 0.0


def test_a_part_that_is_not_finite_is_refused(mesh: DeviceMesh) -> None:
    model, optimizer, _ = trained(sharded(mesh), "SpectralMuon")
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    local(model.head.weight.grad)[1, 1] = float("inf")
    with pytest.raises(NonFiniteGradientError, match=r"of a parameter of shape \(3, 8\)"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)], [Replicate()]], ids=str)
def test_parts_and_wholes(placements: list[Any], mesh: DeviceMesh) -> None:
    matrix = gaussian(5, 4)
    parameter = nn.Parameter(distribute_tensor(matrix, mesh, placements))
    assert torch.equal(whole(parameter), matrix) and not whole(parameter).requires_grad
    assert torch.equal(part_of(matrix, parameter), local(parameter))
    assert torch.equal(whole(like_parameter(2.0 * local(parameter), parameter)), 2.0 * matrix)
    local(parameter).zero_()
    assert not whole(parameter).any()
    parameter.grad = distribute_tensor(matrix, mesh, placements)
    assert torch.equal(gradient(parameter), matrix)
    assert [device.type for _, device in mesh_groups([parameter, parameter])] == ["cpu"]


def test_a_gradient_in_another_layout_is_brought_into_that_of_its_parameter(mesh: DeviceMesh) -> None:
    matrix = gaussian(5, 4)
    parameter = nn.Parameter(distribute_tensor(matrix, mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(matrix, mesh, [Shard(1)])
    assert torch.equal(gradient(parameter), matrix)


def test_every_process_computes_what_lies_on_a_mesh_of_two_dimensions(mesh: DeviceMesh) -> None:
    square = init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "parts"))
    model = net(torch.float64)
    fully_shard(model, mesh=square)
    plain, _, _ = trained(net(torch.float64), "SpectralMuon")
    trained(model, "SpectralMuon")
    assert len(mesh_groups(model.parameters())) == 2
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(model)[name], rtol=0.0, atol=1e-12)


def test_plain_tensors_are_themselves() -> None:
    parameter = nn.Parameter(gaussian(2, 2))
    assert local(parameter) is whole(parameter) is part_of(parameter, parameter) is parameter
    assert mesh_groups([parameter]) == []
