"""Counts lines: of the kernel against its budget, of files and functions against the house's caps.

A *code line* holds code: blank lines, comments and docstrings are not counted.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

CORE_BUDGET = 1150
RULES_BUDGET = 1800
KERNEL_FILE_CAP = 300
KERNEL_LINE_CAP = 120
FILE_CAP = 400
FUNCTION_CAP = 60

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """The number of code lines of a source text."""
    with_code: set[int] = set()
    for token in tokenize.tokenize(io.BytesIO(text.encode()).readline):
        if token.type not in _NOT_CODE:
            with_code |= set(range(token.start[0], token.end[0] + 1))
    return len(with_code - _docstring_lines(ast.parse(text)))


def over_kernel_budget(package: Path) -> list[str]:
    """Where the kernel (`bounds/`) exceeds its budget of code lines, or one of its files its cap."""
    found = []
    kernel = package / "bounds"
    rules = [path for path in sorted(kernel.rglob("*.py")) if "rules" in path.relative_to(kernel).parts]
    core = [path for path in sorted(kernel.rglob("*.py")) if path not in rules]
    for name, paths, budget in (("core", core, CORE_BUDGET), ("rules", rules, RULES_BUDGET)):
        total = sum(code_lines(path.read_text()) for path in paths)
        if total > budget:
            found.append(f"kernel {name}: {total} code lines (budget {budget})")
    for path in core + rules:
        lines = path.read_text().splitlines()
        if len(lines) > KERNEL_FILE_CAP:
            found.append(f"{path.name}: {len(lines)} lines (cap {KERNEL_FILE_CAP} in the kernel)")
        for number, line in enumerate(lines, 1):
            if len(line) > KERNEL_LINE_CAP:
                found.append(f"{path.name}:{number}: {len(line)} characters (cap {KERNEL_LINE_CAP})")
    return found


def over_house_caps(package: Path) -> list[str]:
    """Files and functions of the package that are too long."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name, text = str(path.relative_to(package)), path.read_text()
        if (lines := len(text.splitlines())) > FILE_CAP:
            found.append(f"{name}: {lines} lines (cap {FILE_CAP})")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_CAP:
                    found.append(f"{name}:{node.lineno}: {node.name} has {size} lines (cap {FUNCTION_CAP})")
    return found


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines
