"""Routing: plain data in and out, one rule a parameter, and every mistake is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lipschitz.bounds.weights import read_weights
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.enforcement import Enforcer
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


@pytest.mark.parametrize("turn", [1, -1], ids=["in order", "reversed"])
def test_each_parameter_has_the_rule_that_matches_and_roles_follow(turn: int) -> None:
    other = [{**GOOD, "pattern": r"blocks\.1\.weight", "value": 3.0}]
    rules = [*other, {**CONSTRAINTS[0], "pattern": r"blocks\.0\.weight"}, *CONSTRAINTS[1:]][::turn]
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
        (
            [{**GOOD, "pattern": r"blocks\.1\.weight", "value": 3.0}, *CONSTRAINTS],
            r"two constraints, 'blocks\\\\.1\\\\.weight' and 'blocks\\\\.\\\\d\+\\\\.weight', claim the parameter "
            r"'blocks\.1\.weight': narrow one of the patterns",
        ),
        ([*CONSTRAINTS, CONSTRAINTS[2]], r"claim the parameter 'head\.weight'"),
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


FOLDERS = sorted(path.parent for path in Path(__file__).parents[2].glob("model_cards/*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_constraints_of_published_models_still_route(folder: Path) -> None:
    named = [(name, torch.from_numpy(value.copy())) for name, value in read_weights(folder).items()]
    routes = route(named, json.loads((folder / "config.json").read_text())["constraints"])
    assert {line.name for line in routes if len(line.shape) == 2} == {line.name for line in routes if line.constraint}


# A pattern that matches nothing because something was wrapped


@pytest.mark.parametrize(
    ("name", "pattern", "extra"),
    [
        ("blocks.0.base_layer.weight", r"blocks\.\d+\.weight", "'base_layer'"),
        (
            "base_model.model.blocks.0.base_layer.weight",
            r"blocks\.0\.weight",
            "'base_model' and 'model' and 'base_layer'",
        ),
        (
            "base_model.model.model.q.base_layer.weight",
            r"model\.q\.weight",
            "'base_model' and 'model' and 'base_layer'",
        ),
        ("module.head.weight", r"head\.weight", "'module'"),
        ("blocks.0.inner.weight", r"blocks\.0\.weight", "'inner'"),
    ],
)
def test_a_wrapper_that_renames_is_named(name: str, pattern: str, extra: str) -> None:
    named = [("blocks.0.lora_A.weight", torch.ones(2, 2))] * name.startswith("blocks.0.base") + [
        (name, torch.ones(2, 2))
    ]
    said = rf"matches no parameter: .*; it would match '{name}' without {extra}, and LoRA and other wrappers"
    with pytest.raises(UserError, match=said) as caught:
        route(named, [{**GOOD, "pattern": pattern}])
    assert "\n" not in str(caught.value)


def test_what_no_wrapper_explains_gets_no_hint() -> None:
    with pytest.raises(UserError) as caught:
        route([("blocks.0.base_layer.weight", torch.ones(2, 2))], [{**GOOD, "pattern": r"other\.weight|weight"}])
    assert "wrappers" not in str(caught.value)


# Queries, keys and values in one weight


def test_blocks_of_a_fused_weight_are_capped_one_by_one() -> None:
    heads, width, inputs = 2, 4, 6
    model = nn.Module()
    torch.manual_seed(0)
    model.qkv = nn.Linear(inputs, 3 * heads * width, bias=False)
    large = torch.tensor([4.0, 0.1, 9.0, 0.2, 0.3, 2.0])  # blocks in the order q1, q2, k1, k2, v1, v2
    with torch.no_grad():
        blocks = torch.linalg.qr(torch.randn(6, inputs, width))[0].mT * large[:, None, None]
        model.qkv.weight.copy_(blocks.flatten(0, 1))
    rule = {"pattern": r"qkv\.weight", "cap": "spectral_normalize", "norm": "per_head", "value": 1.0}
    enforcer = Enforcer(model, [{**rule, "heads": 3 * heads}])
    assert enforcer.max_excess() == pytest.approx(8.0, rel=1e-6)
    enforcer.apply()
    after = torch.linalg.matrix_norm(model.qkv.weight.detach().double().view(6, width, inputs), 2)
    assert after == pytest.approx(large.clamp(max=1.0).double(), rel=1e-5)  # the small ones stay as they were
    assert enforcer.max_excess() <= 0.0
    for wrong in (heads * 3 + 1, 5):
        with pytest.raises(UserError, match=rf"the 24 rows of 'qkv.weight' do not divide into {wrong} heads"):
            Enforcer(model, [{**rule, "heads": wrong}])
