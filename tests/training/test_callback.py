"""The constraint holds after every optimizer step, whatever the optimizer, and the log says so."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainerCallback

from hf_lipschitz.errors import UserError
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.models.lip_vit.configuration_lip_vit import default_constraints
from hf_lipschitz.optim.disagreement import ConstraintMismatchWarning
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.routing import Constraint
from hf_lipschitz.training.callback import BOUND_KEY, EXCESS_KEY, LipschitzCallback
from hf_lipschitz.training.trainer import LipschitzTrainer
from tests.training.small import (
    OPTIMIZERS,
    bound_of,
    tiny_model,
    tiny_trainer,
    weights_of,
    worst_norms,
)

HALF = [{**rule, "value": 0.5} for rule in default_constraints()]


class Spy(TrainerCallback):
    """Looks at the weights right after every optimizer step and every accumulated micro-batch."""

    def __init__(self) -> None:
        self.excess: list[float] = []
        self.norms: list[tuple[float, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.micro_batches = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(kwargs["model"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batches += 1
        self._look(kwargs["model"])

    def _look(self, model: Any) -> None:
        self.excess.append(Enforcer(model).max_excess())
        self.norms.append(worst_norms(model))
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})

    def assert_within(self, value: float = 1.0) -> None:
        assert self.excess and max(self.excess) <= 0.0
        for body, rows in self.norms:
            assert body <= value * (1.0 + 1e-12) and rows <= value * (1.0 + 1e-12)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_constraint_holds_after_every_step(tmp_path: Path, optimizer: str, accumulation: int, bf16: bool) -> None:
    spy = Spy()
    settings = {"gradient_accumulation_steps": accumulation, "bf16": bf16, "save_strategy": "no"}
    trainer = tiny_trainer(tmp_path, None, LipschitzCallback(), spy, optimizer=optimizer, **settings)
    trainer.train()
    assert len(spy.excess) == 4 * accumulation and spy.micro_batches == 4 * (accumulation - 1)
    spy.assert_within()
    assert all(value.dtype == torch.float32 for value in trainer.model.state_dict().values())
    first, last = spy.weights[0], spy.weights[-1]
    assert all(not torch.equal(first[name], last[name]) for name in first if name.endswith("weight"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_the_callback_it_does_not(tmp_path: Path, optimizer: str) -> None:
    """The optimizers above leave the constraint in every step: the test before sees what the callback does."""
    spy = Spy()
    tiny_trainer(tmp_path, None, spy, optimizer=optimizer, save_strategy="no", max_steps=2).train()
    assert min(spy.excess) > 1e-3 and min(max(norms) for norms in spy.norms) > 1.001


@pytest.mark.parametrize("mixer", ["orthogonal", "attention", "hybrid"])
def test_every_token_mixer(tmp_path: Path, mixer: str) -> None:
    spy = Spy()
    model = tiny_model(
        token_mixer=mixer, num_attention_heads=2, stages=[{"depth": 2, "width": 8}], batch_centering=True
    )
    tiny_trainer(tmp_path, model, LipschitzCallback(), spy, save_strategy="no").train()
    assert max(spy.excess) <= 0.0
    trainer_state = tiny_trainer(tmp_path, model).state
    assert trainer_state.log_history == []  # and a second Trainer of the model starts with nothing


def test_the_constraint_comes_from_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_model(constraints=HALF)
    Enforcer(model).apply()
    model.save_pretrained(tmp_path / "base")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    spy = Spy()
    tiny_trainer(tmp_path / "run", loaded, LipschitzCallback(), spy).train()
    spy.assert_within(0.5)
    assert AutoConfig.from_pretrained(tmp_path / "run" / "checkpoint-4").constraints == HALF


@pytest.mark.parametrize("rules", [HALF, [Constraint.from_dict(rule) for rule in HALF]], ids=["data", "objects"])
def test_an_explicit_constraint_is_kept_and_saved(tmp_path: Path, rules: Any) -> None:
    spy = Spy()
    trainer = tiny_trainer(tmp_path, tiny_model(), LipschitzCallback(rules), spy)
    with pytest.warns(
        ConstraintMismatchWarning, match=r"config\.constraints differ .* those given are enforced, and sav"
    ):
        trainer.train()
    trainer.train()  # now the config says the same
    spy.assert_within(0.5)
    assert AutoConfig.from_pretrained(tmp_path / "checkpoint-2").constraints == HALF


def test_a_constraint_that_does_not_fit_is_refused_and_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    wrong = [{"pattern": "nothing", "cap": "stiefel", "value": 1.0}]
    trainer = tiny_trainer(tmp_path, model, LipschitzCallback(wrong))
    with pytest.raises(UserError, match="constraint 'nothing' matches no parameter"):
        trainer.train()
    assert model.config.constraints == default_constraints()
    with pytest.raises(UserError, match="unknown key 'valu'"):
        LipschitzCallback([{"pattern": "nothing", "cap": "stiefel", "valu": 1.0}])


# What the user is told before the first step


def test_one_warning_says_all_that_disagrees(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.classifier.weight = nn.Parameter(model.classifier.weight.detach().clone())
    model.adapter = nn.Linear(2, 2, bias=False)
    callback = LipschitzCallback(HALF, log_bound=False)
    options = {"optimizers": (optimizer, None)}
    trainer = tiny_trainer(tmp_path, model, callback, options=options, save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [warning for warning in caught if issubclass(warning.category, ConstraintMismatchWarning)]
    assert len(told) == 1
    head, *sentences = str(told[0].message).split("\n- ")
    assert head == "constraint, optimizer and model disagree:" and len(sentences) == 3
    for said, expected in zip(
        sentences, ("SGD holds other objects", "no constraint caps the trainable 'adapter", "config.con"), strict=True
    ):
        assert said.startswith(expected)


def test_other_processes_leave_it_to_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, tiny_model(), LipschitzCallback(HALF))
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, LipschitzCallback))
    trainer.create_optimizer()
    trainer.state.is_world_process_zero = False
    with caplog.at_level(logging.INFO, "hf_lipschitz"):
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer
        )
    assert caplog.records == [] and callback.routing_table().startswith("parameter")


def test_the_routing_table_is_logged_and_at_hand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = LipschitzCallback()
    with pytest.raises(UserError, match="no routing table before training begins"):
        callback.routing_table()
    trainer = tiny_trainer(tmp_path, None, callback, save_strategy="no", max_steps=1)
    with caplog.at_level(logging.INFO, "hf_lipschitz"):
        trainer.train()
    assert [record.levelname for record in caplog.records if record.name.startswith("hf_lipschitz")] == ["INFO"]
    table = callback.routing_table()
    assert table in caplog.text and "classifier.weight" in table and len(table.splitlines()) > 5
    assert "classifier.weight" not in capsys.readouterr().out


# Weights that must not move


def test_weights_that_satisfy_the_constraint_are_not_touched_before_the_first_step(tmp_path: Path) -> None:
    """Or a resumed run would not continue where the interrupted one was."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capped = {name: value.clone() for name, value in before.items()}
    Enforcer(model).apply()
    assert any(not torch.equal(value, capped[name]) for name, value in model.state_dict().items())  # a cap moves them
    model.load_state_dict(before)
    settings = {"learning_rate": 0.0, "optim": "sgd", "max_steps": 1, "save_strategy": "no"}
    begin = Beginning()
    tiny_trainer(tmp_path, model, LipschitzCallback(), begin, optimizer="sgd", **settings).train()
    assert all(torch.equal(value, before[name]) for name, value in begin.weights.items())


