"""Claim 3 on whole networks: forward passes in float32 and bfloat16 stay within the allowance derived for them."""

from __future__ import annotations

import pytest
import torch

from hf_lipschitz.bounds.check import derive
from hf_lipschitz.bounds.engine import RoundingBound
from hf_lipschitz.bounds.rounding import ARITHMETIC, gamma
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import state_arrays
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from tests.models.cases import FORMS, filled, tiny


def _errors(model: LipViTForImageClassification, dtype: torch.dtype, attention: str) -> tuple[float, float, float]:
    """The largest l2 errors of features and logits over some images, and the largest norm of the computed features."""
    config = model.config
    shape = (6, config.num_channels, config.image_size, config.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    images[0], images[1] = images[0].round(), 0.0
    images = images.to(dtype)  # pixels that the dtype holds: their own rounding is a perturbation of the input
    model.set_attn_implementation(attention)
    with torch.no_grad():
        computed = model.to(dtype)(images), model.lip_vit(images).pooler_output
        exact = model.double()(images.double()), model.lip_vit(images.double()).pooler_output
    features = (computed[1].double() - exact[1]).norm(dim=1).max()
    logits = (computed[0].logits.double() - exact[0].logits).norm(dim=1).max()
    return float(features), float(logits), float(computed[1].double().norm(dim=1).max())


def _allowance(model: LipViTForImageClassification, dtype: str) -> RoundingBound:
    return derive(model.bound_program(), state_arrays(model), BUILT_IN, dtypes=(dtype,)).rounding[dtype]


def _holds(model: LipViTForImageClassification, dtype: torch.dtype, attention: str = "sdpa") -> None:
    allowed = _allowance(model, str(dtype).removeprefix("torch."))
    features, logits, norm = _errors(model, dtype, attention)
    assert 0.0 < features <= allowed.features_error
    assert 0.0 < logits <= allowed.logits_error
    assert norm <= allowed.features_norm


@pytest.mark.parametrize("form", FORMS)
def test_float32(form: str) -> None:
    _holds(filled(LipViTConfig(**FORMS[form])), torch.float32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("attention", "hybrid"))][::3])
def test_bfloat16(form: str, attention: str) -> None:
    """Far looser than in float32."""
    model = filled(LipViTConfig(**{**FORMS[form], "image_mean": [0.5, 0.5], "image_std": [1.0, 1.0]}))
    _holds(model.to(torch.bfloat16), torch.bfloat16, attention)


def test_an_allowance_in_the_wrong_unit_would_be_found() -> None:
    """Bounds add the worst of every operation, but what happens is not smaller by more than a factor of a thousand."""
    torch.manual_seed(0)
    model = LipViTForImageClassification(tiny()).eval()
    allowed = _allowance(model, "float32")
    features, logits, _ = _errors(model, torch.float32, "eager")
    assert features > allowed.features_error / 1000.0 and logits > allowed.logits_error / 1000.0


def test_wide_layers_have_an_allowance_in_bfloat16() -> None:
    """Products are accumulated in float32; with sums of 256 terms in bfloat16 itself nothing could be said."""
    model = filled(tiny(stages=[{"depth": 1, "width": 256}], image_mean=[0.5, 0.5], image_std=[1.0, 1.0]))
    _holds(model.to(torch.bfloat16), torch.bfloat16)
    assert gamma(256, 2.0**-8) == float("inf") > ARITHMETIC["bfloat16"].dot(256)


def test_float64_is_far_more_exact() -> None:
    model = filled(tiny())
    assert _allowance(model, "float64").logits_error < 1e-8 * _allowance(model, "float32").logits_error
