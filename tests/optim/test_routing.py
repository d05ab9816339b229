"""Routing: plain data in and out, the first match wins, and every mistake is one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.routing import Constraint, bare_model, constraints_of, route, routing_table
from tests.optim.models import CONSTRAINTS, small_net

GOOD = {"pattern": r"a\.weight", "cap": "stiefel", "norm": "spectral", "value": 1.0}


@pytest.mark.parametrize("data", CONSTRAINTS, ids=lambda data: data["cap"])
def test_plain_data_survives_a_round_trip(data: dict[str, Any]) -> None:
    assert Constraint.from_dict(data).to_dict() == data


def test_the_norm_is_the_caps_own_where_it_is_left_out() -> None:
    assert Constraint.from_dict({"pattern": "x", "cap": "row_normalize", "value": 2}).to_dict() == {
        "pattern": "x",
        "cap": "row_normalize",
        "norm": "row",
        "value": 2.0,
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("stiefel", "a constraint is a mapping with the keys pattern, cap, norm, value, heads, not 'stiefel'"),
        ({**GOOD, "caps": 1}, r"constraint 'a\\\\.weight': unknown key 'caps'; known keys are pattern, cap, norm"),
        ({"cap": "stiefel", "value": 1.0}, "constraint None: the key 'pattern' is missing"),
        ({"pattern": "x", "value": 1.0}, "constraint 'x': the key 'cap' is missing"),
        ({"pattern": "x", "cap": "stiefel"}, "constraint 'x': the key 'value' is missing"),
        ({**GOOD, "pattern": 3}, "constraint 3: the pattern must be a text"),
        ({**GOOD, "pattern": "*.weight"}, r"constraint '\*\.weight': not a regular expression"),
        ({**GOOD, "cap": "stifel"}, "no cap named 'stifel': did you mean 'stiefel'"),
        ({**GOOD, "cap": None}, "no cap named None"),
        ({**GOOD, "norm": "row"}, "stiefel enforces the norm spectral or per_head, not 'row'"),
        ({**GOOD, "cap": "row_normalize"}, "row_normalize enforces the norm row, not 'spectral'"),
        ({**GOOD, "value": 0}, "the value must be a positive number, not 0"),
        ({**GOOD, "value": -1.0}, "the value must be a positive number, not -1.0"),
        ({**GOOD, "value": float("nan")}, "the value must be a positive number, not nan"),
        ({**GOOD, "value": float("inf")}, "the value must be a positive number, not inf"),
        ({**GOOD, "value": True}, "the value must be a positive number, not True"),
        ({**GOOD, "value": "1"}, "the value must be a positive number, not '1'"),
        ({**GOOD, "norm": "per_head"}, "the norm per_head needs 'heads'"),
        ({**GOOD, "norm": "per_head", "heads": 0}, "the norm per_head needs 'heads'"),
        ({**GOOD, "norm": "per_head", "heads": 2.0}, "the norm per_head needs 'heads'"),
        ({**GOOD, "heads": 2}, "'heads' belongs to the norm per_head only"),
    ],
)
def test_a_wrong_rule_is_refused_in_one_sentence(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Constraint.from_dict(data)
    assert "\n" not in str(caught.value)


def test_the_first_rule_that_matches_wins_and_roles_follow() -> None:
    rules = [{**GOOD, "pattern": r"blocks\.1\.weight", "value": 3.0}, *CONSTRAINTS]
    found = {line.name: line for line in route(small_net().named_parameters(), rules)}
    values = {name: line.constraint and (line.constraint.cap, line.constraint.value) for name, line in found.items()}
    assert values == {
        "scale": None,
        "blocks.0.weight": ("stiefel", 1.0),
        "blocks.0.bias": None,
        "blocks.1.weight": ("stiefel", 3.0),
        "blocks.1.bias": None,
        "attention.weight": ("spectral_normalize", 0.5),
        "head.weight": ("row_normalize", 1.0),
        "head.bias": None,
    }
    matrices = {name for name, line in found.items() if line.role == "matrix"}
    assert matrices == {"blocks.0.weight", "blocks.1.weight", "attention.weight"}
    assert found["attention.weight"].shape == (8, 6) and found["scale"].shape == ()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "no constraint is given, so nothing would be bounded"),
        ([{**GOOD, "pattern": "weight"}], "constraint 'weight' matches no parameter: .* first of which are scale, bl"),
        ([{**GOOD, "pattern": "head"}], "constraint 'head' matches no parameter"),
        ([*CONSTRAINTS, {**GOOD, "pattern": "tail.*"}], r"constraint 'tail\.\*' matches no parameter"),
        (
            [{**GOOD, "pattern": r"blocks\.0\..*"}],
            r"matches 'blocks.0.bias' of shape \(6,\), and stiefel needs a matrix",
        ),
        ([{**GOOD, "cap": "row_normalize", "norm": "row", "pattern": "scale"}], r"'scale' of shape \(\), and row_norm"),
        ([{**GOOD, "norm": "per_head", "heads": 4, "pattern": r".*0\.weight"}], "6 rows of .* not divide into 4 heads"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        route(small_net().named_parameters(), rules)


def test_a_pattern_is_matched_against_the_whole_name() -> None:
    named = [("a", torch.ones(2, 2)), ("ab", torch.ones(2, 2))]
    assert [line.constraint is None for line in route(named, [{**GOOD, "pattern": "a"}])] == [False, True]
    with pytest.raises(UserError, match="constraint 'b' matches no parameter"):
        route(named, [{**GOOD, "pattern": "b"}])


def test_an_empty_model_is_refused() -> None:
    with pytest.raises(UserError, match="first of which are none"):
        route([], [GOOD])


def test_the_table_shows_every_parameter() -> None:
    table = routing_table(route(small_net().named_parameters(), CONSTRAINTS)).splitlines()
    assert table[0].split() == ["parameter", "shape", "updated", "as", "cap", "norm", "at", "most"]
    assert len(table) == 9
    assert table[1].split() == ["scale", "scalar", "other", "-", "-", "-"]
    attention = next(line for line in table if line.startswith("attention.weight"))
    assert attention.split() == [
        "attention.weight",
        "8",
        "x",
        "6",
        "matrix",
        "spectral_normalize",
        "per_head",
        "(2)",
        "0.5",
    ]


def test_constraints_come_from_the_models_config() -> None:
    model = small_net()
    with pytest.raises(UserError, match=r"SmallNet has no config.constraints: pass constraints="):
        constraints_of(model)
    model.config = type("Config", (), {"constraints": CONSTRAINTS})()
    assert [rule.to_dict() for rule in constraints_of(model)] == CONSTRAINTS


def test_names_are_those_inside_a_compiled_model() -> None:
    model = small_net()
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert bare_model(compiled) is model
    assert bare_model(model) is model
