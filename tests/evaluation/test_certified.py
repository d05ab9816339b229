"""`evaluate_certified` against closed forms, and every kind of bad input with the sentence that it gets."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.certified import certified_accuracy, certified_radius, evaluate_certified
from hf_lipschitz.evaluation.radii import pair_norms

EPSILONS = (0.0, 36 / 255, 1.0)


def labels_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the model predicts, with every fifth label wrong."""
    with torch.no_grad():
        labels = model.double()(images.double()).logits.argmax(dim=1)
    model.float()
    labels[::5] = (labels[::5] + 1) % model.classifier.out_features
    return labels


def test_radii_of_a_linear_model_are_its_distances_to_the_boundary(toy, images, certificate) -> None:
    """For orthogonal features without activation the radius is exact up to the certificate's 1e-6 and the rounding."""
    model = toy()
    labels = labels_of(model, images)
    result = evaluate_certified(model, images, labels, certificate=certificate(), radii=EPSILONS, batch_size=7)
    exact = toy().double()
    matrix = exact.classifier.normalized_weight() @ exact.base_model.second.weight @ exact.base_model.first.weight
    with torch.no_grad():
        logits = exact(images.double()).logits.numpy()
    matrix = matrix.detach().numpy()
    for i, row in enumerate(logits):
        top = int(row.argmax())
        distance = min(
            (row[top] - row[j]) / np.linalg.norm(matrix[top] - matrix[j]) for j in range(len(row)) if j != top
        )
        assert distance * (1 - 3e-6) - 1e-10 <= result.radii[i] <= distance
    assert np.array_equal(result.predictions, logits.argmax(axis=1))
    assert result.clean_accuracy == 0.8 and result.claim == "exact network"
    correct = result.predictions == labels.numpy()
    assert result.certified == {e: certified_accuracy(result.radii, correct, e) for e in EPSILONS}
    assert result.certified[0.0] >= result.certified[36 / 255] >= result.certified[1.0]
    assert result.mean_radius == pytest.approx(np.where(correct, result.radii, 0).mean())
    written = json.loads(json.dumps(result.as_dict()))
    assert written["certified"][repr(36 / 255)] == result.certified[36 / 255] and written["images"] == len(images)


def test_model_is_left_as_it_was(toy, images, certificate) -> None:
    model = toy()
    labels = torch.zeros(len(images), dtype=torch.int64)
    evaluated = evaluate_certified(model, images, labels, certificate=certificate())
    model.base_model.first = nn.Sequential(model.base_model.first, nn.Dropout(0.5))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = evaluate_certified(model, images, labels, certificate=certificate())
    assert np.array_equal(trained.radii, evaluated.radii)  # in evaluation mode, without dropout
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32


def test_batches_autocast_and_progress_change_nothing(toy, images, certificate, capsys) -> None:
    model, labels = toy(maxmin=True), torch.zeros(len(images), dtype=torch.int64)
    whole = evaluate_certified(model, images, labels, certificate=certificate())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = evaluate_certified(model, images, labels, certificate=certificate(), batch_size=13, progress=True)
    assert np.allclose(whole.radii, parts.radii, rtol=1e-9, atol=1e-12)
    assert "certify" in capsys.readouterr().err


def test_bytes_are_divided_in_float32(toy, certificate) -> None:
    pixels = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(9, dtype=torch.int64)
    bytes_ = evaluate_certified(toy(), pixels, labels, certificate=certificate())
    floats = evaluate_certified(toy(), pixels.float() / 255.0, labels, certificate=certificate())
    assert np.array_equal(bytes_.radii, floats.radii)


def test_a_larger_bound_or_error_makes_every_radius_smaller(toy, images, certificate) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    plain, bound, error = (
        evaluate_certified(toy(), images, labels, certificate=c).radii
        for c in (certificate(), certificate(value=2.0), certificate(features_error=1e-4))
    )
    assert np.allclose(bound, plain / 2, rtol=1e-4) and np.all(bound < plain)
    assert np.all(error <= plain) and np.all(error[plain > 1e-3] < plain[plain > 1e-3])


def test_a_plain_linear_head_is_known_too(toy, images, certificate) -> None:
    model = toy()
    head = nn.Linear(16, 5)
    model.classifier = head
    result = evaluate_certified(model, images, torch.zeros(len(images), dtype=torch.int64), certificate=certificate())
    features = model.double().base_model(images.double()).pooler_output
    logits = model.classifier(features).detach().numpy()
    expected = certified_radius(logits, pair_norms(head.weight.detach().numpy(), normalize=False), 1.0 + 1e-6)
    assert np.allclose(result.radii, expected, rtol=1e-6, atol=1e-10)


