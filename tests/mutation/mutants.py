"""Mutants of the kernel: one mistake each, made in the text of one function.

Which mistakes (``kind``):

- ``term``: an argument of ``add_up``, ``norm_up`` or ``max``, or a side of ``+``, is left out;
- ``factor``: an argument of ``mul_up``, a side of ``*``, or the divisor of ``div_up`` is left out;
- ``count``: a constant number of roundings (``gamma(6, u)``) is one less;
- ``constant``: what a rule claims as its Lipschitz bound in one geometry is lowered by 2 % (no change of text).

The last rounding up of a result (``up``, ``nextafter``) is not removed: tests of ``rounding.py`` look at that. Only
functions that a bound rests on are mutated: what ``gains``, ``lipschitz``, ``offset``, ``size`` and ``rounding`` of a
rule use, and the core files as CORE says. Rules are found in the table and files in the folder, so new ones take part.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BOUND_METHODS = ("gains", "lipschitz", "offset", "size", "rounding")
# Files that hold no bound, and of other core files the functions that do (files not named here: all functions).
NO_BOUND = {"__init__", "certificate", "check", "errors", "program", "strict_json", "trust", "weights"}
NO_RULE = {"__init__", "attributes", "scalars", "table"}
CORE: dict[str, tuple[str, ...]] = {
    "engine": ("node_errors", "rounding_error"),
    "rule": ("Rule.lipschitz", "Rule.size", "tightened"),
    "rounding": ("gamma", "norm_up", "array_norm_up", "Arithmetic.total", "Arithmetic.dot", "Arithmetic._stored"),
}
# Functions that only choose where to look, and names that only say how much is done at once: whatever they are, the
# result is a bound. What goes into a self-test of products (SELF_TESTS) is no part of a bound either.
ESTIMATES, PORTIONS, SELF_TESTS = {"_candidates"}, {"step", "size"}, {"freivalds"}
_SUMS, _COUNTS = ("add_up", "norm_up", "max"), ("gamma", "dot", "total")


@dataclass(frozen=True)
class Mutant:
    """One mistake. ``name`` is stable under changes elsewhere; ``path`` is relative to ``bounds``; ``text`` the file.

    ``owner`` is the class (or "" for a function of the module); for a lowered constant ``text`` is empty and ``owner``
    the operation, ``function`` the geometry.
    """

    name: str
    kind: str
    path: str
    owner: str
    function: str
    text: str = ""


def mutants_of(path: Path, root: Path) -> list[Mutant]:
    """Every mutant of one file of the kernel."""
    source = path.read_text()
    relative = path.relative_to(root).as_posix()
    result = []
    for owner, function in _functions(ast.parse(source), path.parent.name == "rules", CORE.get(path.stem)):
        label = f"{owner}.{function.name}" if owner else function.name
        seen: dict[str, int] = {}
        for kind, node, replacement, dropped in _mistakes(function):
            what = f"{relative} {label} {kind} {dropped}"
            seen[what] = seen.get(what, 0) + 1
            name = what if seen[what] == 1 else f"{what} #{seen[what]}"
            result.append(Mutant(name, kind, relative, owner, function.name, _replaced(source, node, replacement)))
    return result


def bound_files(root: Path) -> list[Path]:
    """The files of the kernel that hold bounds."""
    core = [path for path in sorted(root.glob("*.py")) if path.stem not in NO_BOUND]
    return core + [path for path in sorted(root.glob("rules/*.py")) if path.stem not in NO_RULE]


def _functions(tree: ast.Module, rules: bool, named: tuple[str, ...] | None) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(class or "", function) for every function that bounds rest on."""
    found = [("", node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in ESTIMATES]
    for each in tree.body:
        if isinstance(each, ast.ClassDef):
            found += [(each.name, node) for node in each.body if isinstance(node, ast.FunctionDef)]
    if named is not None:
        found = [(owner, node) for owner, node in found if (f"{owner}.{node.name}" if owner else node.name) in named]
    elif rules and any(node.name in BOUND_METHODS for _, node in found):
        reached = _reached({node.name: node for _, node in found})
        found = [(owner, node) for owner, node in found if node.name in reached]
    yield from found


def _reached(functions: dict[str, ast.FunctionDef]) -> set[str]:
    """Names of functions that the bound methods use, by name, one from the other."""
    reached, waiting = set[str](), [name for name in functions if name in BOUND_METHODS]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for node in ast.walk(functions[name]):
            used = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if used in functions and used not in ("apply", "shape"):
                waiting.append(used)
    return reached


def _mistakes(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr, ast.expr, str]]:
    """(kind, node, what replaces it, what is dropped) for every mistake in a function."""
    tested = _only_tested(function)
    for node in _arithmetic(function, tested):
        if isinstance(node, ast.Call):
            yield from _in_call(node)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
            kind = "term" if isinstance(node.op, ast.Add) else "factor"
            yield kind, node, node.right, f"{ast.unparse(node.left)} of {ast.unparse(node)}"
            yield kind, node, node.left, f"{ast.unparse(node.right)} of {ast.unparse(node)}"


