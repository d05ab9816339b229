"""Every module, and every public function and class of a module, says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.imports import sources

_PACKAGE = Path(__file__).resolve().parents[2] / "hf_lipschitz"
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _undocumented(text: str) -> list[str]:
    """The public definitions at the top of a source text that have no docstring; "module" for the text itself."""
    tree = ast.parse(text)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["module"]
    for node in tree.body:
        if isinstance(node, _DEFINITIONS) and not node.name.startswith("_") and not ast.get_docstring(node):
            missing.append(node.name)
    return missing


@pytest.mark.parametrize(("name", "path"), sources(_PACKAGE).items())
def test_a_module_is_documented(name: str, path: Path) -> None:
    assert _undocumented(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("", []),
        ("x = 1\n", ["module"]),
        ('"""M."""\ndef f(): ...\nclass A:\n    pass\nasync def g(): ...\n', ["f", "A", "g"]),
        ('"""M."""\ndef _f(): ...\ndef f():\n    """F."""\n    def inner(): ...\n', []),
        ('"""M."""\ndef f():\n    """"""\n', ["f"]),
    ],
)
def test_a_planted_omission_is_found(text: str, missing: list[str]) -> None:
    assert _undocumented(text) == missing
