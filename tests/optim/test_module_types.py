"""Rules by module type: exact types only, written out as rules by name that match those names and no others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.module_types import constraints_by_type
from hf_lipschitz.optim.routing import Constraint, route


class Norm(nn.LayerNorm):
    """A subclass, which no rule for LayerNorm concerns."""


class Net(nn.Module):
    """Embedding, three blocks, an odd one out, and a head tied to the embedding if asked for."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"in+": nn.Linear(4, 8), "out": nn.Linear(8, 4), "norm": Norm(4)}) for _ in range(3)
        )
        self.last = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


ONE = {"cap": "spectral_normalize", "value": 1.0}
ROWS = {"cap": "row_normalize", "value": 2.0}


def effect(model: nn.Module, rules: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    lines = route(model.named_parameters(), rules)
    return {line.name: (line.constraint.cap, line.constraint.value) for line in lines if line.constraint}


def test_rules_by_type_become_rules_by_name() -> None:
    model = Net()
    rules = constraints_by_type(model, {"Linear": ONE, nn.Embedding: ROWS})
    assert json.loads(json.dumps(rules)) == rules
    assert {(rule["pattern"], rule["cap"]) for rule in rules} == {
        (r"layers\.\d+\.in\+\.weight", "spectral_normalize"),
        (r"layers\.\d+\.out\.weight", "spectral_normalize"),
        (r"head\.weight", "spectral_normalize"),
        (r"embed\.weight", "row_normalize"),
    }
    assert effect(model, rules) == {
        "embed.weight": ("row_normalize", 2.0),
        **{f"layers.{i}.{name}.weight": ("spectral_normalize", 1.0) for i in range(3) for name in ("in+", "out")},
        "head.weight": ("spectral_normalize", 1.0),
    }


def test_overrides_take_what_they_match_and_patterns_stay_exact() -> None:
    model = Net()
    overrides = [
        Constraint.from_dict({**ROWS, "pattern": r"head\.weight"}),
        {**ONE, "cap": "stiefel", "pattern": r"layers\.1\.out\.weight", "value": 5.0},
    ]
    rules = constraints_by_type(model, {"Linear": ONE}, overrides=overrides)
    assert [rule["pattern"] for rule in rules] == [
        r"head\.weight",
        r"layers\.1\.out\.weight",
        r"layers\.\d+\.in\+\.weight",
        r"layers\.0\.out\.weight",  # \d+ would take the one overridden
        r"layers\.2\.out\.weight",
    ]
    found = effect(model, rules)
    assert found["layers.1.out.weight"] == ("stiefel", 5.0) and found["head.weight"] == ("row_normalize", 2.0)
    assert len(found) == 7


def test_numbers_stand_for_all_only_where_all_are_of_the_type() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Bilinear(2, 2, 2))
    assert [rule["pattern"] for rule in constraints_by_type(model, {"Linear": ONE})] == [r"0\.weight", r"1\.weight"]
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert [rule["pattern"] for rule in constraints_by_type(model, {"Linear": ONE})] == [r"\d+\.weight"]
    assert [rule["pattern"] for rule in constraints_by_type(model[:2], {"Linear": ONE})] == [r"0\.weight"]
    assert [rule["pattern"] for rule in constraints_by_type(model[0], {"Linear": ONE})] == ["weight"]


@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
def test_a_tied_weight_is_constrained_once(kind: str) -> None:
    found = effect(model := Net(tied=True), constraints_by_type(model, {kind: ONE}))
    assert "embed.weight" in found and "head.weight" not in found
    assert effect(model, constraints_by_type(model, {"Linear": ONE, "Embedding": ONE})) == {
        "embed.weight": ("spectral_normalize", 1.0),
        **effect(model, constraints_by_type(model, {"Linear": ONE})),
    }
    with pytest.raises(
        UserError, match=r"'embed.weight' is shared by modules of the types Linear and Embedding, which"
    ):
        constraints_by_type(model, {"Linear": ONE, "Embedding": ROWS})
    mine = [{**ROWS, "pattern": r"embed\.weight"}]
    assert effect(model, constraints_by_type(model, {"Linear": ONE}, overrides=mine))["embed.weight"][0] == ROWS["cap"]