def _in_call(node: ast.Call) -> Iterator[tuple[str, ast.expr, ast.expr, str]]:
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    whole = ast.unparse(node)
    if name in (*_SUMS, "mul_up") and isinstance(node.func, ast.Name) and len(node.args) > 1:
        for index, argument in enumerate(node.args):
            if name == "max" and ast.unparse(argument) == "0.0":
                continue  # a guard, not a term
            without = copy.copy(node)
            without.args = node.args[:index] + node.args[index + 1 :]
            if name == "max" and len(without.args) == 1 and not isinstance(without.args[0], ast.Starred):
                yield "term", node, without.args[0], f"{ast.unparse(argument)} of {whole}"
            else:
                yield "term" if name in _SUMS else "factor", node, without, f"{ast.unparse(argument)} of {whole}"
    elif name == "div_up" and len(node.args) == 2:
        yield "factor", node, node.args[0], f"{ast.unparse(node.args[1])} of {whole}"
    elif name in _COUNTS and node.args and isinstance(node.args[0], ast.Constant):
        count = node.args[0].value
        if isinstance(count, int) and count > 0:
            fewer = copy.copy(node)
            fewer.args = [ast.Constant(count - 1), *node.args[1:]]
            yield "count", node, fewer, f"1 of {whole}"


def _arithmetic(node: ast.AST, skipped: set[str]) -> Iterator[ast.expr]:
    """Expressions of a function where arithmetic happens: not in messages, refusals, labels, annotations or indices,
    nor in what is assigned to ``skipped`` names.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.JoinedStr, ast.Raise, ast.Subscript, ast.arguments)):
            continue
        if _is_call(child, {"need", *SELF_TESTS}):
            continue
        if isinstance(child, ast.Assign) and _targets(child) <= skipped:
            continue
        if isinstance(child, (ast.Call, ast.BinOp)) and not _joins(child):
            yield child
        yield from _arithmetic(child, skipped)


def _is_call(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _targets(node: ast.Assign) -> set[str]:
    return {each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def _only_tested(function: ast.FunctionDef) -> set[str]:
    """Names that only self-tests read, and portions."""
    skipped = set(PORTIONS)
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    for _ in assigned:  # a name may lead to a self-test through others
        read = {name for child in function.body for name in _reads(child, skipped)}
        skipped |= {name for node in assigned for name in _targets(node) if name not in read}
    return skipped


def _reads(node: ast.AST, skipped: set[str]) -> Iterator[str]:
    """Names that are read outside of self-tests and of assignments to skipped names."""
    if _is_call(node, SELF_TESTS) or (isinstance(node, ast.Assign) and _targets(node) <= skipped):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _reads(child, skipped)


def _joins(node: ast.AST) -> bool:
    """Whether ``+`` joins sequences, or a list or text is repeated."""
    parts = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
    text = [part for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return bool(text) or any(isinstance(part, (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr)) for part in parts)


def _replaced(source: str, node: ast.expr, replacement: ast.expr) -> str:
    """The source with one expression replaced (in parentheses, so that precedence stays)."""
    lines = source.encode().splitlines(keepends=True)
    assert node.end_lineno is not None and node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    text = source.encode()
    return (text[:start] + f"({ast.unparse(replacement)})".encode() + text[end:]).decode()
