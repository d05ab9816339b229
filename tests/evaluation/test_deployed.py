"""Deployed claims: no forward pass in the dtype, at any image of the ball, strays further than is subtracted."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lipschitz.certify import certify, state_arrays
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation import deployed
from hf_lipschitz.evaluation.certified import evaluate_certified
from hf_lipschitz.evaluation.deployed import DEPLOYMENTS, DeployedErrors, deployment_of
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.nn.products import products_in
from tests.models.cases import FORMS, filled, tiny

_SOME = list(FORMS)[::4]
_TORCH = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def _model(form: str = _SOME[0], dtype: str = "float32") -> LipViTForImageClassification:
    """A model with filled weights that the dtype holds exactly, in float32."""
    config = {**FORMS[form], "image_mean": [0.5, 0.5], "image_std": [1.0, 1.0]}
    model = filled(LipViTConfig(**config)).eval()
    return model.to(_TORCH[dtype]).float()


def _images(model: LipViTForImageClassification, count: int = 4) -> Tensor:
    """Images with few bits, so that every dtype holds them."""
    shape = (count, model.config.num_channels, model.config.image_size, model.config.image_size)
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)) / 8.0


def _run(model: LipViTForImageClassification, images: Tensor, claim: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of the deployed forward pass that a claim speaks of."""
    dtype = _TORCH[DEPLOYMENTS[claim].dtype]
    with torch.no_grad(), products_in(torch.float64) if "+" in claim else nullcontext():
        model = model.to(dtype)
        out = model.lip_vit(images.to(dtype)).pooler_output, model(images.to(dtype)).logits
    model.float()
    return tuple(each.double().numpy() for each in out)


def _near(images: Tensor, radius: float) -> Tensor:
    """Images of the ball: along random signs, with few bits, so that every dtype holds them."""
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    step = 2.0 ** np.floor(np.log2(radius / np.sqrt(images[0].numel())))
    return (images + signs * step).clamp(0.0, 1.0)


@pytest.mark.parametrize("claim", DEPLOYMENTS)
@pytest.mark.parametrize("form", _SOME)
def test_no_deployed_forward_strays_further(form: str, claim: str) -> None:
    """At the image itself and at others of its ball, against a float64 forward of the same weights."""
    model = _model(form, "bfloat16" if claim == "bfloat16" else "float32")
    images, radius = _images(model), 0.5
    bounds = DeployedErrors(certify(model), state_arrays(model), DEPLOYMENTS[claim])
    errors, norms = bounds.features(images.double().numpy(), np.full(len(images), radius))
    for inputs in (images, _near(images, radius)):
        assert float((inputs - images).flatten(1).norm(dim=1).max()) <= radius
        computed, exact = _run(model, inputs, claim)[0], _run(model, inputs, "float64")[0]
        assert np.all(np.linalg.norm(computed - exact, axis=1) <= errors + 1e-12)
        assert np.all(np.linalg.norm(computed, axis=1) <= norms)
    assert np.all(np.isfinite(errors))


def test_each_way_of_computing_has_its_own_allowance() -> None:
    """float64 << float32 with float64 products << float32 << the bound over the whole domain."""
    model = _model()
    images, certificate, weights = _images(model).double().numpy(), certify(model), state_arrays(model)
    found = {
        claim: DeployedErrors(certificate, weights, DEPLOYMENTS[claim]).features(images, np.full(len(images), 0.1))[0]
        for claim in ("float64", "float32+float64", "float32")
    }
    domain = certificate.rounding["float32"].features_error
    assert np.all(found["float64"] < 1e-6 * found["float32+float64"])
    assert np.all(found["float32+float64"] < found["float32"]) and np.all(found["float32"] < domain)


def test_float64_products_are_what_the_allowance_says() -> None:
    """The float32 forward alone would break the allowance of float64 products on weights that cancel."""
    model = LipViTForImageClassification(tiny()).eval()
    with torch.no_grad():
        linear = model.lip_vit.embeddings.projection.linear
        width = linear.weight.shape[1]
        row = torch.cat([torch.full((width // 2,), 4097.0), torch.full((width - width // 2,), -4095.0)])
        linear.weight.copy_(row.expand_as(linear.weight) / row.norm())
    images = torch.ones(1, model.config.num_channels, model.config.image_size, model.config.image_size) * 0.7
    certificate, weights = certify(model), state_arrays(model)
    errors, _ = DeployedErrors(certificate, weights, DEPLOYMENTS["float32+float64"]).features(
        images.double().numpy(), np.zeros(1)
    )
    exact = _run(model, images, "float64")[0]
    assert np.linalg.norm(_run(model, images, "float32+float64")[0] - exact) <= errors[0]


@pytest.mark.parametrize("claim", DEPLOYMENTS)
def test_the_deployed_prediction_stays(claim: str) -> None:
    """Radii of a deployed forward are smaller than the exact network's, and its predictions hold inside them."""
    model = _model(dtype="bfloat16" if claim == "bfloat16" else "float32")
    images = _images(model, 24)
    labels, certificate = torch.zeros(24, dtype=torch.int64), certify(model)
    exact = evaluate_certified(model, images, labels, certificate=certificate)
    result = evaluate_certified(model, images, labels, certificate=certificate, claim=claim)
    assert result.claim == f"deployed in {DEPLOYMENTS[claim].name}"
    assert result.deployed_error is not None and result.as_dict()["deployed_error"] == repr(result.deployed_error)
    assert np.all(result.radii <= exact.radii) and np.any(result.radii < exact.radii)
    assert np.any(result.radii > 0.0) or claim == "bfloat16"
    for i in np.flatnonzero(result.radii > 0.0):
        for inputs in (images[i : i + 1], _near(images[i : i + 1], float(min(result.radii[i], 1.0)))):
            assert _run(model, inputs, claim)[1].argmax() == result.predictions[i]


@pytest.mark.parametrize("part", ["gamma", "moved", "row"])
def test_a_dropped_term_would_be_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins are compared with a direct evaluation of the formula: head rounding, features' error, row error."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((3, 4)).astype(np.float32).astype(float), rng.standard_normal(3)
    arithmetic = DEPLOYMENTS["float32"].arithmetic
    pairs = np.array([[0.0, 1.5, 0.7]])
    errors, norms = np.array([0.1]), np.array([2.0])
    total = deployed.deployed_margin_errors(errors, norms, (weight, bias, True), pairs, arithmetic)[0]
    dot, row = arithmetic.dot(5), arithmetic.total(4) + 8 * 2.0**-24
    terms = {"gamma": 2.0 * dot * (2.0 + np.abs(bias).max()), "moved": 0.1 * pairs[0], "row": 2.0 * row * 2.0}
    assert np.all(total >= sum(terms.values()))
    assert np.any(total < (sum(terms.values()) + 1e-9 + 0.5 * np.max(terms[part])))


def test_a_claim_for_other_weights_is_refused() -> None:
    model = _model()
    with pytest.raises(UserError, match=r"not exact in bfloat16: certify the copy .*--cast bfloat16"):
        DeployedErrors(certify(model), state_arrays(model), DEPLOYMENTS["bfloat16"])
    with pytest.raises(UserError, match="no claim is named 'float8'"):
        deployment_of("float8")


def test_rows_that_overflow_in_the_dtype_have_no_margin() -> None:
    huge = np.full((2, 3), 2.0**100)
    head = (huge, np.zeros(2), True)
    found = deployed.deployed_margin_errors(
        np.zeros(1), np.ones(1), head, np.ones((1, 2)), DEPLOYMENTS["float32"].arithmetic
    )
    assert np.all(np.isinf(found))
