"""How far the outputs of two checkpoints of one architecture can be apart: cast, quantised or fine-tuned copies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.weights import read_weights
from hf_lipschitz.certify import own_program, program_of_folder, state_arrays
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.weight_change import WeightChange, bound_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Target = PreTrainedModel | str | os.PathLike[str]


def bound_weight_change(a: Target, b: Target) -> WeightChange:
    """Bound ``|a(x) - b(x)|`` in l2, for features and logits, over every input of the program's domain.

    Args:
        a, b: checkpoint folders, or models with ``bound_program``; both of the same program (class and config).

    Returns:
        The bounds in real arithmetic of both networks, and how they grow from node to node; infinite where the domain
        is unbounded (pixels are in [0, 1]).

    Raises:
        UserError: the two compute different programs.
        KernelError: weights that do not fit their program.

    Source: evaluation/weight_change.py.
    """
    (program, before), (other, after) = _program_and_weights(a), _program_and_weights(b)
    if program.canonical_bytes() != other.canonical_bytes():
        raise UserError("the two checkpoints differ in architecture or config: compare copies of one model")
    return bound_change(program, before, after)


def _program_and_weights(target: Target) -> tuple[Program, Mapping[str, Array]]:
    if isinstance(target, str | os.PathLike):
        if not Path(target).is_dir():
            raise UserError(f"{target} is not a folder: give the path of a saved checkpoint")
        return program_of_folder(target), read_weights(Path(target))
    return own_program(type(target))(target), state_arrays(target)
