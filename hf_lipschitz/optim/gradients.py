"""What must not reach the weights is refused before anything is changed, by all processes that work together or none.

A process that raised alone would leave the others waiting for it in the next exchange.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.sharding import gradient, largest_anywhere, local, mesh_groups
from hf_lipschitz.optim.work_split import processes_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NonFiniteGradientError(ValueError):
    """A gradient holds NaN or infinite entries; no parameter and no state was changed."""


def check_gradients(parameters: Sequence[Tensor], process_group: ProcessGroup | None) -> None:
    """Refuse gradients with which no step can be made. Collective with a group or sharded parameters.

    Args:
        parameters: all of an optimizer, with a gradient or without.
        process_group: who shares work on plain parameters.

    Raises:
        NonFiniteGradientError: a gradient holds NaN or infinite entries, on any of the processes.
        UserError: processes have gradients for different parameters.
        ValueError: a gradient is sparse.
    """
    found = [parameter for parameter in parameters if parameter.grad is not None]
    if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in found):
        raise ValueError("SpectralMuon needs dense gradients: create the embedding with sparse=False")
    is_bad = not _are_finite([gradient(parameter) for parameter in found])
    together = mesh_groups(parameters)
    if process_group is not None:
        together.append((process_group, local(parameters[0]).device))
    if any(processes_of(group) > 1 for group, _ in together):
        members = zlib.crc32(bytes(parameter.grad is not None for parameter in parameters))
        is_bad, most, least = largest_anywhere([is_bad, members, -members], together)
        if most != -least:
            raise UserError(
                "processes that share work have gradients for different parameters, so nothing was updated: let each "
                "train the same ones, with zero gradients where it must"
            )
    if is_bad:
        bad = next((parameter for parameter in found if not torch.isfinite(gradient(parameter)).all()), None)
        place = "on another process" if bad is None else f"of a parameter of shape {tuple(bad.shape)}"
        raise NonFiniteGradientError(
            f"the gradient {place} holds NaN or infinite entries and nothing was updated: lower the learning rate, "
            "clip gradients, or train in a dtype of wider range"
        )


def _are_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite.

    A sum is finite only if all its terms are, and several times faster than a largest magnitude; finite terms may
    overflow it, so it never refuses alone.
    """
    sums = [entries.sum() for entries in gradients]
    if not sums or bool(torch.isfinite(torch.stack([total.to(sums[0]) for total in sums])).all()):
        return True
    return all(bool(torch.isfinite(entries).all()) for entries in gradients)
