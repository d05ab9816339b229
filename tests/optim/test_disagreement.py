"""Where constraints, optimizer and model do not speak of the same weights, one sentence says so; else nothing does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.disagreement import disagreements
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.spectral_muon import SpectralMuon
from tests.optim.models import CONSTRAINTS, SmallNet, small_net

Build = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "SpectralMuon": lambda model: SpectralMuon.from_model(model, CONSTRAINTS, lr=0.1),
    "AdamW": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
    "SGD": lambda model: torch.optim.SGD([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=0.1),
}
STRICT = [{**rule, "value": 0.25} for rule in CONSTRAINTS]


def configured(model: nn.Module, constraints: Any = CONSTRAINTS) -> Any:
    """The model with constraints in its config, as one from a checkpoint."""
    model.config = type("Config", (), {"constraints": constraints})()
    return model


class LoRA(nn.Module):
    """A linear layer that stays as it is, plus a trainable product of rank two."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def only(sentences: list[str]) -> str:
    """The one sentence there is."""
    assert len(sentences) == 1, sentences
    assert "\n" not in sentences[0] and not sentences[0].endswith(".")
    return sentences[0]


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("constraints", [CONSTRAINTS, None], ids=["given", "from the config"])
@pytest.mark.parametrize("frozen", ["nothing", "head", "blocks"])
def test_nothing_is_said_where_all_agrees(optimizer: str, constraints: Any, frozen: str) -> None:
    model = configured(small_net())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    built = OPTIMIZERS[optimizer](model)
    compiled: Any = torch.compile(model, backend="eager")
    for seen in (model, compiled):
        assert disagreements(seen, constraints, built) == []


def test_constraints_that_do_not_fit_are_an_error() -> None:
    model = small_net()
    with pytest.raises(UserError, match="matches no parameter"):
        disagreements(model, [{"pattern": "x", "cap": "stiefel", "value": 1.0}], OPTIMIZERS["SGD"](model))
    with pytest.raises(UserError, match=r"no config\.constraints"):
        disagreements(model, None, OPTIMIZERS["SGD"](model))


# The optimizer and the model hold different parameters


def left_out(model: SmallNet) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("blocks")]


def test_a_constrained_parameter_that_no_group_holds() -> None:
    model = small_net()
    optimizer = torch.optim.AdamW(left_out(model))
    said = only(disagreements(model, CONSTRAINTS, optimizer))
    assert re.search(
        r"no parameter group of AdamW holds the constrained 'blocks.0.weight' and 'blocks.1.weight',", said
    )
    for block in model.blocks:
        block.requires_grad_(False)
    assert disagreements(model, CONSTRAINTS, optimizer) == []


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])  # the former records no names, the latter does
def test_a_parameter_that_was_replaced_after_the_optimizer_was_built(optimizer: str) -> None:
    model = small_net()
    built = OPTIMIZERS[optimizer](model)
    model.head = nn.Linear(8, 4)
    said = only(disagreements(model, CONSTRAINTS, built))
    assert said.startswith(f"{optimizer} holds other objects than the model's for 'head.weight' and 'head.bias', as")


def test_a_new_head_of_another_shape_is_missing_and_the_old_one_too_much() -> None:
    model = small_net()
    without_names, with_names = OPTIMIZERS["AdamW"](model), OPTIMIZERS["SGD"](model)
    model.head = nn.Linear(8, 5)
    missing, foreign = disagreements(model, CONSTRAINTS, without_names)
    assert "no parameter group of AdamW holds the constrained 'head.weight'," in missing
    assert "what is not the model's, a parameter of shape 4 x 8 and a parameter of shape 4, which no" in foreign
    said = only(disagreements(model, CONSTRAINTS, with_names))
    assert said.startswith("SGD holds other objects than the model's for 'head.weight' and 'head.bias', as")


