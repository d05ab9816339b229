"""How a torch module says what it computes: ``bound_nodes`` beside ``forward``, collected by a ProgramBuilder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from hf_lipschitz.bounds.program import Node, Program


class UnknownModuleError(ValueError):
    """A module that cannot be certified: nobody stated which operations its forward is made of."""


@runtime_checkable
class LipschitzModule(Protocol):
    """A module that can name the kernel operations of its own forward (evaluation mode)."""

    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        """Append the nodes that compute ``self(x)`` and return the index of the last one."""
        ...


class ProgramBuilder:
    """Collects the nodes of a model. Values are node indices; tensors are named by identity within ``root``."""

    def __init__(self, root: nn.Module) -> None:
        self._nodes: list[Node] = []
        self._names = {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}
        self._paths = {id(module): path for path, module in root.named_modules()}

    def add(
        self,
        op: str,
        *inputs: int,
        attrs: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor | None] | None = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> int:
        """Append one node; tensor slots that are None are left out. Returns the node's index."""
        names = {slot: self.name(tensor) for slot, tensor in (tensors or {}).items() if tensor is not None}
        self._nodes.append(Node(op, inputs, dict(attrs or {}), names, dict(scalars or {})))
        return len(self._nodes) - 1

    def name(self, tensor: torch.Tensor) -> str:
        """The state-dict name of a parameter or persistent buffer of the root module."""
        if id(tensor) not in self._names:
            raise UnknownModuleError("a layer reads a tensor that is no parameter or buffer of the model: register it")
        return self._names[id(tensor)]

    def tensor(self, tensor: torch.Tensor) -> list[Any]:
        """The scalar expression that reads a stored tensor of at most one dimension."""
        return ["tensor", self.name(tensor)]

    def apply(self, module: nn.Module, x: int) -> int:
        """Append the nodes of a child module.

        Raises:
            UnknownModuleError: the module's class does not define both ``forward`` and ``bound_nodes`` itself. The
                exact class decides: a subclass may have changed what the forward calls, so it inherits no nodes.
        """
        kind = type(module)
        where = f"{self._paths.get(id(module)) or 'the model'} ({kind.__name__})"
        if not isinstance(module, LipschitzModule):
            raise UnknownModuleError(f"{where} does not say what it computes: give its class a bound_nodes method")
        if not {"forward", "bound_nodes"} <= set(vars(kind)) or "forward" in vars(module):
            raise UnknownModuleError(f"{where} must define both forward and bound_nodes itself, side by side: add them")
        return module.bound_nodes(self, x)

    def program(self, *, features: int, logits: int) -> Program:
        """The finished program in canonical form."""
        return Program(tuple(self._nodes), {"features": features, "logits": logits}).canonical()