class Beginning(TrainerCallback):
    """Remembers the weights after LipschitzCallback's on_train_begin."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = {name: value.clone() for name, value in kwargs["model"].state_dict().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_parameters_stay_as_they_are(tmp_path: Path, optimizer: str) -> None:
    """Frozen ones within their caps keep every bit, also where another one had to be capped at the start."""
    model = tiny_model()
    for parameter in (*model.lip_vit.embeddings.parameters(), *model.lip_vit.neck.parameters()):
        parameter.requires_grad_(False)
    with torch.no_grad():
        model.lip_vit.neck[0].linear.weight.mul_(3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spy = Spy()
    tiny_trainer(tmp_path, model, LipschitzCallback(), spy, optimizer=optimizer).train()
    spy.assert_within()
    for name, value in before.items():
        outcomes = {torch.equal(weights[name], value) for weights in spy.weights}
        assert outcomes == {"embeddings" in name or name == "lip_vit.neck.0.linear.bias"}, name
    neck = [weights["lip_vit.neck.0.linear.weight"] for weights in spy.weights]
    assert all(torch.equal(neck[0], later) for later in neck)  # capped once, then frozen


class FailingScaler(TrainerCallback):
    """Makes the gradients of one step infinite, as an overflow in float16 would."""

    def __init__(self, step: int) -> None:
        self.step, self.skipped, self.weights = step, [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({name: value.clone() for name, value in kwargs["model"].state_dict().items()})
        if state.global_step == self.step:
            next(kwargs["model"].parameters()).grad.fill_(torch.inf)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped.append(kwargs["optimizer"].step_was_skipped)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_leaves_the_weights_alone(tmp_path: Path, optimizer: str) -> None:
    spy, failing = Spy(), FailingScaler(step=2)
    trainer = tiny_trainer(tmp_path, None, LipschitzCallback(), spy, failing, optimizer=optimizer, save_strategy="no")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.train()
    assert failing.skipped == [False, False, True, False]
    spy.assert_within()
    for step, (before, after) in enumerate(zip(failing.weights, spy.weights, strict=True)):
        assert all(torch.equal(before[name], after[name]) for name in before) == (step == 2)


# Being attached, and detached


def hooks(trainer: Trainer) -> int:
    optimizer: Any = trainer.optimizer
    return len(getattr(optimizer, "optimizer", optimizer)._optimizer_step_post_hooks)


def test_the_caps_end_with_the_training(tmp_path: Path) -> None:
    callback = LipschitzCallback()
    trainer = tiny_trainer(tmp_path, None, callback)
    trainer.train()
    assert hooks(trainer) == 0 and callback._hook is None
    trainer.train()
    assert hooks(trainer) == 0


def test_a_run_that_an_error_ended_leaves_one_hook_at_most(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("enough")

    class Count(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counts.append(hooks(trainer))

    counts: list[int] = []
    trainer = tiny_trainer(tmp_path, None, LipschitzCallback(), Count(), Stop())
    for _ in range(3):
        optimizer = trainer.optimizer
        with pytest.raises(RuntimeError, match="enough"):
            trainer.train()
        trainer.optimizer = optimizer or trainer.optimizer  # the same object again, as a notebook would keep it
    assert counts == [1, 1, 1]


# transformers turns the client's bars on again, which the client refuses with a warning where a variable forbids them
@pytest.mark.filterwarnings("ignore:Cannot enable progress bars:UserWarning")
def test_hub_always_push_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained; where the callback is added later, before the first step."""
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)  # no Hub is asked
    settings = {"push_to_hub": True, "hub_always_push": True}
    said = r"hub_always_push=True .* leave it False"
    with pytest.raises(UserError, match=said):
        tiny_trainer(tmp_path, None, LipschitzCallback(), **settings)
    trainer = tiny_trainer(tmp_path, None, TrainerCallback(), **settings)
    trainer.add_callback(LipschitzCallback())
    with pytest.raises(UserError, match=said):
        trainer.train()


