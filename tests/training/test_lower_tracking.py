"""A lower estimate beside the bound in the log: on its schedule, below the bound, and training does not notice it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_lipschitz.errors import UserError
from hf_lipschitz.training.callback import BOUND_KEY, LOWER_KEY, LipschitzCallback
from hf_lipschitz.training.lower_tracking import IMAGES, LowerTracking
from hf_lipschitz.training.recipe import Recipe
from hf_lipschitz.training.run import train
from hf_lipschitz.training.trainer import LipschitzTrainer
from tests.training.small import OPTIMIZERS, equal_weights, tiny_images, tiny_model, tiny_trainer, weights_of


def _lines(trainer: Trainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", [Trainer, LipschitzTrainer])
@pytest.mark.parametrize("inputs", [None, tiny_images().pixel_values], ids=["random images", "images"])
def test_it_stands_beside_the_bound_on_its_schedule(tmp_path: Path, kind: type[Trainer], inputs: Any) -> None:
    callback = LipschitzCallback(estimate_every=2, estimate_inputs=inputs)
    trainer = tiny_trainer(tmp_path, None, callback, kind=kind, max_steps=5, save_strategy="no")
    trainer.train()
    lines = _lines(trainer)
    assert [line["step"] for line in lines if LOWER_KEY in line] == [2, 4]
    for line in lines:
        if LOWER_KEY in line:
            assert 0.0 < line[LOWER_KEY] <= line[BOUND_KEY] * (1 + 1e-12)
            assert line[LOWER_KEY] > 0.2 * line[BOUND_KEY]


def test_by_default_there_is_none(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, None, LipschitzCallback(), save_strategy="no")
    trainer.train()
    assert all(BOUND_KEY in line and LOWER_KEY not in line for line in _lines(trainer))


@pytest.mark.parametrize(
    ("every", "start", "logged", "estimated"),
    [
        (2, 0, [1, 2, 3, 4, 5], [2, 4]),
        (3, 0, [2, 4, 6, 8, 10], [4, 6, 10]),  # the log line after a multiple of three
        (50, 75, [80, 90, 100, 110], [100]),  # resumed
        (1, 0, [5, 10], [5, 10]),
    ],
)
def test_the_schedule(every: int, start: int, logged: list[int], estimated: list[int]) -> None:
    tracking = LowerTracking(every, last=start)
    found = []
    for step in logged:
        if tracking.due(step):
            found.append(step)
            tracking.last = step
    assert found == estimated


@pytest.mark.parametrize(
    ("optimizer", "mixer"), list(zip(OPTIMIZERS, ["attention", "shift", "orthogonal"], strict=True))
)
def test_training_is_the_same_bit_for_bit(tmp_path: Path, optimizer: str, mixer: str) -> None:
    """Weights, optimizer state and random states after three steps, with batch centering's running means."""
    ends = []
    for every in (None, 1):
        model = tiny_model(token_mixer=mixer, num_attention_heads=2, batch_centering=True)
        callback = LipschitzCallback(estimate_every=every)
        trainer = tiny_trainer(tmp_path / str(every), model, callback, optimizer=optimizer, max_steps=3, save_steps=3)
        trainer.train()
        assert sum(LOWER_KEY in line for line in _lines(trainer)) == (3 if every else 0)
        losses = [line["loss"] for line in _lines(trainer)]
        states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
        ends.append((weights_of(tmp_path / str(every) / "checkpoint-3"), losses, states, model.training))
    (weights, losses, states, mode), (tracked, tracked_losses, tracked_states, tracked_mode) = ends
    assert equal_weights(weights, tracked) and losses == tracked_losses and mode == tracked_mode
    assert torch.equal(states[0], tracked_states[0]) and states[1:] == tracked_states[1:]


class Careless(LowerTracking):
    """Draws from the global random state: the test before must see it."""

    def estimate(self, model: Any, step: int) -> float:
        torch.rand(3)
        np.random.rand()
        return super().estimate(model, step)


def test_a_careless_estimate_is_noticed(tmp_path: Path) -> None:
    ends = []
    for kind in (LowerTracking, Careless):
        callback = LipschitzCallback(estimate_every=1)
        callback.tracking = kind(1)
        trainer = tiny_trainer(tmp_path / kind.__name__, None, callback, max_steps=3, save_strategy="no")
        trainer.train()
        ends.append(torch.get_rng_state())
    assert not torch.equal(*ends)


def test_an_estimate_leaves_gradients_modes_and_buffers() -> None:
    model = tiny_model(batch_centering=True).train()
    model(torch.rand(4, 1, 4, 4)).logits.sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    value = LowerTracking(1).estimate(model, 1)
    assert value > 0.0 and model.training and all(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())
    assert equal_weights(state, model.state_dict())
    assert grads and all(torch.equal(grads[name], dict(model.named_parameters())[name].grad) for name in grads)


def test_a_model_without_a_program_needs_inputs() -> None:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match="pass estimate_inputs"):
        LowerTracking(1).estimate(model, 1)
    inputs = torch.randn(IMAGES + 2, 3, generator=torch.Generator().manual_seed(0))
    expected = float(torch.linalg.matrix_norm(model.weight.detach().double(), 2))
    assert LowerTracking(1, inputs).estimate(model, 1) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("every", [0, -1])
def test_a_schedule_is_at_least_a_step(every: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        LipschitzCallback(estimate_every=every)


def test_the_recipe_key(tmp_path: Path) -> None:
    """With the images of the run; off where the recipe does not say."""
    value: dict[str, Any] = {
        "model": {"config": {"image_size": 4, "num_channels": 1, "patch_size": 2, "hidden_size": 8,
                             "num_hidden_layers": 1}},
        "data": {"path": "digits"},
        "optimizer": {"lr": 0.05},
        "trainer": {"max_steps": 4, "batch_size": 6, "logging_steps": 1, "estimate_steps": 2},
    }  # fmt: skip
    recipe = Recipe.model_validate(value)
    assert Recipe.model_validate({**value, "trainer": {"max_steps": 1}}).trainer.estimate_steps is None
    trained = train(recipe, tmp_path / "run", progress=False, data=tiny_images())
    assert [line["step"] for line in trained.history if LOWER_KEY in line] == [2, 4]
