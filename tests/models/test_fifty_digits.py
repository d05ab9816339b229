"""Forward passes in float64, float32 and bfloat16 against 50 digits, on weights that make them differ most."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.certify import certify, state_arrays
from hf_lipschitz.evaluation.deployed import DEPLOYMENTS, DeployedErrors
from hf_lipschitz.models.lip_vit.configuration_lip_vit import TOKEN_MIXERS, LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.nn.products import products_in
from tests.models.cases import FORMS, filled
from tests.models.fifty_digits import evaluate

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
_RADIUS = 0.25


def _cancelling(weight: Tensor) -> Tensor:
    """Columns in pairs of opposite sign that nearly cancel, far larger than what remains."""
    half = weight[..., : weight.shape[-1] // 2] * 64.0
    rest = weight[..., 2 * half.shape[-1] :]
    return torch.cat([half, -half * (1.0 + 2.0**-6), rest], dim=-1)


def _sorted(weight: Tensor) -> Tensor:
    """Each row from its largest entry to its smallest, all of one sign: small terms are lost in a large sum."""
    magnitudes = torch.logspace(3, -3, weight.shape[-1], dtype=weight.dtype)
    return magnitudes * weight.abs().mean()


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda weight: weight,
    "cancelling": _cancelling,
    "sorted": lambda weight: _sorted(weight).expand_as(weight),
    "reversed": lambda weight: _sorted(weight).flip(-1).expand_as(weight),
}
_FORMS = {mixer: next(form for form in FORMS if form.startswith(mixer)) for mixer in TOKEN_MIXERS}
_FORMS["sinkhorn"] = "attention sinkhorn plain"


def _model(form: str, kind: str) -> LipViTForImageClassification:
    """Weights of one kind, exact in bfloat16, in float32."""
    model = filled(LipViTConfig(**{**FORMS[form], "image_mean": [0.5, 0.5], "image_std": [1.0, 1.0]}))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("weight") and tensor.ndim == 2:
                tensor.copy_(WEIGHTS[kind](tensor))
    return model.to(torch.bfloat16).float()


def _images(model: LipViTForImageClassification) -> Tensor:
    """Two images that every dtype holds, and two inside their balls, where an attack led."""
    shape = (2, model.config.num_channels, model.config.image_size, model.config.image_size)
    images = (torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)) / 8.0).double()
    exact = model.double()
    moved = images.clone().requires_grad_()
    logits = exact(moved).logits
    top, second = logits.topk(2, dim=1).values.unbind(1)
    (slope,) = torch.autograd.grad((top - second).sum(), moved)
    model.float()
    step = _RADIUS / slope[0].numel() ** 0.5
    attacked = (images - 2.0 ** np.floor(np.log2(step)) * slope.sign()).clamp(0.0, 1.0).detach()
    return torch.cat([images, attacked])


def _forward(model: LipViTForImageClassification, images: Tensor, claim: str) -> tuple[Array, Array]:
    dtype = _DTYPES[DEPLOYMENTS[claim].dtype]
    wide = torch.float64 if "+" in claim else dtype
    with torch.no_grad(), products_in(wide):
        deployed = model.to(dtype)
        features, logits = deployed.lip_vit(images.to(dtype)).pooler_output, deployed(images.to(dtype)).logits
    model.float()
    return features.double().numpy(), logits.double().numpy()


def _distance(computed: Array, exact: Array) -> list[float]:
    """The l2 distance of each row, rounded up."""
    with mpmath.workdps(50):
        return [
            float(mpmath.sqrt(sum((mpmath.mpf(float(a)) - b) ** 2 for a, b in zip(row, true, strict=True))))
            * (1 + 1e-15)
            for row, true in zip(computed, exact, strict=True)
        ]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("mixer", [pytest.param(mixer, marks=pytest.mark.slow_ci) for mixer in _FORMS])
def test_no_forward_differs_by_more_than_its_allowance(mixer: str, kind: str) -> None:
    """Over the whole domain (the certificate's figure), and image by image (that of a deployed claim)."""
    model = _model(_FORMS[mixer], kind)
    images = _images(model)
    certificate, weights = certify(model), state_arrays(model)
    exact = evaluate(certificate.program, weights, images.numpy())
    for claim, deployment in DEPLOYMENTS.items():
        features, logits = (
            _distance(got, exact[name]) for got, name in zip(_forward(model, images, claim), exact, strict=True)
        )
        stated = certificate.rounding.get(deployment.dtype)
        if stated is not None:
            assert max(features) <= stated.features_error and max(logits) <= stated.logits_error
        near, _ = DeployedErrors(certificate, weights, deployment).features(images[:2].numpy(), np.full(2, _RADIUS))
        assert np.all(np.reshape(features, (2, 2)) <= near), (claim, features, near)


def test_fifty_digits_are_the_program() -> None:
    """The evaluation in 50 digits agrees with the kernel's own in float64 to what float64 allows."""
    from hf_lipschitz.bounds.engine import evaluate_program
    from hf_lipschitz.bounds.rules.table import BUILT_IN

    model = _model(_FORMS["hybrid"], "random")
    images = _images(model)[:1].numpy()
    program, weights = model.bound_program(), state_arrays(model)
    ours, exact = evaluate_program(program, weights, BUILT_IN, images), evaluate(program, weights, images)
    for name, value in ours.items():
        assert max(_distance(value, exact[name])) < 1e-12 * max(1.0, float(np.abs(value).max()))