# What the log says


class Sink(TrainerCallback):
    """Collects log lines as TensorBoard would: before or after LipschitzCallback, as it is listed."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.lines.append({"step": state.global_step, **logs})


@pytest.mark.parametrize("kind", [Trainer, LipschitzTrainer])
def test_log_lines_carry_the_figures_of_the_checkpoint_saved_then(
    tmp_path: Path, kind: type[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    figures = LipschitzCallback.figures
    monkeypatch.setattr(LipschitzCallback, "figures", lambda self, model: calls.append(1) or figures(self, model))
    early, late = Sink(), Sink()
    trainer = tiny_trainer(tmp_path, None, early, LipschitzCallback(), late, kind=kind, save_steps=1)
    trainer.train()
    trainer.save_state()
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in history] == [1, 2, 3, 4] == [line["step"] for line in late.lines]
    assert len(calls) == 4  # the norms are computed once a line
    for line, sunk, first in zip(history, late.lines, early.lines, strict=True):
        folder = tmp_path / f"checkpoint-{line['step']}"
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert line[BOUND_KEY] == bound_of(folder)
        assert line[EXCESS_KEY] == Enforcer(model).max_excess() <= 0.0
        assert {key: sunk[key] for key in (BOUND_KEY, EXCESS_KEY)} == {
            key: line[key] for key in (BOUND_KEY, EXCESS_KEY)
        }
        assert (BOUND_KEY in first) == (kind is LipschitzTrainer)  # in time for sinks that come first
    assert len({line[BOUND_KEY] for line in history}) == 4
    for state in (tmp_path / "trainer_state.json", tmp_path / "checkpoint-4" / "trainer_state.json"):
        assert [line for line in json.loads(state.read_text())["log_history"] if "loss" in line] == history


@pytest.mark.parametrize("kind", [Trainer, LipschitzTrainer])
def test_other_lines_carry_none_and_they_can_be_turned_off(tmp_path: Path, kind: type[Trainer]) -> None:
    from hf_lipschitz.training.data import BatchedImages
    from tests.training.small import tiny_images

    options = {"eval_dataset": BatchedImages(tiny_images(6))}
    trainer = tiny_trainer(tmp_path / "on", kind=kind, options=options, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert [BOUND_KEY in line for line in trainer.state.log_history] == [
        "loss" in line for line in trainer.state.log_history
    ]
    assert sum("eval_loss" in line for line in trainer.state.log_history) == 2
    trainer = tiny_trainer(tmp_path / "off", None, LipschitzCallback(log_bound=False), kind=kind)
    trainer.train()
    assert all(BOUND_KEY not in line and EXCESS_KEY not in line for line in trainer.state.log_history)


# Numbers that are no numbers, and models that state no program


def test_weights_and_gradients_that_are_not_finite(tmp_path: Path) -> None:
    def endless(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.sum() * torch.inf

    for optimizer, said in (
        ("spectral_muon", "gradient of a parameter .* NaN or infinite entries and nothing was updated"),
        ("adamw", r"parameter 'lip_vit\.embeddings\..*' holds NaN entries"),
        ("sgd", r"parameter 'lip_vit\.embeddings\..*' holds NaN entries"),
    ):
        trainer = tiny_trainer(tmp_path, optimizer=optimizer, options={"compute_loss_func": endless})
        with pytest.raises(ValueError, match=said):
            trainer.train()
        model = tiny_model()
        with torch.no_grad():
            model.lip_vit.neck[0].linear.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"parameter 'lip_vit\.neck\.0\.linear\.weight' has no norm.*finite"):
            tiny_trainer(tmp_path, model, optimizer=optimizer).train()
    assert not list(tmp_path.glob("checkpoint-*"))


class Poison(TrainerCallback):
    """Spoils a parameter that no cap looks at."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].classifier.bias[0] = torch.nan


