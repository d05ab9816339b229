"""Every layer: the nodes that it states compute its forward, and its bound holds."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import hf_lipschitz.nn
from hf_lipschitz.bounds.engine import bound_program, evaluate_program, rounding_error
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rule import GEOMETRIES, Geometry
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.spectral import spectral_norm_upper
from hf_lipschitz.certify import state_arrays
from hf_lipschitz.evaluation.lower_bounds import lipschitz_lower_estimate
from hf_lipschitz.nn.activation import MaxMin
from hf_lipschitz.nn.attention import BoundedAttention, project_on_ball, softplus
from hf_lipschitz.nn.head import NormalizedLinear
from hf_lipschitz.nn.init import orthogonal_weight, unit_rows
from hf_lipschitz.nn.linear import BatchCentering, LipschitzLinear, LipschitzMap
from hf_lipschitz.nn.module import LipschitzModule, ProgramBuilder, UnknownModuleError
from hf_lipschitz.nn.pixels import PixelNormalization
from tests.nn.cases import LAYERS, Layer

_ALL = [pytest.param(layer, id=layer.name) for layer in LAYERS]


def _program(module: nn.Module, shape: tuple[int, ...]) -> Program:
    builder = ProgramBuilder(module)
    origin = builder.add("input@1", attrs={"shape": list(shape), "space": "model_input"})
    last = builder.apply(module, origin)
    return builder.program(features=last, logits=last)


def _forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def test_every_layer_has_a_row() -> None:
    stated: set[type] = set()
    for info in pkgutil.iter_modules([str(Path(hf_lipschitz.nn.__file__).parent)]):
        module = importlib.import_module(f"hf_lipschitz.nn.{info.name}")
        stated |= {
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, nn.Module) and hasattr(value, "bound_nodes")
        }
    assert stated == {type(layer.make()) for layer in LAYERS}


@pytest.mark.parametrize("layer", _ALL)
def test_the_nodes_compute_the_forward(layer: Layer) -> None:
    for seed in range(3):
        module, x = layer.module(seed), layer.inputs(seed=seed + 10)
        program = _program(module, layer.shape)
        executed = evaluate_program(program, state_arrays(module), BUILT_IN, x.numpy())["features"]
        with torch.no_grad():
            expected = _forward(module.double(), x).numpy()
        assert executed.shape == expected.shape
        assert np.abs(executed - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layer", _ALL)
def test_no_search_exceeds_the_bound(layer: Layer, geometry: Geometry) -> None:
    module = layer.module()
    bound = bound_program(_program(module, layer.shape), state_arrays(module), BUILT_IN, geometry=geometry)
    module = module.double()
    estimate = lipschitz_lower_estimate(
        lambda x: _forward(module, x), layer.inputs(2), norm=geometry, steps=12, restarts=2
    )
    assert 0.0 < estimate.value <= bound.outputs["features"].lipschitz * (1.0 + 1e-12)


@pytest.mark.parametrize("size", [1.0, 10.0, 1e3, 1e6, 1e15])
def test_attention_is_one_lipschitz_whatever_its_scalars_are(size: float) -> None:
    """With weights of norm at most one the whole convex block has a bound of at most one, up to rounding."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        module = BoundedAttention(8, 6, 4)
        with torch.no_grad():
            for layer in (module.query, module.key, module.value, module.output):
                layer.weight.copy_(orthogonal_weight(8, 8))
            for raw in (module.temperature, module.radius, module.residual):
                raw.copy_(size * torch.randn(raw.shape, generator=generator))
        program, weights = _program(module, (6, 8)), state_arrays(module)
        bound = bound_program(program, weights, BUILT_IN)
        assert bound.outputs["features"].lipschitz <= 1.0 + 1e-9
        executed = evaluate_program(program, weights, BUILT_IN, np.ones((1, 6, 8)))["features"]
        assert np.isfinite(executed).all()
        rounding_error(program, weights, BUILT_IN, "float32", bound)


# What gets no nodes


