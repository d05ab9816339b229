"""Toy classifiers with the two parts that evaluation looks for, `base_model` and `classifier`; their certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.nn.head import NormalizedLinear

PIXELS = (1, 4, 4)
CLASSES = 5


class Features(nn.Module):
    """An orthogonal map of the pixels, MaxMin if asked for, another orthogonal map: 1-Lipschitz, norm-preserving."""

    def __init__(self, maxmin: bool) -> None:
        super().__init__()
        size = PIXELS[0] * PIXELS[1] * PIXELS[2]
        self.maxmin = maxmin
        self.first, self.second = (nn.utils.parametrizations.orthogonal(nn.Linear(size, size)) for _ in range(2))
        for layer in (self.first, self.second):  # plain tensors, so that the model can be copied
            nn.utils.parametrize.remove_parametrizations(layer, "weight")

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        x = self.first(pixel_values.flatten(1))
        if self.maxmin:
            a, b = x.chunk(2, dim=1)
            x = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)
        return SimpleNamespace(pooler_output=self.second(x))


class Toy(nn.Module):
    """Features, then a normalised head."""

    def __init__(self, maxmin: bool = False, classes: int = CLASSES) -> None:
        super().__init__()
        self.base_model = Features(maxmin)
        self.classifier = NormalizedLinear(PIXELS[0] * PIXELS[1] * PIXELS[2], classes)
        nn.init.normal_(self.classifier.weight)
        nn.init.normal_(self.classifier.bias, std=0.05)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(self.base_model(pixel_values).pooler_output))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are computed fastest by one thread, above all where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """A function that makes a seeded toy classifier."""

    def make(*, maxmin: bool = False, classes: int = CLASSES, seed: int = 0) -> Toy:
        torch.manual_seed(seed)
        return Toy(maxmin, classes).eval()

    return make


@pytest.fixture
def images() -> Tensor:
    """Sixty images of float32 pixels in [0, 1]."""
    return torch.rand(60, *PIXELS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def certificate() -> Callable[..., SimpleNamespace]:
    """A function that makes what evaluation reads of a certificate."""

    def make(
        value: float = 1.0 + 1e-6,  # float32 orthogonal matrices are so only to 1e-7
        norm: str = "l2",
        origin: str = "pixels[0,1]",
        features_error: float | None = 1e-12,
    ) -> SimpleNamespace:
        rounding = {} if features_error is None else {"float64": SimpleNamespace(features_error=features_error)}
        bound = SimpleNamespace(value=value, norm=norm, origin=origin, to="features")
        return SimpleNamespace(bound_features=bound, rounding=rounding)

    return make