def test_a_free_parameter_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Lipschitz bound \(.*'classifier.bias' contains NaN.*\): load the last"):
        tiny_trainer(tmp_path, None, LipschitzCallback(), Poison()).train()
    trainer = tiny_trainer(tmp_path, None, LipschitzCallback(), Poison(), logging_steps=100, save_steps=1)
    with (
        pytest.warns(UncertifiedWarning, match=r"saved without a certificate: .*'classifier.bias'"),
        pytest.raises(UserError, match="checkpoint-1 was written without a certificate"),
    ):
        trainer.train()


class Foreign(nn.Module):
    """A model of somebody else: no config, no program."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(16, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_without_a_program_is_capped_and_said_to_have_no_bound(tmp_path: Path) -> None:
    rules = [{"pattern": r"body\.weight", "cap": "spectral_normalize", "value": 0.1}]
    model = Foreign()
    trainer = tiny_trainer(tmp_path, model, LipschitzCallback(rules))
    with pytest.warns(UncertifiedWarning, match="Foreign states no bound program, so its norms are kept but neither"):
        trainer.train()
    assert torch.linalg.matrix_norm(model.body.weight.double(), 2) <= 0.1
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line[EXCESS_KEY] <= 0.0 and BOUND_KEY not in line for line in lines)
    assert weights_of(tmp_path / "checkpoint-4")["body.weight"].shape == (3, 16)
    with pytest.raises(UserError, match=r"Foreign has no config\.constraints: pass constraints"):
        tiny_trainer(tmp_path, Foreign()).train()
