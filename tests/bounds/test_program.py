"""Bound programs: one canonical form, and a reader that refuses everything else with one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import MAX_NODES, Node, Program


def _program() -> Program:
    """Two branches that join: input, scale, linear (with bias), residual, pool and head."""
    nodes = (
        Node("input@1", (), {"shape": [2, 4], "space": "model_input"}),
        Node("linear@1", (0,), {"transpose": False}, {"bias": "b", "weight": "w"}),
        Node("residual@1", (0, 1), scalars={"weight": ["sigmoid", ["tensor", "a"]]}),
        Node("sum_pool@1", (2,)),
        Node("normalized_linear@1", (3,), {"eps": 1e-12}, {"weight": "head"}),
    )
    return Program(nodes, {"features": 3, "logits": 4})


def test_json_round_trip() -> None:
    program = _program()
    text = strict_json.canonical(program.to_json())
    again = Program.from_json(json.loads(text))
    assert again == program == program.canonical()
    assert again.canonical_bytes() == text
    assert program.tensor_names() == {"a", "b", "head", "w"}


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4)])
def test_order_and_unused_nodes_do_not_matter_to_the_canonical_form(order: tuple[int, ...]) -> None:
    """The same computation built in another order, with a node that leads nowhere, has the same canonical bytes."""
    nodes = [
        Node("input@1", (), {"shape": [2, 4], "space": "model_input"}),
        Node("maxmin@1", (0,)),
        Node("linear@1", (0,), {"transpose": False}, {"weight": "w", "bias": "b"}),
        Node("residual@1", (0, 2), scalars={"weight": ["sigmoid", ["tensor", "a"]]}),
        Node("sum_pool@1", (3,)),
        Node("normalized_linear@1", (4,), {"eps": 1e-12}, {"weight": "head"}),
    ]
    program = Program(tuple(nodes), {"logits": 5, "features": 4})
    assert program.canonical_bytes() == _program().canonical_bytes()
    assert program.canonical() == _program()


def test_different_computations_have_different_bytes() -> None:
    """Swapped branches, outputs, tensors, and a value of another type are other programs."""
    reference = _program().to_json()
    changes: list[Callable[[Any], None]] = [
        lambda p: p["nodes"][2].update(inputs=[1, 0]),
        lambda p: p["outputs"].update(features=2),
        lambda p: p["nodes"][1]["tensors"].update(weight="b", bias="w"),
        lambda p: p["nodes"][4]["attrs"].update(eps=1),
        lambda p: p["nodes"][4]["attrs"].update(eps=1.0),
        lambda p: p["nodes"][4]["attrs"].update(eps=True),
        lambda p: p["nodes"][0]["attrs"].update(shape=[2, 4.0]),
        lambda p: p["nodes"][2]["scalars"].update(weight=["sigmoid", ["tensor", "b"]]),
    ]
    seen = {strict_json.canonical(reference)}
    for change in changes:
        other = copy.deepcopy(reference)
        change(other)
        seen.add(strict_json.canonical(other))
    assert len(seen) == len(changes) + 1


def _node(program: Any, index: int) -> Any:
    return program["nodes"][index]


_REFUSED: list[tuple[str, Callable[[Any], Any], str]] = [
    ("unknown key", lambda p: p.update(version=1), "unknown key 'version'"),
    ("missing key", lambda p: p.pop("outputs"), "'outputs' is missing"),
    ("nodes no list", lambda p: p.update(nodes={}), "expected a list"),
    ("no nodes", lambda p: p.update(nodes=[]), "1 to 20000 nodes"),
    ("too many nodes", lambda p: p.update(nodes=[_node(p, 0)] * (MAX_NODES + 1)), "1 to 20000 nodes"),
    ("unknown node key", lambda p: _node(p, 1).update(name="x"), "node 1: unknown key 'name'"),
    ("missing node key", lambda p: _node(p, 1).pop("scalars"), "node 1: the key 'scalars' is missing"),
    ("node no object", lambda p: p["nodes"].__setitem__(3, None), "node 3: expected an object"),
    ("op no string", lambda p: _node(p, 1).update(op=5), "node 1: 'op' must be a string"),
    ("forward reference", lambda p: _node(p, 1).update(inputs=[2]), "node 1 .linear@1.: inputs"),
    ("self reference", lambda p: _node(p, 1).update(inputs=[1]), "inputs: expected integers from 0 to 0"),
    ("negative reference", lambda p: _node(p, 1).update(inputs=[-1]), "inputs"),
    ("boolean reference", lambda p: _node(p, 1).update(inputs=[False]), "inputs"),
    ("float reference", lambda p: _node(p, 1).update(inputs=[0.0]), "inputs"),
    ("inputs no list", lambda p: _node(p, 1).update(inputs="0"), "inputs: expected a list"),
    ("input of the first node", lambda p: _node(p, 0).update(inputs=[0]), "node 0 .input@1.: inputs"),
    ("attrs no object", lambda p: _node(p, 1).update(attrs=[]), "attrs: expected an object"),
    ("tensors no object", lambda p: _node(p, 1).update(tensors="w"), "tensors: expected an object"),
    ("tensor no name", lambda p: _node(p, 1)["tensors"].update(weight=3), "tensors: every value must be a string"),
    ("scalars no object", lambda p: _node(p, 2).update(scalars=[]), "scalars: expected an object"),
    ("bad expression", lambda p: _node(p, 2).update(scalars={"weight": ["log", 1]}), "unknown scalar operation 'log'"),
    ("unknown output", lambda p: p["outputs"].update(other=1), "outputs: unknown key 'other'"),
    ("missing output", lambda p: p["outputs"].pop("logits"), "'logits' is missing"),
    ("output out of range", lambda p: p["outputs"].update(logits=5), "outputs: expected integers from 0 to 4"),
    ("output boolean", lambda p: p["outputs"].update(logits=True), "outputs: expected integers"),
    ("unreachable node", lambda p: p["outputs"].update(logits=3), "canonical order, or some lead to no output"),
    ("not canonical", lambda p: p["outputs"].update(features=4, logits=3) or _reorder(p), "canonical order"),
]


def _reorder(program: Any) -> None:
    """Put the second branch of the residual first: the same function, another order."""
    program["nodes"].insert(1, copy.deepcopy(program["nodes"][1]))
    program["nodes"][3]["inputs"] = [2, 1]
    program["nodes"][4]["inputs"], program["nodes"][5]["inputs"] = [3], [4]
    program["outputs"].update(features=4, logits=5)


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in _REFUSED], ids=[row[0] for row in _REFUSED])
def test_refused(change: Callable[[Any], Any], message: str) -> None:
    value = _program().to_json()
    Program.from_json(value)
    change(value)
    with pytest.raises(KernelError, match=message) as caught:
        Program.from_json(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, "x", [], [1]])
def test_what_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(KernelError, match="program: expected an object"):
        Program.from_json(value)


_TEXTS = [
    (b'{"a": 1, "a": 1}', "the key 'a' stands twice"),
    (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
    (b'{"a": NaN}', "NaN is not a number"),
    (b'{"a": -Infinity}', "-Infinity is not a number"),
    (b'{"a": 1e999}', "1e999 is not a number"),
    (b'{"a": -1e999}', "is not a number"),
    (b'{"a": ' + b"9" * 400 + b"}", "is not a number"),
    (b'{"a": 9007199254740993}', "9007199254740993 is not a number"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    (b"\xef\xbb\xbf{}", "not valid JSON"),
    (b'{"a": 1', "not valid JSON"),
    (b"", "not valid JSON"),
    (b"{} {}", "not valid JSON"),
    (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
    (b"[" * 100_000, "nested deeper than 64"),
    (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper than 64"),
]


@pytest.mark.parametrize(("data", "message"), _TEXTS, ids=[str(row[0][:20]) for row in _TEXTS])
def test_texts_that_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(KernelError, match=f"^the file: .*{message}"):
        strict_json.parse(data, "the file")


def test_a_text_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_BYTES", 8)
    with pytest.raises(KernelError, match="exceed the limit of 8"):
        strict_json.parse(b'{"a": 123}', "the file")


def test_messages_show_escapes_instead_of_what_a_terminal_would_obey() -> None:
    value = _program().to_json()
    value["nodes"][1]["op"] = "lin\x1b[2J\near\ud800"
    value["nodes"][1]["inputs"] = [9]
    with pytest.raises(KernelError) as caught:
        Program.from_json(value)
    assert str(caught.value).isprintable()
    assert r"\x1b[2J\near\ud800" in str(caught.value)
