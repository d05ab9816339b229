"""Losses against their formulas written out with loops, and the Trainer adapter against one large batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lipschitz.errors import UserError
from hf_lipschitz.nn.head import NormalizedLinear
from hf_lipschitz.training.losses import LOSSES, CertifiedLoss, pair_norms

LIPSCHITZ, EPSILON, SCALE = 4.0, 0.1, 2.5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Toy(nn.Module):
    """A linear map and a normalised head, with the Trainer's signature."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.classifier = nn.Linear(6, 8), NormalizedLinear(8, 4)
        nn.init.normal_(self.classifier.weight)
        self.to(dtype)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.classifier(self.features(pixel_values))}


def batch(count: int = 9, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and pair norms, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (count,), generator=generator)
    rows = F.normalize(torch.randn(classes, 5, generator=generator, dtype=torch.float64), dim=1)
    return logits, labels, torch.cdist(rows, rows)


def log_softmax(values: list[float], index: int) -> float:
    return values[index] - math.log(sum(math.exp(v) for v in values))


def written_out(name: str, y: list[float], j: int, norms: list[list[float]]) -> float:
    """One example's loss, from the literature's formula, without torch."""
    if name == "cross_entropy":
        return -log_softmax([SCALE * v for v in y], j)
    if name == "offset_cross_entropy":
        shifted = [SCALE * (v - (math.sqrt(2) * LIPSCHITZ * EPSILON if i == j else 0.0)) for i, v in enumerate(y)]
        return -log_softmax(shifted, j) / SCALE
    if name == "gloro":
        top = max(range(len(y)), key=lambda i: y[i])
        bottom = max(v + EPSILON * LIPSCHITZ * norms[top][i] for i, v in enumerate(y) if i != top)
        return -log_softmax([SCALE * v for v in [*y, bottom]], j)
    z = []
    for i, v in enumerate(y):
        shift = EPSILON * LIPSCHITZ * norms[j][i]
        share = min(max((y[j] - v) / shift, 0.01), 1.0) if i != j else 0.0
        z.append(SCALE * (v + share * shift))
    return -log_softmax(z, j)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name: str) -> None:
    logits, labels, norms = batch(30)
    losses = LOSSES[name].function(logits, labels, norms, LIPSCHITZ, epsilon=EPSILON, scale=SCALE)
    expected = [written_out(name, y, j, norms.tolist()) for y, j in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert losses.shape == (30,)
    assert torch.allclose(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_away_from_kinks(name: str) -> None:
    """For EMMA with its shares held fixed, as it is defined: those of a detached evaluation."""
    logits, labels, norms = batch(4, seed=2)
    function = LOSSES[name].function
    if name == "emma":  # all shares clipped to 1, so that holding them fixed changes nothing
        logits = 10.0 * F.one_hot(labels, 4) + logits
    norms = norms.requires_grad_(True)
    logits = logits.requires_grad_(True)

    def value(y: Tensor, n: Tensor) -> Tensor:
        return function(y, labels, n, LIPSCHITZ, epsilon=EPSILON, scale=SCALE)

    assert torch.autograd.gradcheck(value, (logits, norms))


def test_emma_sends_no_gradient_through_its_shares() -> None:
    """A beaten rival that epsilon would lift above the true class is shifted to a tie, with the gradient of a tie."""
    logits = torch.tensor([[1.0, 0.9, -5.0]], dtype=torch.float64, requires_grad=True)
    norms = torch.full((3, 3), 1.0, dtype=torch.float64) - torch.eye(3, dtype=torch.float64)
    LOSSES["emma"].function(logits, torch.tensor([0]), norms, 1.0, epsilon=0.5, scale=1.0).sum().backward()
    z = [1.0, 1.0, -4.5]
    share = math.exp(z[0]) / sum(math.exp(v) for v in z)
    assert logits.grad is not None and float(logits.grad[0, 0]) == pytest.approx(share - 1.0)


def test_emma_with_equal_rows_and_without_margin_is_finite() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    losses = LOSSES["emma"].function(logits, torch.tensor([0, 1]), torch.zeros(3, 3), 1.0, epsilon=0.1, scale=3.0)
    losses.sum().backward()
    assert torch.isfinite(losses).all() and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_gloro_prefers_its_extra_class_exactly_where_nothing_is_certified() -> None:
    logits, _, norms = batch(200, seed=5)
    top = logits.argmax(dim=1)
    gaps = (logits.gather(1, top[:, None]) - logits) / (LIPSCHITZ * norms[top] + 1e-30)
    radii = gaps.scatter(1, top[:, None], math.inf).amin(dim=1)
    losses = LOSSES["gloro"].function(logits, top, norms, LIPSCHITZ, epsilon=EPSILON, scale=200.0)
    assert torch.equal(losses > math.log(2), radii < EPSILON)


def test_pair_norms_are_distances_with_finite_gradients() -> None:
    rows = F.normalize(torch.randn(5, 7, dtype=torch.float64), dim=1)
    rows[3] = rows[2]
    rows.requires_grad_(True)
    norms = pair_norms(rows)
    assert torch.allclose(norms, torch.cdist(rows, rows), atol=1e-7) and float(norms[2, 3].detach()) == 0.0
    norms.sum().backward()
    assert rows.grad is not None and torch.isfinite(rows.grad).all()
    free = F.normalize(torch.randn(4, 6, dtype=torch.float64), dim=1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda r: pair_norms(r), (free,))
    single = pair_norms(F.normalize(torch.randn(40, 64), dim=1))
    assert torch.all(single.diagonal() == 0) and single.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_gradients_are_those_of_one_large_batch(name: str) -> None:
    """Micro-batches of unequal size, one with ignored labels, and num_items_in_batch as the Trainer counts it."""
    images = torch.randn(11, 6, dtype=torch.float64)
    labels = torch.randint(0, 4, (11,))
    labels[[2, 9]] = -100
    whole, parts = Toy(), Toy()
    CertifiedLoss(whole, name, lipschitz=LIPSCHITZ)(whole(images), labels).backward()
    loss = CertifiedLoss(parts, name, lipschitz=LIPSCHITZ)
    items = labels.ne(-100).sum()
    for part in torch.arange(11).split([4, 1, 6]):
        loss(parts(images[part]), labels[part], num_items_in_batch=items).backward()
    for (key, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-13), key
    wrong = Toy()  # the planted mistake: a mean over each micro-batch
    loss = CertifiedLoss(wrong, name, lipschitz=LIPSCHITZ)
    for part in torch.arange(11).split([4, 1, 6]):
        loss(wrong(images[part]), labels[part]).backward()
    assert not torch.allclose(whole.features.weight.grad, wrong.features.weight.grad / 3, rtol=1e-2)


def test_head_norms_take_part_in_the_gradient() -> None:
    model = Toy()
    logits, labels = model(torch.randn(8, 6, dtype=torch.float64))["logits"].detach(), torch.arange(8) % 4
    CertifiedLoss(model, "emma", lipschitz=LIPSCHITZ)(SimpleNamespace(logits=logits), labels).backward()
    assert float(model.classifier.weight.grad.abs().sum()) > 0.0


def test_epsilon_grows_over_the_first_half() -> None:
    loss = CertifiedLoss(Toy(), "emma", lipschitz=1.0)
    base = 36 / 255
    for progress, factor in ((0.0, 0.1), (0.25, 0.1 + 2.9 / 2), (0.5, 3.0), (0.8, 3.0), (1.0, 3.0)):
        loss.progress = progress
        assert loss.epsilon == pytest.approx(base * factor)
    at_once = CertifiedLoss(Toy(), "emma", lipschitz=1.0, growth=(0.2, 2.0), growth_share=0.0, epsilon=0.5)
    assert at_once.epsilon == pytest.approx(1.0)
    fixed = CertifiedLoss(Toy(), "gloro", lipschitz=1.0, epsilon=0.3)
    assert fixed.epsilon == pytest.approx(0.3)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress"):
            loss.progress = bad


def test_bfloat16_logits_under_autocast_are_lost_no_further() -> None:
    model = Toy(torch.float32)
    images, labels = torch.randn(16, 6), torch.arange(16) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.features(images) @ model.classifier.weight.T
        value = CertifiedLoss(model, "emma", lipschitz=LIPSCHITZ)(SimpleNamespace(logits=logits), labels)
    same = CertifiedLoss(model, "emma", lipschitz=LIPSCHITZ)(SimpleNamespace(logits=logits.float()), labels)
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32 and torch.equal(value, same)


def test_a_batch_of_ignored_labels_is_zero_with_a_gradient() -> None:
    model = Toy()
    value = CertifiedLoss(model, lipschitz=1.0)(model(torch.randn(3, 6, dtype=torch.float64)), torch.full((3,), -100))
    value.backward()
    assert float(value.detach()) == 0.0 and float(model.features.weight.grad.abs().sum()) == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "emmma"}, "emma"),
        ({"lipschitz": 0.0}, "lipschitz"),
        ({"lipschitz": math.inf}, "lipschitz"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"scale": 0.0}, "scale"),
        ({"growth": (0.0, 3.0)}, "growth"),
        ({"growth_share": 1.5}, "growth_share"),
    ],
)
def test_senseless_settings_get_one_sentence(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        CertifiedLoss(Toy(), **({"lipschitz": 1.0} | options))


def test_missing_labels_get_one_sentence() -> None:
    with pytest.raises(UserError, match="labels"):
        CertifiedLoss(Toy(), lipschitz=1.0)({"logits": torch.zeros(1, 4)}, None)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_trainer_takes_the_same_step_however_it_accumulates(accumulate: int, tmp_path: Path) -> None:
    """Against a step by hand; with 4 x 3 examples the last micro-batch holds one example fewer."""
    from transformers import Trainer, TrainingArguments

    images, labels = torch.randn(11, 6), torch.arange(11) % 4
    by_hand = Toy(torch.float32)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    CertifiedLoss(by_hand, "emma", lipschitz=LIPSCHITZ)(by_hand(images), labels).backward()
    optimizer.step()
    model = Toy(torch.float32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=12 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)],
        compute_loss_func=CertifiedLoss(model, "emma", lipschitz=LIPSCHITZ),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    ).train()
    for a, b in zip(by_hand.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
