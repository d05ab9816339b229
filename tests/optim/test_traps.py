"""Where the published method or its code states a bound or a cap that does not hold, and that ours do not share it.

The method is that of "Training Transformers with Enforced Lipschitz Constants". Each test first shows the fault on an
example, then what this library makes of the same example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lipschitz.bounds.engine import bound_program, evaluate_program
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.caps.registry import CAPS
from hf_lipschitz.caps.spectral_soft_cap import soft_cap_strength, spectral_soft_cap
from hf_lipschitz.caps.verified_norms import spectral_norms
from hf_lipschitz.nn.init import orthogonal_weight
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.spectral_muon import SpectralMuon
from tests.caps.matrices import SPECTRA, gaussian, with_spectrum

PAPERS_GELU = 1.1289


def bound_of(nodes: list[Node], weights: dict[str, np.ndarray], geometry: Any = "l2") -> float:
    last = len(nodes) - 1
    return (
        bound_program(Program(tuple(nodes), {"features": last, "logits": last}), weights, BUILT_IN, geometry=geometry)
        .nodes[last]
        .lipschitz
    )


def slope(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, direction: np.ndarray) -> float:
    step = 1e-6
    return float(np.linalg.norm(function(x + step * direction) - function(x - step * direction)) / (2.0 * step))


def gelu(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def test_a_gelu_that_is_divided_already_is_divided_again() -> None:
    """An MLP block counts |W_out| |W_in| / 1.1289, where the activation's slope is 1 after the division."""
    steepest = max((gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5 for x in np.linspace(1.0, 2.0, 2001))
    assert steepest / PAPERS_GELU > 1.0  # 1.1289 is a hair low, too
    nodes = [Node("input@1", (), {"shape": [1], "space": "model_input"}), Node("gelu@1", (0,), {"approximate": "none"})]
    assert bound_of(nodes, {}) >= steepest > 1.0 / PAPERS_GELU


def test_a_logit_scale_does_not_scale_what_values_pass_on() -> None:
    """With equal attention everywhere a token_max change passes through the values whole, whatever the scale is."""
    kept = {"query": np.zeros((4, 4)), "key": np.zeros((4, 4)), "value": np.eye(4)}
    nodes = [
        Node("input@1", (), {"shape": [3, 4], "space": "model_input"}),
        Node(
            "softmax_attention@1",
            (0,),
            {"heads": 1},
            {"query": "query", "key": "key", "value": "value"},
            {"temperature": 0.1, "radius": 1.0},
        ),
    ]
    program = Program(tuple(nodes), {"features": 1, "logits": 1})
    shift = np.ones((3, 4)) / 2.0  # every token by a vector of length 1
    before, after = evaluate_program(program, kept, BUILT_IN, np.stack([np.zeros((3, 4)), shift]))["logits"]
    reached = float(np.max(np.linalg.norm(after - before, axis=-1)))
    papers = 0.1 * (1.0 + 2.0 * 0.0)
    assert papers < reached <= bound_of(nodes, kept, "token_max") * (1.0 + 1e-12)


def test_the_rms_of_rows_is_not_the_norm_that_logits_feel() -> None:
    """From RMS to the largest entry a row counts with d times its RMS."""
    row = np.ones((1, 64)) / 64.0
    papers = float(np.sqrt(np.mean(row**2)))
    x = np.ones(64)  # RMS 1
    reached = float(np.abs(row @ x)[0])
    assert reached > papers and reached == pytest.approx(64.0 * papers)


def test_a_scale_of_the_logits_counts() -> None:
    nodes = [
        Node("input@1", (), {"shape": [2], "space": "model_input"}),
        Node("scale@1", (0,), {}, {}, {"factor": 30.0}),
    ]
    assert bound_of(nodes, {}) >= 30.0


def fixed_point(coupling: Callable[[float], float], step: float) -> float:
    """The norm that aligned steps end at, under a soft cap whose strength comes from a reach."""
    norm = 1.0
    for _ in range(400):
        norm += step
        strength = coupling(step)
        once = norm - strength * norm**3
        norm = once + strength * once**3
    return norm


def test_a_step_counts_in_the_unit_of_the_cap() -> None:
    """Four times as many rows as columns: the step in the capped unit is lr, and the coupling divides it by two."""
    assert fixed_point(lambda step: soft_cap_strength(1.0, 1.0 + step / 2.0), 0.1) > 1.1
    assert fixed_point(lambda step: soft_cap_strength(1.0, 1.0 + step), 0.1) <= 1.0 + 1e-12
    start = with_spectrum(SPECTRA["flat"](8), 32, 8).float()
    assert largest_excess(start, "SpectralMuon", lr=0.1) <= 0.0


class _One(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def largest_excess(start: Tensor, optimizer: str, lr: float, steps: int = 60) -> float:
    """Under gradients that push along the weight itself."""
    model = _One(start)
    rules = [{"pattern": "weight", "cap": "spectral_soft_cap", "value": 1.0}]
    chosen = (
        SpectralMuon.from_model(model, rules, lr=lr)
        if optimizer == "SpectralMuon"
        else torch.optim.AdamW(model.parameters(), lr=lr)
    )
    enforcer = Enforcer(model, rules)
    enforcer.attach(chosen)
    worst = -1.0
    for _ in range(steps):
        model.weight.grad = -start.clone()
        chosen.step()
        worst = max(worst, enforcer.max_excess())
    return worst


def test_the_coupling_bounds_nothing_after_adamw() -> None:
    """A step of AdamW moves every entry by lr, a matrix of 32 x 32 by up to 32 lr, and the coupling counts one lr."""
    start = torch.full((32, 32), 1.0 / 32.0)
    model, lr = _One(start), 0.02
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(20):
        model.weight.grad = -start.clone()
        optimizer.step()
        with torch.no_grad():
            weight = model.weight.double()
            strength = soft_cap_strength(1.0, 1.0 + lr)
            once = weight - strength * weight @ weight.T @ weight
            model.weight.copy_(once + strength * once @ once.T @ once)
    assert spectral_norms(model.weight)[0] > 1.05
    assert largest_excess(start, "AdamW", lr=lr) <= 0.0


class _LargestSquare(TorchDispatchMode):
    """Remembers the longer side of the largest square matrix that a product makes."""

    def __init__(self) -> None:
        super().__init__()
        self.side = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim >= 2 and result.shape[-1] == result.shape[-2]:
            self.side = max(self.side, result.shape[-1])
        return result


@pytest.mark.parametrize("shape", [(512, 8), (8, 512)], ids=str)
@pytest.mark.parametrize("cap", ["spectral_soft_cap", "spectral_power_cap", "stiefel"])
def test_products_run_on_the_short_side(cap: str, shape: tuple[int, int]) -> None:
    with _LargestSquare() as seen:
        CAPS[cap].function(gaussian(*shape).float(), value=1.0)
    assert seen.side == 8


def test_a_tall_head_stays_within_its_cap_in_bfloat16_products() -> None:
    """The published log ends with the head 6.5 % above its cap."""
    start = with_spectrum(SPECTRA["rank one"](24), 600, 24).float()
    assert largest_excess(start, "SpectralMuon", lr=0.05) <= 0.0
    stack = spectral_soft_cap(1.05 * start, value=1.0, reach=[1.0501], compute_dtype=torch.bfloat16)
    assert spectral_norms(stack)[0] <= 1.0


def _gradients_of(make: Callable[[int, int], Tensor]) -> list[float]:
    layers = [nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(make(*layer.weight.shape))
    torch.manual_seed(0)
    model(torch.rand(20, 12)).square().sum().backward()
    return [float(layer.weight.grad.norm()) for layer in model if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]


def test_a_first_layer_of_zeros_never_learns_where_ours_does() -> None:
    """ReLU has the slope 0 at 0 in torch, and 1/2 in the published code."""
    calls: list[int] = []

    def zero_first(rows: int, columns: int) -> Tensor:
        calls.append(1)
        return torch.zeros(rows, columns) if len(calls) == 1 else orthogonal_weight(rows, columns)

    torch.manual_seed(0)
    assert max(_gradients_of(zero_first)) == 0.0
    assert min(_gradients_of(orthogonal_weight)) > 0.0


def test_fifty_orthogonal_layers_keep_the_signal() -> None:
    """Norms stay where the activation sorts; with independent Gaussians of the same norm they would vanish."""
    torch.manual_seed(0)
    x = ours = gaussian_way = torch.randn(10, 64)
    for _ in range(50):
        ours = (ours @ orthogonal_weight(64, 64).T).unflatten(1, (32, 2)).sort(dim=2).values.flatten(1)
        gaussian_weight = torch.randn(64, 64)
        gaussian_weight = gaussian_weight / torch.linalg.matrix_norm(gaussian_weight, 2)
        gaussian_way = (gaussian_way @ gaussian_weight.T).unflatten(1, (32, 2)).sort(dim=2).values.flatten(1)
    ratio = ours.norm(dim=1) / x.norm(dim=1)
    assert (ratio - 1.0).abs().max() < 1e-3
    assert (gaussian_way.norm(dim=1) / x.norm(dim=1)).max() < 1e-6
