"""Falsification of whole networks: a search over random LipViTs of each mixer never exceeds their certified bounds.

A hundred networks are searched at once: their parameters are stacked, the Jacobian of the features is taken at many
points of every network, and the points where it is largest are perturbed and tried again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lipschitz.bounds.engine import bound_program
from hf_lipschitz.bounds.rule import Rule
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import state_arrays
from hf_lipschitz.evaluation.lower_bounds import lipschitz_lower_estimate
from hf_lipschitz.models.lip_vit.configuration_lip_vit import TOKEN_MIXERS
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from tests.bounds.search import lowered
from tests.models.cases import filled, tiny

NETWORKS = 100
_NOISE = 1e-11


_SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"stages": [{"depth": 2, "width": 8}]},
    "hierarchical": {
        "stages": [{"depth": 1, "width": 8}, {"depth": 1, "width": 12}],
        "activation": "group_sort",
        "pooling": "sum",
        "batch_centering": True,
        "image_std": [0.5, 2.0],
    },
}


def _networks(mixer: str, kind: str, count: int, shape: str = "plain") -> list[LipViTForImageClassification]:
    """Random networks; ``orthogonal`` weights, or for every other one Gaussians scaled to a largest sigma of one."""
    models = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        model = filled(tiny(token_mixer=mixer, num_attention_heads=2, **_SHAPES[shape]), seed)
        model.set_attn_implementation("eager")  # the fused kernel has no batching rule
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 2 and not name.startswith("classifier"):
                tensor.copy_(_at_its_cap(tensor, "orthogonal" if kind == "orthogonal" or seed % 2 else "scaled"))
            elif name.endswith(("temperature", "radius", "residual")):
                tensor.copy_(3.0 * torch.randn(tensor.shape, generator=generator))
        models.append(model)
    return models


def _at_its_cap(weight: Tensor, kind: str) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u @ vh if kind == "orthogonal" else weight.double() / s[0]).float()


def _features(model: Any, x: Tensor) -> Tensor:
    return model.lip_vit(x).pooler_output


def _reached(models: list[LipViTForImageClassification], *, points: int, rounds: int) -> Tensor:
    """For each network the largest stretch that was found, (networks,)."""
    skeleton = models[0].lip_vit.double()
    stacked: dict[str, Tensor] = {
        name: torch.stack([dict(model.lip_vit.state_dict())[name].double() for model in models])
        for name in skeleton.state_dict()
    }
    generator = torch.Generator().manual_seed(0)

    def one(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, dict(state), (x[None],)).pooler_output[0]

    jacobians = torch.func.vmap(torch.func.vmap(torch.func.jacrev(one, argnums=1), in_dims=(None, 0)))
    x = torch.rand((len(models), points, 2, 8, 8), generator=generator, dtype=torch.float64)
    best = torch.zeros(len(models), dtype=torch.float64)
    for _ in range(rounds):
        j_NPOI = jacobians(stacked, x).flatten(3)
        ratios_NP = torch.linalg.matrix_norm(j_NPOI, 2)
        best = torch.maximum(best, ratios_NP.amax(dim=1))
        kept = ratios_NP.argsort(dim=1, descending=True)[:, : max(1, points // 4)]
        x = x[torch.arange(len(models))[:, None], kept].repeat_interleave(4, dim=1)[:, :points]
        x = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return best * (1.0 - _NOISE)


def _bounds(models: list[LipViTForImageClassification], rules: Mapping[str, Rule] = BUILT_IN) -> Tensor:
    found = [bound_program(m.bound_program(), state_arrays(m), rules).outputs["features"].lipschitz for m in models]
    return torch.tensor(found, dtype=torch.float64)


_SHARP = [("shift", "plain"), ("orthogonal", "plain")]


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
def test_no_search_exceeds_the_certified_bound(mixer: str, shape: str) -> None:
    models = _networks(mixer, "both", NETWORKS, shape)
    bounds, found = _bounds(models), _reached(models, points=8, rounds=4)
    assert torch.all(found <= bounds), f"{mixer}: {float((found / bounds).max())}"
    assert torch.all(bounds <= (1.0 + 1e-6) / min(_SHAPES[shape].get("image_std", [1.0])))
    assert float((found / bounds).max()) > (0.99 if (mixer, shape) in _SHARP else 0.4)


@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
def test_no_pair_exceeds_the_certified_bound(mixer: str) -> None:
    """The package's own falsifier, to the logits, with its search over pairs of inputs."""
    for model in _networks(mixer, "both", 2):
        bound = bound_program(model.bound_program(), state_arrays(model), BUILT_IN).outputs["logits"].lipschitz
        images = torch.rand((1, 2, 8, 8), dtype=torch.float64)
        model = model.double()
        estimate = lipschitz_lower_estimate(lambda x, model=model: model(x).logits, images, steps=10, restarts=2)
        assert 0.0 < estimate.value <= bound


@pytest.mark.parametrize("mixer", ["shift", "orthogonal"])
def test_orthogonal_weights_come_within_one_percent(mixer: str) -> None:
    models = _networks(mixer, "orthogonal", NETWORKS)
    found = _reached(models, points=2, rounds=1) / _bounds(models)
    assert float(found.min()) > 0.99 and float(found.max()) <= 1.0


_USED = ["normalize@1", "patchify@1", "linear@1", "maxmin@1", "offset@1", "shift@1", "l2_pool@1", "token_mixing@1"]


@pytest.mark.parametrize("op", _USED)
def test_a_rule_lowered_by_two_percent_is_found(op: str) -> None:
    models = _networks("orthogonal" if op == "token_mixing@1" else "shift", "orthogonal", 3)
    found = _reached(models, points=2, rounds=1)
    assert torch.all(found <= _bounds(models))
    assert torch.any(found > _bounds(models, {**BUILT_IN, op: lowered(BUILT_IN[op])}))


def test_numpy_sees_the_same_networks() -> None:
    """The stacked search looks at the networks that were bounded: one of its Jacobians by finite differences."""
    model = _networks("hybrid", "both", 1)[0]
    body = model.lip_vit.double()
    x = torch.rand((1, 2, 8, 8), dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda value: body(value).pooler_output[0])(x).flatten(1).detach().numpy()
    with torch.no_grad():
        step = 1e-6 * torch.eye(128, dtype=torch.float64).reshape(128, 2, 8, 8)
        difference = (body(x + step).pooler_output - body(x - step).pooler_output).numpy().T / 2e-6
    assert np.abs(jacobian - difference).max() < 1e-6