def test_equal_rows_make_infinite_radii(toy, images, certificate) -> None:
    model = toy(classes=2)
    with torch.no_grad():
        model.classifier.weight[1] = model.classifier.weight[0]
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    result = evaluate_certified(model, images, torch.zeros(len(images), dtype=torch.int64), certificate=certificate())
    assert np.all(np.isinf(result.radii)) and result.certified[1.0] == 1.0
    assert result.as_dict()["mean_radius"] is None


def test_broken_features_certify_nothing_and_are_wrong(toy, images, certificate) -> None:
    model = toy()
    with torch.no_grad():
        model.base_model.first.weight[0, 0] = math.nan
    result = evaluate_certified(model, images, torch.zeros(len(images), dtype=torch.int64), certificate=certificate())
    assert np.all(result.radii == 0.0) and np.all(result.predictions == -1)
    assert result.clean_accuracy == 0.0 and result.certified[0.0] == 0.0


def nan_pixel(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[3, 0, 1, 1] = math.nan
    return images


BAD_INPUT = {
    "pixels below 0": (lambda x, y: (x - 0.5, y), {}, "pixels in [0, 1]"),
    "pixels above 1": (lambda x, y: (x * 255, y), {}, "pixels in [0, 1]"),
    "a hair above 1": (lambda x, y: (x.clamp(max=0.9) + 0.1000001, y), {}, "pixels in [0, 1]"),
    "NaN pixels": (lambda x, y: (nan_pixel(x), y), {}, "NaN pixels"),
    "integer pixels": (lambda x, y: (x.to(torch.int64), y), {}, "uint8"),
    "one image without batch": (lambda x, y: (x[0], y), {}, "shape"),
    "no images": (lambda x, y: (x[:0], y[:0]), {}, "shape"),
    "no labels": (lambda x, y: (x, None), {}, "without labels"),
    "too few labels": (lambda x, y: (x, y[:-1]), {}, "one label an image"),
    "labels beyond the classes": (lambda x, y: (x, y + 5), {}, "classes 0 to 4"),
    "negative labels": (lambda x, y: (x, y - 6), {}, "classes 0 to 4"),
    "fractional labels": (lambda x, y: (x, y.double()), {}, "integers"),
    "negative radius": (lambda x, y: (x, y), {"radii": (-0.1,)}, "radius -0.1"),
    "radius NaN": (lambda x, y: (x, y), {"radii": (math.nan,)}, "radius nan"),
    "no batch": (lambda x, y: (x, y), {"batch_size": 0}, "batch_size"),
    "no certificate": (lambda x, y: (x, y), {"certificate": None}, "no certificate"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_sentence(name: str, toy, images, certificate) -> None:
    change, options, words = BAD_INPUT[name]
    pixels, labels = change(images, torch.zeros(len(images), dtype=torch.int64))
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        evaluate_certified(toy(), pixels, labels, **({"certificate": certificate()} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "token_max"}, "l2"),
        ({"origin": "model_input"}, "pixels"),
        ({"features_error": None}, "float64"),
    ],
)
def test_certificates_of_something_else_are_refused(options: dict, words: str, toy, images, certificate) -> None:
    with pytest.raises(UserError, match=words):
        evaluate_certified(toy(), images, [0] * len(images), certificate=certificate(**options))


class OtherHead(nn.Module):
    """Divides its rows by norm + eps: not what the radii assume."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.randn(5, 16)), nn.Parameter(torch.zeros(5)), 1e-6

    def normalized_weight(self) -> torch.Tensor:
        return self.weight / (self.weight.norm(dim=1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.normalized_weight(), self.bias)


def test_heads_of_another_kind_are_refused(toy, images, certificate) -> None:
    model, labels = toy(), torch.zeros(len(images), dtype=torch.int64)
    model.classifier = OtherHead()
    with pytest.raises(UserError, match="does not divide its rows"):
        evaluate_certified(model, images, labels, certificate=certificate())
    model.classifier = nn.Sequential(nn.Linear(16, 5))
    model.classifier.weight, model.classifier.bias = nn.Parameter(torch.ones(5, 16)), None
    with pytest.raises(UserError, match="Sequential"):
        evaluate_certified(model, images, labels, certificate=certificate())
    model = toy()
    with torch.no_grad():
        model.classifier.weight[2, 3] = math.inf
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluate_certified(model, images, labels, certificate=certificate())
