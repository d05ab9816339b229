"""``NormBounds``: upper bounds of norms, carried from step to step instead of being computed anew.

An optimizer whose update has a norm of at most u changes the bound b of a matrix to ``|1 - lr decay| b + lr u``, and a
cap brings it down to the cap. No step needs a norm, then: one is computed, with a proof, before the first step and
whenever somebody else has written to the weights (torch counts writes in ``tensor._version``; ``.data`` escapes that).
The bounds lie in the optimizer's state as plain numbers, so that checkpoints carry them and a resumed run goes on bit
for bit; after loading they are believed only if the weights' proved norms are within them.

Of a sharded matrix each process sees writes to its own part only, so all agree first on which norms are needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.caps.verified_norms import NORMS
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.routing import Constraint
from hf_lipschitz.optim.sharding import largest_anywhere, local, mesh_groups, whole

KEY = "norm_bound"
_TRACKED = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # their unit roundoffs
_UNDERFLOW = 1e-40  # covers results below the normal range of float32, which have no relative error


class StaleStateWarning(UserWarning):
    """An optimizer's state was loaded that belongs to other weights."""


class KnownUpdates(Protocol):
    """An optimizer that knows the norm of its updates, as SpectralMuon does.

    Matrices are in groups with ``"role": "matrix"``, ``"lr"``, ``"weight_decay"`` and, if their blocks of rows are
    moved each for itself, ``"split"``.
    """

    param_groups: list[dict[str, Any]]
    state: Any

    def update_norm(self, group: Mapping[str, Any], parameter: Tensor) -> float:
        """A bound of the norm of what a step subtracts from each block of a matrix, in units of the learning rate."""
        ...

    def work_memory(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory on the device of ``like``, at least float32, that whoever asks next may overwrite."""
        ...


class NormBounds:
    """The bounds of one optimizer's matrices.

    Weights in 16-bit dtypes are not tracked: one rounding may raise their norm by more than a step does.
    """

    def __init__(self, optimizer: KnownUpdates) -> None:
        self.optimizer = optimizer
        self._known: dict[Tensor, tuple[int, float]] = {}  # version and bound at the last look

    def tracks(self, rule: Constraint, parameter: Tensor) -> bool:
        """Whether the parameter's norm follows from the optimizer's updates."""
        is_spectral = rule.norm in ("spectral", "per_head") and rule.capping.promises
        return is_spectral and parameter.dtype in _TRACKED and self._group(parameter) is not None

    def confirm(self, tracked: Sequence[tuple[Constraint, str, Tensor]]) -> None:
        """Before a step: the bounds hold for the weights as they are, or are replaced by proved norms.

        Collective where a parameter is sharded.

        Args:
            tracked: rule, name and parameter of each that ``tracks`` is true of, in the same order on every process.

        Raises:
            UserError: the weights have no norm (NaN or infinite entries).
        """
        parameters = [parameter for _, _, parameter in tracked]
        is_new = largest_anywhere([self._is_new(parameter) for parameter in parameters], mesh_groups(parameters))
        for (rule, name, parameter), must in zip(tracked, is_new, strict=True):
            if must:
                self._measure(rule, name, parameter)

    def _is_new(self, parameter: Tensor) -> bool:
        """Whether this process does not know the state, or not the weights."""
        stored = self.optimizer.state[parameter].get(KEY)
        version, bound = self._known.get(parameter, (None, None))
        return stored is None or stored != bound or version != _version(parameter)

    def _measure(self, rule: Constraint, name: str, parameter: Tensor) -> None:
        stored = self.optimizer.state[parameter].get(KEY)
        _, bound = self._known.get(parameter, (None, None))
        try:
            norm = NORMS[rule.norm](whole(parameter), rule.heads)
        except KernelError as error:
            raise UserError(f"parameter {name!r} has no norm: {error}") from error
        is_new = bound is None or stored != bound
        if is_new and stored is not None and norm <= stored:
            self._set(parameter, stored)  # of a resumed run
            return
        if is_new and stored is not None:
            warnings.warn(
                f"the optimizer's state says that {name!r} has a norm of at most {stored:g}, and it has {norm:g}: the "
                "state belongs to other weights, load the two from one checkpoint",
                StaleStateWarning,
                stacklevel=2,
            )
        self._set(parameter, norm)

    def follow(self, rule: Constraint, parameter: Tensor) -> float:
        """After a step: the bound of the rule's norm now.

        A step moves each of the group's ``split`` blocks of rows by ``lr update_norm``, and n blocks of norm 1 under
        one another have a norm of at most sqrt(n). Where the rule's blocks are parts of the group's, n is 1.

        Rounding: the decayed weight and the sum are rounded once each, and the scaled update once; each moves an entry
        by at most u relatively, which raises the norm by a factor of at most ``1 + u sqrt(k)`` (caps/storage.py).
        """
        version, bound = self._known[parameter]
        group = self._group(parameter)
        if group is not None and version != _version(parameter):
            roundoff = _TRACKED[parameter.dtype]
            split = group.get("split", 1)
            met = 1 if (rule.heads or 1) % split == 0 else split
            step = group["lr"] * self.optimizer.update_norm(group, parameter) * math.sqrt(met)
            bound = abs(1.0 - group["lr"] * group["weight_decay"]) * bound + step
            bound = bound * (1.0 + 3.1 * roundoff * math.sqrt(min(parameter.shape)) + 1e-15) + _UNDERFLOW
            self._set(parameter, bound)
        return bound

    def capped(self, parameter: Tensor, bound: float) -> None:
        """After a cap: the bound that it promises."""
        self._set(parameter, bound)

    def _set(self, parameter: Tensor, bound: float) -> None:
        self._known[parameter] = (_version(parameter), bound)
        self.optimizer.state[parameter][KEY] = bound

    def _group(self, parameter: Tensor) -> dict[str, Any] | None:
        for group in self.optimizer.param_groups:
            if group.get("role") == "matrix" and any(member is parameter for member in group["params"]):
                return group
        return None


def _version(parameter: Tensor) -> int:
    return local(parameter)._version
