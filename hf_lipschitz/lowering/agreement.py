"""Program and model executed side by side in float64: tested, not proved, and refused if they differ."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hf_lipschitz.bounds.engine import evaluate_program
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.lowering.export import ROOT, silent
from hf_lipschitz.lowering.refusal import LoweringError

AGREEMENT = 1e-9  # largest difference, relative to the largest entry of the answer
_SEED = 20260
_SAMPLES, _OFTEN = 3, 5  # and how often each stands in a larger batch


def check_agreement(program: Program, model: nn.Module, space: str) -> None:
    """Refuse a program that computes something else than a float64 model.

    Args:
        program: a lowered program.
        model: float64, in evaluation mode, giving one tensor.
        space: where inputs are drawn from: [0, 1] for ``pixels[0,1]``, a standard normal otherwise.

    Raises:
        LoweringError: the answers differ, are not finite, or those of a sample depend on the rest of its batch.
        KernelError: the program cannot be executed, or does not cover the state dict.
    """
    shape = tuple(program.nodes[0].attrs["shape"])
    generator = np.random.default_rng(_SEED)
    draw = generator.random if space == "pixels[0,1]" else generator.standard_normal
    inputs = draw((_SAMPLES, *shape))
    weights = {name.removeprefix(f"{ROOT}."): tensor.numpy() for name, tensor in model.state_dict().items()}
    executed = evaluate_program(program, weights, BUILT_IN, inputs)["logits"]
    with torch.no_grad(), silent():
        together = model(torch.from_numpy(inputs.copy())).numpy()  # a model may write into its input
        alone = model(torch.from_numpy(inputs[:1].copy())).numpy()
        many = model(torch.from_numpy(np.repeat(inputs, _OFTEN, axis=0))).numpy()[::_OFTEN]
    together, alone, many = (each.reshape(-1, *executed.shape[1:]) for each in (together, alone, many))
    scale = max(1.0, float(np.max(np.abs(executed))))
    cases = (
        (together, "the model's"),
        (alone, "the model's, for one sample without the rest of a batch,"),
        (many, "the model's, for a larger batch,"),
    )
    for other, what in cases:
        distance = float(np.max(np.abs(other - executed[: len(other)]))) / scale
        if not distance <= AGREEMENT:
            raise LoweringError(
                f"the answers of the program differ from {what} by {distance:.3g} relatively: the forward does "
                "something that its traced graph does not show, such as a cast, a seed or a branch; remove it"
            )
