"""The normative pages state every built-in operation as its rule declares it, and the kernel's limits on cost."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_lipschitz.bounds import engine, program
from hf_lipschitz.bounds.rule import Rule
from hf_lipschitz.bounds.rules import scalars
from hf_lipschitz.bounds.rules.table import BUILT_IN

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_FORMAT, _OPERATIONS = ((_DOCS / f"{name}.md").read_text() for name in ("certificate_format", "operations"))
_LINES = (_FORMAT + "\n" + _OPERATIONS).splitlines()
_NAMES = [name for line in _LINES for name in re.findall(r"^\| `(\w+@\d+)` \|", line)]
_ROWS = {name: line for line in _LINES for name in re.findall(r"^\| `(\w+@\d+)` \|", line)}
_KINDS = r"int|num|bool|pair|ints|nums"


def _cells(row: str) -> list[str]:
    """The cells of a table row: operation, attributes, slots and what follows."""
    return [cell.strip() for cell in row.replace(r"\|", "").strip("| ").split("|")]


ROWS = {name: _cells(row) for name, row in _ROWS.items()}


def _attributes(cell: str) -> dict[str, str]:
    """The kind of each attribute, as text."""
    return {name: kind.strip() for name, kind in re.findall(r"`(\w+)`: ([^;]+)", cell)}


def _slots(cell: str) -> dict[str, tuple[str, str]]:
    """Slot -> ("?" or nothing, its shape as text or nothing)."""
    return {name: (mark, shape) for name, mark, shape in re.findall(r"`(\w+)`(\??)(?: \(([^)]*)\))?", cell)}


def _number(text: str) -> float:
    base, _, power = text.partition("^")
    return int(base) ** int(power) if power else float(text)


def _probes(kind: str) -> Iterator[tuple[Any, bool]]:
    """Values that an attribute of a kind must take (True) or refuse (False), at the ends of what it may be."""
    if kind.startswith('"'):
        choices = re.findall(r'"([^"]+)"', kind)
        yield from [*((choice, True) for choice in choices), ("none of these", False), ("", False), (True, False)]
        return
    name, _, range_ = kind.partition(" ")
    if name == "bool":
        yield from [(True, True), (False, True), (1, False), ("true", False)]
        return
    low, high = (_number(end) if end else sign * 2.0**1000 for sign, end in zip((-1, 1), _ends(range_), strict=True))
    whole = name in ("int", "pair", "ints")
    inside = [int(low), int(high)] if whole else [low, high]
    outside = (
        [int(low) - 1, int(high) + 1] if whole else [math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]
    )
    wrong = [*outside, True, "1", None, math.nan, *([float(inside[0])] if whole else [])]
    if name in ("int", "num"):
        yield from [*((value, True) for value in inside), *((value, False) for value in wrong)]
        return
    count = 2 if name == "pair" else 65536
    lists = [[value] * count for value in inside]
    yield from [
        *((values, True) for values in lists),
        *(([*values[1:], bad], False) for values in lists for bad in wrong),
    ]
    yield from [([], False), ([*lists[0], inside[0]], False), (inside[0], False)]
    if name != "pair":
        yield [inside[0]], True


def _ends(range_: str) -> tuple[str, str]:
    low, _, high = range_.partition("..")
    return low, high


def _differences(rows: dict[str, list[str]], rule: Rule) -> list[str]:
    """What the rule and its row do not agree on."""
    if rule.op not in rows:
        return [rule.op]
    _, attributes, slots, *_ = rows[rule.op]
    kinds, shapes = _attributes(attributes), _slots(slots)
    found = sorted({*kinds, *shapes} ^ {*rule.attrs, *rule.tensors, *rule.scalars})
    found += sorted({name for name, (mark, _) in shapes.items() if mark} ^ rule.optional)
    sizes = {name: shape.count(",") + 1 for name, (_, shape) in shapes.items() if shape}
    found += [name for name, size in sizes.items() if rule.tensors.get(name) not in (0, size)]
    for name in kinds.keys() & rule.attrs.keys():
        assert re.fullmatch(rf'(?:{_KINDS})(?: \S+)?|(?:"[^"]+"(?:, )?)+', kinds[name]), kinds[name]
        wrong = [value for value, taken in _probes(kinds[name]) if bool(rule.attrs[name](value)) != taken]
        found += [f"{name} = {str(value)[:60]}" for value in wrong]
    return found


@pytest.mark.parametrize("rule", BUILT_IN.values(), ids=lambda rule: rule.op)
def test_the_pages_state_the_rule(rule: Rule) -> None:
    assert _differences(ROWS, rule) == []


def test_the_pages_state_no_other_and_none_twice() -> None:
    assert sorted(_NAMES) == sorted(BUILT_IN)


def test_the_pages_state_how_many_inputs() -> None:
    stated = re.search(
        r"Operations without inputs: (.+?)\. With two inputs `x`, `y`: (.+?)\. All", _OPERATIONS, re.DOTALL
    )
    assert stated
    for arity, names in zip((0, 2), stated.groups(), strict=True):
        assert set(re.findall(r"`(\w+@\d+)`", names)) == {op for op, rule in BUILT_IN.items() if rule.arity == arity}
    assert {rule.arity for rule in BUILT_IN.values()} == {0, 1, 2}


def test_the_pages_state_the_limits_on_cost() -> None:
    stated = [_number(value) for value in re.findall(r"^\| [^|]+ \| (\d+(?:\^\d+)?) \|$", _FORMAT, re.MULTILINE)]
    work = [engine.MAX_ENTRIES, engine.MAX_TOTAL, engine.MAX_WORK, engine.WORK_RATIO]
    assert stated == [program.MAX_NODES, *work, scalars.MAX_ENTRIES, scalars.MAX_COST]


@pytest.mark.parametrize(
    ("op", "old", "new"),
    [
        ("linear@1", "`transpose`", "`axis`"),
        ("linear@1", "`bias`?", "`bias`"),
        ("linear@1", "(o, d)", "(o)"),
        ("pad@1", '"circular"', '"wrapped"'),
        ("patchify@1", "1..4096", "1..4097"),
        ("convolution@1", "pair 1..4096", "pair 0..4096"),
        ("normalize@1", "1e-6", "1e-7"),
        ("hardtanh@1", "num", "int"),
        ("average_pool@1", "bool", "int 0..1"),
    ],
)
def test_a_difference_is_found(op: str, old: str, new: str) -> None:
    row = " | ".join(ROWS[op])
    assert old in row
    assert _differences({op: _cells(row.replace(old, new, 1))}, BUILT_IN[op])


def test_a_missing_row_is_found() -> None:
    assert _differences({}, BUILT_IN["linear@1"]) == ["linear@1"]