def test_wrapped_models_have_the_rules_of_what_they_wrap() -> None:
    model = Net()
    rules = constraints_by_type(model, {"Linear": ONE})
    compiled: Any = torch.compile(model, backend="eager")
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)  # without processes to talk to
    distributed.module = compiled
    for wrapped in (compiled, distributed):
        assert constraints_by_type(wrapped, {"Linear": ONE}) == rules


@pytest.mark.parametrize(
    ("rules", "overrides", "message"),
    [
        ({"linear": ONE}, [], "no module of the model has the type 'linear': did you mean Linear"),
        ({"Lstm": ONE}, [], "no module of the model has the type 'Lstm': its types are Conv1d, Embedding, "),
        ({nn.Bilinear: ONE}, [], r"has the type torch\.nn\.modules\.linear\.Bilinear itself: did you mean Linear"),
        ({type("Linear", (nn.Linear,), {}): ONE}, [], r"its Linear is torch\.nn\.modules\.linear\.Linear: give that"),
        ({nn.Module: ONE}, [], "Module itself: did you mean ModuleDict or ModuleList"),
        ({"ModuleDict": ONE}, [], "ModuleDict has no parameter called 'weight': constrain its matrices by name"),
        ({"LayerNorm": ONE}, [], "LayerNorm has a weight that is a vector: constrain its"),
        (
            {"Linear": {**ONE, "pattern": "x"}},
            [],
            "the rule for Linear has a pattern: leave it out, or move it to the ov",
        ),
        ({"Linear": 1.0}, [], "the rule for Linear is a mapping with the keys cap and value, not 1.0"),
        ({"Linear": {**ONE, "caps": 1}}, [], "constraint 'Linear': unknown key 'caps'"),
        ({"Linear": ONE, nn.Linear: ONE}, [], "two rules are given for the type Linear: leave one out"),
        ({"Linear": ONE}, [{**ONE, "pattern": ".*weight"}], "the overrides match every weight of Linear: leave out"),
        ({"Linear": ONE}, [{**ONE, "pattern": "tail"}], "constraint 'tail' matches no parameter"),
        (
            {"Linear": ONE},
            [{**ONE, "pattern": r"head\..*"}, {**ONE, "pattern": ".*d.weight"}],
            "claim the parameter 'head",
        ),
        (
            {"Linear": {**ONE, "norm": "per_head", "heads": 3}},
            [],
            "rows of 'layers.0.in\\+.weight' do not divide into 3",
        ),
        ({}, [], "no constraint is given, so nothing would be bounded"),
    ],
)
def test_rules_by_type_that_do_not_fit_are_refused(rules: Any, overrides: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        constraints_by_type(Net(), rules, overrides=overrides)
    assert "\n" not in str(caught.value)


def test_a_name_that_two_classes_have_is_refused() -> None:
    other = type("Linear", (nn.Linear,), {})
    model = nn.Sequential(nn.Linear(2, 2), other(2, 2))
    with pytest.raises(UserError, match=r"'Linear' is the name of several classes in the model, torch\.nn"):
        constraints_by_type(model, {"Linear": ONE})
    for kind, pattern in ((nn.Linear, r"0\.weight"), (other, r"1\.weight")):  # neither stands for the other
        assert [rule["pattern"] for rule in constraints_by_type(model, {kind: ONE})] == [pattern]


def test_rows_of_a_transposed_weight_are_refused() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(12, 4), nn.Linear(12, 12))
    assert effect(model, constraints_by_type(model, {"Conv1D": ONE})) == {"0.weight": ("spectral_normalize", 1.0)}
    by_head = {**ONE, "norm": "per_head", "heads": 2}
    said = r"Conv1D stores '0\.weight' as \(in, out\), so its rows are inputs and the norm {} says nothing"
    for rule, norm in ((by_head, "per_head"), (ROWS, "row")):
        with pytest.raises(UserError, match=said.format(norm)):
            constraints_by_type(model, {conv1d: rule})
        with pytest.raises(UserError, match=said.format(norm)):  # or by name
            constraints_by_type(model, {"Linear": ONE}, overrides=[{**rule, "pattern": r"0\.weight"}])