class _OtherForward(LipschitzLinear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3.0 * super().forward(input)


class _OtherHelper(NormalizedLinear):
    def normalized_weight(self) -> torch.Tensor:
        return 3.0 * super().normalized_weight()


class _OtherNodes(LipschitzLinear):
    def bound_nodes(self, builder: ProgramBuilder, x: int) -> int:
        return x


class _Silent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _patched() -> nn.Module:
    module: Any = MaxMin()
    module.forward = lambda x: 3.0 * x
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _OtherForward(4, 4), "_OtherForward.*must define both"),
        (lambda: _OtherHelper(4, 4), "_OtherHelper.*must define both"),
        (lambda: _OtherNodes(4, 4), "_OtherNodes.*must define both"),
        (_Silent, "_Silent.*does not say what it computes"),
        (lambda: nn.Linear(4, 4), "Linear.*does not say what it computes"),
        (lambda: nn.Identity(), "Identity.*does not say"),
        (_patched, "MaxMin.*must define both"),
        (lambda: parametrizations.orthogonal(LipschitzLinear(4, 4)), "LipschitzLinear.*must define both"),
        (lambda: parametrizations.weight_norm(LipschitzLinear(4, 4)), "LipschitzLinear.*must define both"),
        (lambda: LipschitzMap(4, 4, nn.Tanh()), r"activation \(Tanh\) does not say"),
        (lambda: LipschitzMap(4, 4, _patched()), r"activation \(MaxMin\) must define both"),
    ],
)
def test_modules_without_a_statement_of_their_own_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UnknownModuleError, match=message) as caught:
        _program(make(), (4,))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_not_of_the_model_is_refused() -> None:
    module = LipschitzLinear(4, 4)
    builder = ProgramBuilder(nn.Module())
    with pytest.raises(UnknownModuleError, match="no parameter or buffer of the model"):
        builder.apply(module, builder.add("input@1", attrs={"shape": [4], "space": "model_input"}))


def test_a_tensor_stored_under_two_names_is_refused() -> None:
    """Tied weights are stored twice in a state dict: the second name is covered by nothing."""
    pair = nn.Sequential(LipschitzLinear(4, 4), LipschitzLinear(4, 4))
    pair[1].weight = pair[0].weight
    builder = ProgramBuilder(pair)
    x = builder.add("input@1", attrs={"shape": [4], "space": "model_input"})
    for layer in pair:
        x = builder.apply(layer, x)
    with pytest.raises(KernelError, match=r"'1\.weight' is stored but not covered"):
        bound_program(builder.program(features=x, logits=x), state_arrays(pair), BUILT_IN)


def test_protocol() -> None:
    assert isinstance(MaxMin(), LipschitzModule) and not isinstance(nn.Tanh(), LipschitzModule)


# Details of layers


@pytest.mark.parametrize("layer", _ALL)
def test_gradients(layer: Layer) -> None:
    """Analytic gradients are those of finite differences, away from ties."""
    module = layer.module().double()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    x = torch.randn((2, *layer.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.autograd.gradcheck(lambda value: _forward(module, value), x.requires_grad_(True))


def test_maxmin_gradient_at_ties_is_a_permutation() -> None:
    """At a = b the gradient goes to one of the two, so its norm is preserved there too."""
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (gradient,) = torch.autograd.grad(MaxMin()(x), x, upstream)
    assert sorted(gradient.flatten().tolist()) == [1.0, 2.0, 3.0, 4.0]


def test_gradients_at_zero_are_finite() -> None:
    for layer in LAYERS:
        module = layer.module()
        x = torch.zeros((2, *layer.shape), requires_grad=True)
        _forward(module, x).sum().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all(), layer.name


def test_softplus_has_no_jump() -> None:
    x = torch.linspace(-60.0, 60.0, 4001, dtype=torch.float64)
    exact = torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0.0)
    assert (softplus(x) - exact).abs().max() < 1e-14 * 60.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ball_projection(dtype: torch.dtype) -> None:
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [1e-30, 0.0]], dtype=dtype)
    found = project_on_ball(x, 1.0).double()
    assert found.norm(dim=1).max() <= 1.0 + 4.0 * torch.finfo(dtype).eps
    assert torch.equal(found[1:], x[1:].double())


def test_centering_in_training() -> None:
    layer = BatchCentering(3, momentum=0.5)
    x = torch.randn(4, 5, 3) + 2.0
    layer.train()
    y = layer(x)
    assert y.mean(dim=(0, 1)).abs().max() < 1e-6
    assert torch.allclose(layer.running_mean, 0.5 * x.mean(dim=(0, 1)))
    layer.eval()
    assert torch.allclose(layer(x), x - layer.running_mean)


def test_normalization_keeps_the_dtype_and_stores_nothing() -> None:
    layer = PixelNormalization([0.5], [0.25])
    assert not layer.state_dict()
    assert layer(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_head_is_not_autocast() -> None:
    layer = NormalizedLinear(4, 3)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32 and torch.equal(y, layer(x))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (5, 1), (8, 8), (12, 5), (5, 12), (64, 48)])
def test_initial_weights_satisfy_their_constraints(rows: int, columns: int) -> None:
    weight = orthogonal_weight(rows, columns)
    assert weight.shape == (rows, columns) and weight.dtype == torch.float32
    assert spectral_norm_upper(weight.numpy()).value <= 1.0
    assert torch.linalg.svdvals(weight.double()).min() > 1.0 - 1e-5
    head = unit_rows(rows, columns)
    assert head.shape == (rows, columns)
    norms = head.double().norm(dim=1)
    assert norms.max() <= 1.0 and norms.min() > 1.0 - 1e-5