def test_a_replaced_parameter_is_told_from_a_missing_one_of_its_shape() -> None:
    model = small_net()
    named = [(name, parameter) for name, parameter in model.named_parameters() if name != "blocks.0.weight"]
    optimizer = torch.optim.SGD(named, lr=0.1)
    model.blocks[1].weight = nn.Parameter(torch.eye(6))
    replaced, missing = disagreements(model, CONSTRAINTS, optimizer)
    assert replaced.startswith("SGD holds other objects than the model's for 'blocks.1.weight', as")
    assert missing.startswith("no parameter group of SGD holds the constrained 'blocks.0.weight', so")


def test_what_is_not_the_models() -> None:
    model = small_net()
    others = [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2, 3))]
    optimizer = torch.optim.SGD([*model.parameters(), *others], lr=0.1)
    said = only(disagreements(model, CONSTRAINTS, optimizer))
    assert "SGD also updates what is not the model's, a parameter of shape () and a parameter of shape 2 x 3," in said
    named = [*model.named_parameters(), ("loss.scale", others[0])]
    said = only(disagreements(model, CONSTRAINTS, torch.optim.SGD(named, lr=0.1)))
    assert "what is not the model's, 'loss.scale', which" in said
    model.requires_grad_(False)
    said = only(disagreements(model, CONSTRAINTS, torch.optim.SGD([("loss.scale", others[0])], lr=0.1)))
    assert "what is not the model's, 'loss.scale', which" in said


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_an_optimizer_of_another_model(optimizer: str) -> None:
    said = only(disagreements(small_net(), CONSTRAINTS, OPTIMIZERS[optimizer](small_net())))
    assert said.startswith(f"{optimizer} holds no parameter of this model")


def test_accelerates_wrapper_is_looked_into() -> None:
    class Wrapper(torch.optim.SGD):
        optimizer: Any

    model = small_net()
    wrapped = Wrapper(small_net().parameters(), lr=0.1)
    wrapped.optimizer = OPTIMIZERS["SGD"](model)
    assert disagreements(model, CONSTRAINTS, wrapped) == []


# Matrices without a constraint


def test_a_new_head_without_a_constraint() -> None:
    model = configured(small_net())
    model.probe = nn.Linear(4, 2)
    said = only(disagreements(model, None, OPTIMIZERS["AdamW"](model)))
    assert said.startswith(
        "no constraint caps the trainable 'probe.weight', so nothing keeps the norm there from growing"
    )
    model.probe.weight.requires_grad_(False)
    assert disagreements(model, None, OPTIMIZERS["AdamW"](model)) == []


def test_many_are_counted() -> None:
    model = configured(small_net())
    model.probes = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    model.kernel = nn.Conv1d(2, 2, 3)
    said = only(disagreements(model, None, OPTIMIZERS["SGD"](model)))
    first = "'probes.0.weight', 'probes.1.weight', 'probes.2.weight' and others"
    assert f"the trainable 6 parameters ({first}), so" in said


def test_where_nothing_was_promised_nothing_is_missed() -> None:
    """A model of somebody else, some of whose weights are capped on purpose; with a program the rest matters too."""
    model = small_net()
    assert disagreements(model, CONSTRAINTS[:1], OPTIMIZERS["SGD"](model)) == []
    model.bound_program = lambda: None
    said = only(disagreements(model, CONSTRAINTS[:1], OPTIMIZERS["SGD"](model)))
    assert said.startswith("no constraint caps the trainable 'attention.weight' and 'head.weight', so")


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_lora_is_first_an_error_that_helps_and_then_two_free_matrices(optimizer: str) -> None:
    model = configured(small_net())
    model.attention = LoRA(model.attention)
    said = (
        r"constraint 'attention.*' matches no parameter: .* would match 'attention\.base_layer\.weight' without 'base_l"
    )
    with pytest.raises(UserError, match=said):
        Enforcer(model)
    rules = [
        {**rule, "pattern": rule["pattern"].replace(r"attention\.", r"attention\.base_layer\.")} for rule in CONSTRAINTS
    ]
    built = (
        SpectralMuon.from_model(model, rules, lr=0.1) if optimizer == "SpectralMuon" else OPTIMIZERS[optimizer](model)
    )
    free, config = disagreements(model, rules, built)
    assert "the trainable 'attention.lora_A.weight' and 'attention.lora_B.weight', so nothing keeps" in free
    assert config.startswith(
        "config.constraints differ from the constraints given (the rules there do not fit the model)"
    )


