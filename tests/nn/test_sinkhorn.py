"""Sinkhorn attention: its scaling in every dtype and mode, and that its divisor is a bound whatever its scalars are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_lipschitz.bounds.engine import bound_program, evaluate_program, rounding_error
from hf_lipschitz.bounds.rounding import Enclosure
from hf_lipschitz.bounds.rule import Call, NormTable
from hf_lipschitz.bounds.rules.attention_sinkhorn import _rest, _steepest
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import state_arrays
from hf_lipschitz.evaluation.deployed import DEPLOYMENTS
from hf_lipschitz.nn.attention import BoundedAttention, softplus
from hf_lipschitz.nn.init import orthogonal_weight
from hf_lipschitz.nn.module import ProgramBuilder
from hf_lipschitz.nn.sinkhorn import SinkhornAttention, sinkhorn


def _scores(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _module(size: float, seed: int = 0) -> SinkhornAttention:
    generator = torch.Generator().manual_seed(seed)
    module = SinkhornAttention(8, 6, 4)
    with torch.no_grad():
        for layer in (module.query, module.key, module.value, module.output):
            layer.weight.copy_(orthogonal_weight(8, 8))
        for raw in (module.temperature, module.radius, module.residual):
            raw.copy_(size * torch.randn(raw.shape, generator=generator))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_and_columns_sum_to_one(dtype: torch.dtype) -> None:
    weights = sinkhorn(_scores(2, 3, 7, 7).to(dtype), 64, until_close=True)
    assert weights.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    for axis in (-1, -2):
        assert (weights.sum(dim=axis) - 1.0).abs().max() <= 64.0 * torch.finfo(weights.dtype).eps


def test_an_early_end_is_the_limit() -> None:
    """Ending at close column sums gives what many more rounds give."""
    scores = _scores(3, 5, 5)
    assert (sinkhorn(scores, 200, until_close=True) - sinkhorn(scores, 400)).abs().max() < 1e-13


def test_training_takes_a_fixed_number_of_rounds() -> None:
    module, x = _module(1.0), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    trained, evaluated = module.train()(x)[1], module.eval()(x)[1]
    assert (trained.sum(dim=-1) - 1.0).abs().max() < 1e-5 and 0.0 < (trained - evaluated).abs().max() < 0.05


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_extreme_scores_stay_finite(scale: float) -> None:
    scores = _scores(2, 6, 6, scale=scale).float().requires_grad_()
    weights = sinkhorn(scores, 64, until_close=True)
    weights.square().sum().backward()
    assert torch.isfinite(weights).all() and scores.grad is not None and torch.isfinite(scores.grad).all()


def test_autocast_leaves_the_scaling_in_float32() -> None:
    module, x = _module(1.0).eval(), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        mixed, weights = module(x)
    assert torch.isfinite(mixed).all() and (weights.float().sum(dim=-2) - 1.0).abs().max() < 0.03


@pytest.mark.parametrize("size", [1.0, 10.0, 1e3, 1e6, 1e15])
def test_one_lipschitz_whatever_its_scalars_are(size: float) -> None:
    """With weights of norm at most one the whole convex block has a bound of at most one, up to rounding."""
    for seed in range(5):
        module = _module(size, seed)
        builder = ProgramBuilder(module)
        last = builder.apply(module, builder.add("input@1", attrs={"shape": [6, 8], "space": "model_input"}))
        program, weights = builder.program(features=last, logits=last), state_arrays(module)
        bound = bound_program(program, weights, BUILT_IN)
        assert bound.outputs["features"].lipschitz <= 1.0 + 1e-9
        executed = evaluate_program(program, weights, BUILT_IN, np.ones((1, 6, 8)))["features"]
        assert np.isfinite(executed).all()
        for dtype in ("float32", "bfloat16"):
            rounding_error(program, weights, BUILT_IN, dtype, bound)


def test_the_divisor_is_at_least_psi_and_close() -> None:
    module = SinkhornAttention(4, 3, 2)
    ratios: list[float] = []
    for raw_tau in np.linspace(-6.0, 6.0, 25):
        for raw_radius in np.linspace(-6.0, 6.0, 25):
            tau, radius = (softplus(torch.tensor([raw], dtype=torch.float64)) for raw in (raw_tau, raw_radius))
            psi = _steepest(1.0, 2.0 * float(tau * radius), _rest(float(tau)))
            ratios.append(float(module._bound(tau, radius)) / psi)
    assert min(ratios) >= 1.0 - 1e-12 and max(ratios) < 1.3


def test_it_costs_less_than_softmax() -> None:
    """At the initial scalars and 64 tokens the divisor is less than half of that of softmax attention."""
    tau = radius = softplus(torch.full((4,), 0.5, dtype=torch.float64))
    assert SinkhornAttention(8, 64, 4)._bound(tau, radius) < 0.5 * BoundedAttention(8, 64, 4)._bound(tau, radius)


@pytest.mark.parametrize("claim", ["float32", "float32+float64"])
@pytest.mark.parametrize(("tokens", "tau"), [(2, 0.5), (2, 0.64), (2, 1.0), (3, 1.0), (4, 1.0)])
def test_scaling_in_float32_strays_no_further_than_the_rule_says(tokens: int, tau: float, claim: str) -> None:
    """Also with float64 products, which the scaling does not use: it ends at 32 epsilons of float32."""
    arithmetic = DEPLOYMENTS[claim].arithmetic
    tensors = {slot: np.eye(1) for slot in ("query", "key", "value")}
    scalars = {slot: Enclosure.exactly(tau) for slot in ("temperature", "radius")}
    call = Call(
        *(1, {"heads": 1, "iterations": 64}, ((tokens, 1),), tensors, {}, scalars, NormTable()),
        *({"temperature": 0.0, "radius": 0.0}, arithmetic),
    )
    allowed = BUILT_IN["sinkhorn_attention@1"]._weight_error(call, tau, 2.0**-24)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(1500):
        scores = (tau * (2.0 * torch.rand(1, tokens, tokens, generator=generator) - 1.0)).float()
        computed = sinkhorn(scores, 64, until_close=True).double()
        exact = sinkhorn(scores.double(), 3000, until_close=True)
        worst = max(worst, float((computed - exact).abs().sum(dim=-1).max()))
    assert allowed / 40.0 < worst <= allowed
