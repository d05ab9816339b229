"""The normative page lists every built-in operation with the attributes, tensors and scalars that its rule declares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_lipschitz.bounds.rule import Rule
from hf_lipschitz.bounds.rules.table import BUILT_IN

_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "certificate_format.md").read_text()
_ROWS = {name: row for row in _PAGE.splitlines() for name in re.findall(r"^\| `(\w+@\d+)` \|", row)}


def _differences(rows: dict[str, str], rule: Rule) -> list[str]:
    """Names that stand in the rule and not in its row, or the other way round."""
    if rule.op not in rows:
        return [rule.op]
    _, _, attributes, tensors, *_ = rows[rule.op].split(" | ")
    stated = set(re.findall(r"`(\w+)`", attributes)) | set(re.findall(r"`(\w+)`", tensors))
    return sorted(stated ^ {*rule.attrs, *rule.tensors, *rule.scalars})


def _cells(row: str) -> str:
    """Empty cells with the spaces that the split of ``_differences`` expects."""
    return " | ".join(["", *(cell.strip() for cell in row.replace(r"\|", "").strip("| ").split("|"))])


ROWS = {name: _cells(row) for name, row in _ROWS.items()}


@pytest.mark.parametrize("rule", BUILT_IN.values(), ids=lambda rule: rule.op)
def test_the_page_states_the_rule(rule: Rule) -> None:
    assert _differences(ROWS, rule) == []


def test_the_page_states_no_other() -> None:
    assert set(ROWS) == set(BUILT_IN)


def test_a_difference_is_found() -> None:
    row = ROWS["linear@1"]
    assert _differences({"linear@1": row.replace("`transpose`", "`axis`", 1)}, BUILT_IN["linear@1"])
    assert _differences({}, BUILT_IN["linear@1"]) == ["linear@1"]