# SpectralMuon's own view


def muon(model: SmallNet, matrices: list[str]) -> SpectralMuon:
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in matrices], "role": "matrix"},
        {"params": [parameter for name, parameter in named.items() if name not in matrices], "role": "other"},
    ]
    return SpectralMuon(groups, lr=0.1)


def test_matrices_in_the_wrong_group_of_spectral_muon() -> None:
    model = small_net()
    right = ["blocks.0.weight", "blocks.1.weight", "attention.weight"]
    assert disagreements(model, CONSTRAINTS, muon(model, right)) == []
    assert disagreements(model, CONSTRAINTS, muon(model, [*right, "head.weight"])) == []  # capped, if in another norm
    by_adamw = only(disagreements(model, CONSTRAINTS, muon(model, right[:1])))
    assert by_adamw.startswith(
        "SpectralMuon has 'blocks.1.weight' and 'attention.weight' in a group of the role 'other'"
    )
    uncapped = only(disagreements(model, CONSTRAINTS[:2], muon(model, [*right, "head.weight"])))
    assert uncapped.startswith("SpectralMuon has 'head.weight' in a group of the role 'matrix', although no constraint")
    model.blocks[1].weight.requires_grad_(False)
    assert "'blocks.1.weight'" not in only(disagreements(model, CONSTRAINTS, muon(model, right[:1])))


RECORDED = [
    (None, None),
    (CONSTRAINTS, None),
    (CONSTRAINTS[::-1], None),
    ([{**CONSTRAINTS[0], "pattern": r"blocks\.[01]\.weight"}, *CONSTRAINTS[1:]], None),  # the same by another pattern
    (STRICT, "'blocks.0.weight' has stiefel, spectral, at most 0.25 there and stiefel, spectral, at most 1.0 here"),
    (CONSTRAINTS[:2], "'head.weight' has no cap there and row_normalize, row, at most 1.0 here"),
    (
        [*CONSTRAINTS[::2], {**CONSTRAINTS[1], "heads": 4}],
        "'attention.weight' has spectral_normalize, per_head of 4, at most 0.5 there and spectral_normalize, per_hea",
    ),
    ([{**CONSTRAINTS[0], "pattern": "tail"}], "the rules there do not fit the model"),
]


@pytest.mark.parametrize(("recorded", "difference"), RECORDED)
def test_spectral_muon_built_for_other_constraints(recorded: Any, difference: str | None) -> None:
    model = small_net()
    optimizer = OPTIMIZERS["SpectralMuon"](model)
    optimizer.constraints = recorded  # pyright: ignore[reportAttributeAccessIssue]
    sentences = disagreements(model, CONSTRAINTS, optimizer)
    if difference is None:
        assert sentences == []
    else:
        said = only(sentences)
        assert said.startswith(f"SpectralMuon was built for other constraints than those enforced ({difference}")


# What the checkpoint says


@pytest.mark.parametrize(
    ("stored", "difference"), [*RECORDED, ([], None), (7, "the rules there"), (["x"], "the rules")]
)
def test_the_config_says_something_else(stored: Any, difference: str | None) -> None:
    model = configured(small_net(), stored)
    sentences = disagreements(model, CONSTRAINTS, OPTIMIZERS["AdamW"](model))
    if difference is None:
        assert sentences == []
    else:
        said = only(sentences)
        assert said.startswith(f"config.constraints differ from the constraints given ({difference}")
        assert said.endswith("those given are enforced, and saved in the config of the next checkpoint")
