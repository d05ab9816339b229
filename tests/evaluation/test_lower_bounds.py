"""The falsifier reaches known constants from below and never exceeds them, so that a bound 2 % too low is refuted."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lipschitz.evaluation.lower_bounds import classifier_estimates, lipschitz_lower_estimate

ABOVE = 1e-9  # rounding of the test's own evaluation of the constant and of the ratio


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


def maxmin(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=-1)


def shift(x: Tensor) -> Tensor:
    """Two groups of channels of (B, H, W, D) move by one pixel, down and to the right."""
    quarter = x.shape[-1] // 4
    down, right, rest = x.split([quarter, quarter, x.shape[-1] - 2 * quarter], dim=-1)
    return torch.cat([down.roll(1, dims=1), right.roll(1, dims=2), rest], dim=-1)


def orthogonal_net(depth: int, width: int, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Shifts between orthogonal maps, MaxMin after an orthogonal map, an l2 pool; one layer scaled by ``factor``."""
    maps = [orthogonal(width, seed) for seed in range(2 * depth)]

    def net(x: Tensor) -> Tensor:
        for layer in range(depth):
            x = shift(x @ maps[2 * layer].T) @ maps[2 * layer]
            x = maxmin(x @ maps[2 * layer + 1].T + 0.1 * layer) * (factor if layer == 2 else 1.0)
        return (x.square().sum(dim=(1, 2)) + 1e-12).sqrt()

    return net


def softmax_attention(x: Tensor) -> Tensor:
    """One head with identity maps, of a module's fused kernel: its derivative must still be found."""
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


A = draw(5, 8, seed=3)
U = draw(6, 6, seed=4)
GELU = 1.128904145186

# function, example inputs, norm, its constant in that norm (math of a line each), how close the search must come
CASES = {
    "linear map": (lambda x: x @ A.T, draw(3, 8), "l2", float(torch.linalg.matrix_norm(A, 2)), 1e-6),
    "rank one": (lambda x: x[:, :1] * 3.0, draw(3, 8), "l2", 3.0, 1e-6),
    "linear map of tokens": (
        lambda x: x @ A.T,
        draw(2, 6, 8),
        "token_max",
        float(torch.linalg.matrix_norm(A, 2)),
        1e-4,
    ),
    "mixing of tokens, l2": (lambda x: U @ x, draw(2, 6, 8), "l2", float(torch.linalg.matrix_norm(U, 2)), 1e-6),
    "mixing of tokens": (lambda x: U @ x, draw(2, 6, 8), "token_max", float(U.abs().sum(dim=1).max()), 1e-6),
    "sum of pixels": (lambda x: x.sum(dim=(2, 3)), draw(2, 3, 4, 4), "token_max", 16.0, 1e-6),
    "mean of tokens, l2": (lambda x: x.mean(dim=1), draw(2, 16, 8), "l2", 0.25, 1e-6),
    "pixel tokens": (lambda x: 2.0 * x.flip(1), draw(2, 3, 4, 4), "token_max", 2.0, 1e-6),
    "abs": (lambda x: x.abs(), draw(2, 8), "l2", 1.0, 1e-6),
    "norm, not differentiable at 0": (lambda x: x.norm(dim=1, keepdim=True), 0.0 * draw(2, 8), "l2", 1.0, 1e-6),
    "gelu": (F.gelu, draw(3, 8), "l2", GELU, 1e-2),
    "gelu of tokens": (F.gelu, draw(3, 4, 2), "token_max", GELU, 1e-2),
    "orthogonal net": (orthogonal_net(6, 16), draw(2, 4, 4, 16), "l2", 1.0, 1e-2),
    "orthogonal net with a scaled layer": (orthogonal_net(6, 16, 1.7), draw(2, 4, 4, 16), "l2", 1.7, 1e-2),
    "constant": (lambda x: torch.ones(len(x), 2, dtype=x.dtype), draw(2, 8), "l2", 0.0, 1e-6),
    "constant with a graph": (lambda x: 0.0 * x, draw(2, 8), "l2", 0.0, 1e-6),
}


@pytest.mark.parametrize("name", CASES)
def test_estimate_reaches_the_constant_from_below(name: str) -> None:
    function, inputs, norm, constant, close = CASES[name]
    found = lipschitz_lower_estimate(function, inputs, norm=norm)
    assert found.value <= constant * (1 + ABOVE)
    assert found.value >= constant * (1 - close)
    assert found.norm == norm and found.input.shape == found.direction.shape == inputs.shape[1:]
    if constant > 0.0:
        assert found.value > 0.98 * constant  # so a bound that is 2 % too low is refuted
        pair = torch.stack([found.input, found.input + found.direction])
        before, after = function(pair)
        if norm == "l2":  # the value is the ratio of a pair that anyone can evaluate
            ratio = float((after - before).norm() / (pair[1] - pair[0]).norm())
            assert found.value <= ratio * (1 + 1e-12) and found.value == pytest.approx(ratio, rel=1e-6)


