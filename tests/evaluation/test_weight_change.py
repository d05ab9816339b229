"""`bound_change`: no input moves outputs further; the formula with both factors of one network is refuted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.weight_change import bound_change
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.weight_change import bound_weight_change
from tests.models.cases import FORMS, filled, tiny

CHANGES: dict[str, Callable[[str, Tensor, torch.Generator], Tensor]] = {
    "bfloat16": lambda name, t, g: t.to(torch.bfloat16).float(),
    "grown": lambda name, t, g: 1.3 * t,
    "noise": lambda name, t, g: t + 0.1 * torch.randn(t.shape, generator=g),
    "one tensor": lambda name, t, g: t * (1.5 if name.endswith("classifier.weight") else 1.0),
    "biases": lambda name, t, g: t + 0.2 if t.ndim == 1 else t,
    "scalars": lambda name, t, g: t - 0.4 if t.ndim == 0 or name.endswith(("temperature", "radius")) else t,
    "negated": lambda name, t, g: -t,
}


def _changed(form: str, kind: str) -> tuple[LipViTForImageClassification, LipViTForImageClassification]:
    before, after = (filled(LipViTConfig(**FORMS[form])) for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in after.state_dict().items():
            tensor.copy_(CHANGES[kind](name, tensor, generator))
    return before.double(), after.double()


def _furthest(before: LipViTForImageClassification, after: LipViTForImageClassification) -> tuple[float, float]:
    """The largest distance of features and logits found by ascent from random images and corners."""
    shape = (8, before.config.num_channels, before.config.image_size, before.config.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[4:] = images[4:].round()
    best = [0.0, 0.0]
    for _ in range(10):
        images.requires_grad_()
        features = before.lip_vit(images).pooler_output - after.lip_vit(images).pooler_output
        logits = before(images).logits - after(images).logits
        best = [max(b, float(d.detach().norm(dim=1).max())) for b, d in zip(best, (features, logits), strict=True)]
        (slope,) = torch.autograd.grad(logits.norm(dim=1).sum() + features.norm(dim=1).sum(), images)
        images = (images + 0.2 * slope.sign()).clamp(0.0, 1.0).detach()
    return best[0], best[1]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("form", list(FORMS)[::7])
def test_no_input_moves_outputs_further(form: str, kind: str) -> None:
    before, after = _changed(form, kind)
    bound = bound_weight_change(before, after)
    features, logits = _furthest(before, after)
    assert features <= bound.features * (1 + 1e-12) and logits <= bound.logits * (1 + 1e-12)
    assert bound.nodes[0] == 0.0 and np.isfinite(bound.logits)


def test_equal_weights_do_not_move() -> None:
    model = filled(tiny())
    bound = bound_weight_change(model, filled(tiny()))
    assert bound.features == bound.logits == 0.0


def _chain(*values: float) -> tuple[Program, dict[str, np.ndarray]]:
    nodes = [Node("input@1", attrs={"shape": [1], "space": "pixels[0,1]"})]
    for i in range(len(values)):
        nodes.append(Node("linear@1", (i,), {"transpose": False}, {"weight": f"w{i}"}))
    program = Program(tuple(nodes), {"features": len(values), "logits": len(values)})
    return program, {f"w{i}": np.array([[value]]) for i, value in enumerate(values)}


def test_both_factors_of_one_network_would_be_wrong() -> None:
    """1 * 1 becomes 2 * 2: at x = 1 the output moves by 3; Lipschitz bounds and sizes of the first network give 2."""
    program, before = _chain(1.0, 1.0)
    _, after = _chain(2.0, 2.0)
    assert 3.0 <= bound_change(program, before, after).logits < 3.0 + 1e-12


def test_every_use_of_a_shared_weight_counts() -> None:
    program, _ = _chain(1.0, 1.0, 1.0)
    shared = Program(
        tuple(Node(n.op, n.inputs, n.attrs, dict.fromkeys(n.tensors, "w"), n.scalars) for n in program.nodes),
        program.outputs,
    )
    found = bound_change(shared, {"w": np.array([[1.0]])}, {"w": np.array([[1.5]])}).logits
    assert 1.5**3 - 1.0 <= found < 1.5**3 - 1.0 + 1e-12


def test_the_bound_is_of_the_right_size() -> None:
    """Sharp for one linear map of a tiny input, so a dropped term would show."""
    program, before = _chain(3.0)
    found = bound_change(program, before, {"w0": np.array([[2.75]])}).logits
    assert 0.25 <= found < 0.25 + 1e-12


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UserError, match="differ in architecture or config"):
        bound_weight_change(filled(tiny()), filled(tiny(patch_size=4)))
