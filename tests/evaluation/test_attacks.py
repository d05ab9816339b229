"""The attack crosses a linear model's boundary just outside the radius, never inside, and never leaves its ball."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.attacks import attack_control, pgd_attack
from hf_lipschitz.evaluation.ball import distance_up, project
from hf_lipschitz.evaluation.certified import evaluate_certified

DTYPES = (torch.float32, torch.float64)


def certified(model: nn.Module, images: Tensor, certificate) -> tuple[np.ndarray, np.ndarray]:
    """Radii and predictions."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    result = evaluate_certified(model, images, labels, certificate=certificate())
    return result.radii, result.predictions


def squared_distance(a: Tensor, b: Tensor) -> Fraction:
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    return sum(((Fraction(x) - Fraction(y)) ** 2 for x, y in pairs), Fraction(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_model_flips_just_outside_the_radius_and_never_inside(dtype, toy, images, certificate) -> None:
    model = toy()
    radii, predictions = certified(model, images, certificate)
    model = model.to(dtype)
    inside = pgd_attack(model, images, radii, predictions=predictions)
    assert not inside.changed.any() and inside.attacked.all() and np.all(inside.worst_margin > -1e-6)
    outside = pgd_attack(model, images, radii * 1.0001, predictions=predictions, inside=0.0, slack=0.0)
    assert outside.changed.all() if dtype == torch.float64 else outside.changed.mean() > 0.9
    for result, limit in ((inside, radii), (outside, radii * 1.0001)):
        assert result.adversarial.dtype == dtype and result.dtype == str(dtype)[6:]
        for i in range(len(images)):  # in exact arithmetic
            assert squared_distance(result.adversarial[i], images[i]) <= Fraction(float(limit[i])) ** 2
            assert squared_distance(result.adversarial[i], images[i]) <= Fraction(float(result.distance[i])) ** 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_certified_radii_of_a_nonlinear_model_hold_and_the_control_shows_the_attack_works(
    dtype, toy, images, certificate
) -> None:
    model = toy(maxmin=True)
    radii, predictions = certified(model, images, certificate)
    model = model.to(dtype)
    assert not pgd_attack(model, images, radii, predictions=predictions).changed.any()
    control = attack_control(model, images, radii, predictions=predictions, factor=20.0)
    assert control.changed.mean() > 0.9
    assert json.loads(json.dumps(control.as_dict()))["changed"] == int(control.changed.sum())


def test_planted_mistakes_are_caught(toy, images, certificate) -> None:
    """A bound 2 % too low, and the largest instead of the smallest limit over the rivals."""
    model = toy(maxmin=True)
    _, predictions = certified(model, images, certificate)
    low = evaluate_certified(model, images, predictions, certificate=certificate(value=0.98)).radii
    assert pgd_attack(model, images, low, predictions=predictions).changed.mean() > 0.1
    exact = model.double()
    with torch.no_grad():
        logits, rows = exact(images.double()).logits, exact.classifier.normalized_weight()
    top = logits.argmax(dim=1)
    gaps = (logits.gather(1, top[:, None]) - logits) / (torch.cdist(rows, rows)[top] + 1e-30)
    largest = gaps.scatter(1, top[:, None], -math.inf).amax(dim=1).numpy()
    assert pgd_attack(model, images, largest, predictions=predictions).changed.all()


def test_images_with_radius_zero_are_left_alone(toy, images) -> None:
    radii = np.where(np.arange(len(images)) % 2, 0.0, 5.0)
    result = pgd_attack(toy(), images, radii, steps=10, restarts=1)
    assert np.array_equal(result.attacked, radii > 0) and not result.changed[radii == 0].any()
    assert (
        torch.equal(result.adversarial[1], images[1]) and np.isnan(result.worst_margin[1]) and result.distance[1] == 0
    )
    nothing = pgd_attack(toy(), images, np.zeros(len(images)))
    assert nothing.as_dict()["attacked"] == 0 and not nothing.changed.any()


def test_infinite_radii_are_cut_to_the_cube(toy, images) -> None:
    result = pgd_attack(toy(), images, np.full(len(images), np.inf), steps=10, restarts=1)
    assert np.all(result.distance <= 4.0) and np.all(result.distance > 1.0)


def test_predictions_that_the_model_does_not_make_count_as_changed(toy, images) -> None:
    model = toy()
    with torch.no_grad():
        predicted = model(images).logits.argmax(dim=1).numpy()
    radii = np.full(len(images), 1e-9)
    result = pgd_attack(model, images, radii, predictions=(predicted + 1) % 5, steps=1, restarts=1, slack=0.0)
    assert result.changed.all()
    asked = pgd_attack(model, images, radii, predictions=np.full(len(images), -1), steps=1, slack=0.0)
    assert not asked.changed.any()


def test_logits_that_are_not_finite_count_as_changed(toy, images) -> None:
    model = toy()
    with torch.no_grad():
        model.classifier.bias[1] = math.nan
    assert pgd_attack(model, images, np.full(len(images), 0.1), steps=2, restarts=1).changed.all()


def test_clipping_keeps_pixels_in_range_and_the_default_is_stronger(toy, images) -> None:
    model, radii = toy(maxmin=True), np.full(len(images), 0.5)
    free = pgd_attack(model, images, radii, steps=20)
    clipped = pgd_attack(model, images, radii, steps=20, clip=(0.0, 1.0))
    assert clipped.adversarial.min() >= 0.0 and clipped.adversarial.max() <= 1.0
    assert free.adversarial.min() < 0.0 and np.all(clipped.distance <= 0.5)
    assert free.worst_margin.mean() < clipped.worst_margin.mean()


def test_same_seed_same_result_and_modes_are_restored(toy, images) -> None:
    model, radii = toy(maxmin=True).train(), np.full(len(images), 0.2)
    model.base_model.first.eval()
    first, second = (pgd_attack(model, images, radii, steps=5, batch_size=17) for _ in range(2))
    assert torch.equal(first.adversarial, second.adversarial)
    assert model.training and not model.base_model.first.training
    assert all(parameter.grad is None for parameter in model.parameters())


class Constant(nn.Module):
    """Logits whose gradient is zero wherever it is defined."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.bias + 0.0 * pixel_values.flatten(1).sum(dim=1, keepdim=True)


def test_flat_models_and_plain_tensor_outputs(images) -> None:
    result = pgd_attack(Constant(), images, np.full(len(images), 1.0), steps=3, restarts=2)
    assert not result.changed.any() and np.all(result.worst_margin == 1.0)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(-12, 3),
    st.floats(-3, 3),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_projection_is_inside_in_exact_arithmetic(seed: int, size: float, overshoot: float, dtype, clip: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 2, 5, generator=generator).to(dtype)
    limit = torch.rand(3, generator=generator, dtype=torch.float64) * 10.0**size
    step = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) * 10.0 ** (size + overshoot)
    result = project(image, image.double() + step, limit, (0.0, 1.0) if clip else None)
    for i in range(3):
        square = squared_distance(result[i], image[i])
        assert square <= Fraction(float(limit[i])) ** 2
        assert square <= Fraction(float(distance_up(image, result)[i])) ** 2
    if clip:
        assert result.min() >= 0.0 and result.max() <= 1.0


def test_projection_wastes_nothing_and_survives_nonsense() -> None:
    image = torch.rand(4, 50, dtype=torch.float64)
    limit = torch.tensor([0.5, 0.5, 0.5, 0.0], dtype=torch.float64)
    candidate = image + torch.randn(4, 50, dtype=torch.float64) * 10
    candidate[2] = math.nan
    result = project(image, candidate, limit)
    reached = distance_up(image, result)
    assert (
        torch.all(reached[:2] > 0.5 * (1 - 1e-9)) and torch.equal(result[2:], image[2:]) and torch.all(reached[2:] == 0)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radii": np.ones(3)}, "one an image"),
        ({"radii": np.full(60, -1.0)}, "at least 0"),
        ({"radii": np.full(60, np.nan)}, "at least 0"),
        ({"steps": 0}, "at least 1"),
        ({"restarts": 0}, "at least 1"),
        ({"predictions": [0]}, "predictions"),
        ({"clip": (0.2, 1.0)}, "clip"),
    ],
)
def test_bad_arguments_get_one_sentence(options: dict, words: str, toy, images) -> None:
    with pytest.raises(UserError, match=words):
        pgd_attack(toy(), images, **({"radii": np.ones(60)} | options))


def test_dtypes_that_move_the_images_are_refused(toy, images) -> None:
    with pytest.raises(UserError, match="float32 or float64"):
        pgd_attack(toy().bfloat16(), images, np.ones(60))
    with pytest.raises(UserError, match="exactly"):
        pgd_attack(toy(), images.double() / 3, np.ones(60))