def test_ascending_inputs_matters_where_the_jacobian_depends_on_them() -> None:
    inputs = draw(1, 4) - 4.0
    still = lipschitz_lower_estimate(F.gelu, inputs, restarts=1, ascend_inputs=False)
    moved = lipschitz_lower_estimate(F.gelu, inputs, restarts=1, steps=200)
    assert still.value < 0.9 * moved.value <= GELU


def test_attention_through_the_fused_kernel() -> None:
    found = lipschitz_lower_estimate(softmax_attention, draw(2, 5, 4))
    assert found.value > 1.0 and math.isfinite(found.local)


def test_modules_are_copied_to_float64_and_evaluated() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    found = lipschitz_lower_estimate(module, draw(4, 8).float())
    scale = module[2].weight / torch.sqrt(module[2].running_var + module[2].eps)
    constant = torch.linalg.matrix_norm((scale[:, None] * module[0].weight).detach().double(), 2)
    assert found.value == pytest.approx(float(constant), rel=1e-5)
    assert module.training and module[0].weight.dtype == torch.float32 and module[0].weight.grad is None


def test_same_seed_same_estimate() -> None:
    function, inputs = orthogonal_net(2, 8), draw(2, 4, 4, 8)
    first, second = (lipschitz_lower_estimate(function, inputs, steps=5, restarts=2, seed=7) for _ in range(2))
    assert first.value == second.value and torch.equal(first.direction, second.direction)


@pytest.mark.parametrize("norm", ["l2", "token_max"])
def test_the_batch_size_changes_nothing(norm: Any) -> None:
    inputs = draw(3, 4, 8)
    whole, parts = (
        lipschitz_lower_estimate(F.gelu, inputs, norm=norm, steps=10, restarts=2, batch_size=size) for size in (64, 2)
    )
    assert whole.value == pytest.approx(parts.value, rel=1e-12) and whole.local == pytest.approx(parts.local)


# A function that is steep outside [0, 1] only: what holds inside is not refuted by pairs outside.
def steep_outside(x: Tensor) -> Tensor:
    return 0.5 * x + 4.0 * (x - 1.0).clamp_min(0.0) + 4.0 * (-x).clamp_min(0.0)


@pytest.mark.parametrize("norm", ["l2", "token_max"])
def test_pairs_stay_within_the_interval(norm: Any) -> None:
    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels[0] = pixels[0].round()  # on the edges of the interval
    inside = lipschitz_lower_estimate(steep_outside, pixels, norm=norm, within=(0.0, 1.0))
    assert inside.value == pytest.approx(0.5, rel=1e-6) and inside.value <= 0.5 * (1 + ABOVE)
    for end in (inside.input, inside.input + inside.direction):
        assert float(end.min()) >= -1e-15 and float(end.max()) <= 1.0 + 1e-15
    outside = lipschitz_lower_estimate(steep_outside, pixels, norm=norm)
    assert outside.value > 2.0  # the search would have found them


def test_the_gap() -> None:
    found = lipschitz_lower_estimate(lambda x: 2.0 * x, draw(1, 3), steps=2)
    assert found.gap(3.0) == pytest.approx(1.5) and found.gap(1.9) < 1.0
    nothing = lipschitz_lower_estimate(lambda x: 0.0 * x, draw(1, 3), steps=2)
    assert nothing.gap(3.0) == math.inf


class Classifier(nn.Module):
    """Features that are twice the pixels, logits that are three times the features."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Body()
        self.head = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=3.0 * self.head(self.base_model(pixel_values).pooler_output))


class Body(nn.Module):
    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(pooler_output=2.0 * pixel_values.flatten(1))


class Alone(Body):
    """A body as transformers has them: it is its own base model, and its logits are its features."""

    @property
    def base_model(self) -> Alone:
        return self


def test_logits_and_features_of_a_classifier() -> None:
    pixels = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = classifier_estimates(Classifier(), pixels, steps=10, restarts=1)
    assert {output: each.value for output, each in found.items()} == pytest.approx({"logits": 6.0, "features": 2.0})
    assert all(float(each.input.min()) >= 0.0 and float(each.input.max()) <= 1.0 for each in found.values())
    found = classifier_estimates(Alone(), pixels, steps=10, restarts=1)
    assert found["logits"] is found["features"] and found["logits"].value == pytest.approx(2.0)


def test_nothing_but_the_copy_is_touched() -> None:
    """Neither gradients nor modes, nor the global random state."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    module(draw(4, 8).float()).sum().backward()
    module[1].eval()
    grads = [parameter.grad.clone() for parameter in module.parameters()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    before = torch.get_rng_state()
    lipschitz_lower_estimate(module, draw(4, 8).float(), steps=3, restarts=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, module.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module] == [True, False, True] and module.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "linf"}, "unknown norm"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"inputs": torch.zeros(0, 3)}, "at least 1"),
        ({"within": (1.0, 0.0)}, "lower and the upper end"),
    ],
)
def test_bad_arguments_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lipschitz_lower_estimate(F.gelu, **({"inputs": draw(1, 3)} | options))
