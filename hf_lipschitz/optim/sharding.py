"""Parameters of which each process holds a part: ``DTensor``, as ``fully_shard`` (FSDP2) makes them.

A part has other singular values than its matrix. So entrywise arithmetic is done on parts, and whatever depends on the
matrix on the whole, which is gathered first. Gathering is collective: every process of the parameter's mesh must do it,
in the same order.

torch is not asked for its DTensor class until there is one, because importing it takes a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.work_split import largest, processes_of


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds a part of it only (or a copy, where a mesh replicates it)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def layout(tensor: Tensor) -> Any:
    """How a tensor is divided, as a key; None for a plain one."""
    parts: Any = tensor
    return (parts.device_mesh, parts.placements) if is_sharded(tensor) else None


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory; a plain tensor itself. It may be empty."""
    if not is_sharded(tensor):
        return tensor
    parts: Any = tensor
    with torch.no_grad():
        return parts.to_local()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered; a plain tensor itself. Collective where it is sharded."""
    if not is_sharded(tensor):
        return tensor
    parts: Any = tensor
    with torch.no_grad():
        return parts.full_tensor()


def like_parameter(parts: Tensor, parameter: Tensor) -> Tensor:
    """A tensor whose parts these are, divided like a sharded parameter."""
    from torch.distributed.tensor import DTensor

    given: Any = parameter
    size: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}  # parts may be of unequal size
    with torch.no_grad():
        return DTensor.from_local(parts, given.device_mesh, given.placements, run_check=False, **size)


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor that all processes have, the part that this process holds of the parameter; no communication.

    Args:
        tensor: plain, of the parameter's shape.
        parameter: plain, or sharded in any way.
    """
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    given: Any = parameter
    mesh = given.device_mesh
    with torch.no_grad():
        replicated: Any = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=given.placements).to_local()


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A state of a sharded parameter, divided as it is; one that was loaded whole, on every process, is divided."""
    if layout(tensor) == layout(parameter):
        return tensor
    if not is_sharded(tensor):
        return like_parameter(part_of(tensor, parameter).clone(), parameter)
    parts: Any = tensor
    return parts.redistribute(placements=layout(parameter)[1])


def gradient(parameter: Tensor) -> Tensor:
    """The gradient, or this process's part of it, divided as the parameter is."""
    found: Any = parameter.grad
    assert found is not None
    return local(divided_like(found, parameter)) if is_sharded(parameter) else found


def sharing_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """Who shares the work on a sharded parameter: its mesh, where that has one dimension."""
    given: Any = parameter
    return given.device_mesh.get_group() if is_sharded(parameter) and given.device_mesh.ndim == 1 else None


def mesh_groups(parameters: Iterable[Tensor]) -> list[tuple[dist.ProcessGroup, torch.device]]:
    """The process groups of all dimensions of the parameters' meshes, each with the device of its messages."""
    meshes: dict[Any, None] = {}
    for parameter in parameters:
        if is_sharded(parameter):
            meshes[layout(parameter)[0]] = None
    return [(mesh.get_group(axis), torch.device(mesh.device_type)) for mesh in meshes for axis in range(mesh.ndim)]


def largest_anywhere(numbers: Sequence[int], groups: Iterable[tuple[dist.ProcessGroup, torch.device]]) -> list[int]:
    """The largest of each number over all processes of all groups; all of them must call it."""
    found = list(numbers)
    for group, device in groups:
        if processes_of(group) > 1:
            found = largest(found, group, device)
    return found


def refuse_partitioned(name: str, parameter: Tensor) -> None:
    """Raise where a process holds a part of a parameter and no way to the whole.

    Raises:
        UserError: DeepSpeed ZeRO-3 has partitioned it, or it has no entries.
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor") or parameter.numel() == 0:
        raise UserError(
            f"parameter {name!r} has no entries on this process, as under DeepSpeed ZeRO-3, so that its norm can be "
            "neither kept nor known: shard with fully_shard (FSDP2) instead"
        )


def refuse_flattened(model: nn.Module) -> None:
    """Raise for FullyShardedDataParallel (FSDP1), whose parameters are no matrices any more.

    Raises:
        UserError: a module of the model is one.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError(
            "FullyShardedDataParallel (FSDP1) flattens matrices into vectors, whose norms say nothing about them: "
            "shard with fully_shard (FSDP2; fsdp_version 2 in accelerate)"
        )
