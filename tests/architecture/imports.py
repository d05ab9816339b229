"""Reads which module of a package imports what, and finds what the design forbids.

Each check takes the folder of a package called `hf_lipschitz` and returns one line for each violation, so that the
same check runs on the real package and on small trees with a planted violation. Imports are read from the syntax tree;
nothing is imported.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Literal

PACKAGE = "hf_lipschitz"

# Room -> the rooms right below it. A room may import what stands below it, and what stands below that; `errors` stands
# below all but the kernel. The command line stands on everything.
BELOW: dict[str, tuple[str, ...]] = {
    "bounds": (),
    "errors": (),
    "recipes": (),
    "checkpoint_folder": (),
    "remote_code": (),
    "caps": ("bounds",),
    "optim": ("caps",),
    "nn": ("bounds", "caps"),
    "lowering": ("bounds",),
    "foreign": ("bounds",),
    "certify": ("bounds", "lowering", "foreign"),
    "casting": ("remote_code",),
    "trace_tree": ("bounds",),
    "trace": ("bounds", "trace_tree"),
    "models": ("nn", "certify", "remote_code"),
    "auto": ("models",),
    "timm": ("models",),
    "hub": ("bounds", "checkpoint_folder"),
    "trust_base": ("bounds",),
    "configuration_check": ("bounds", "remote_code"),
    "verdict": ("bounds",),
    "verification": ("bounds", "hub", "models", "configuration_check", "trust_base", "verdict"),
    "evaluation": ("bounds", "nn"),
    "weight_change": ("bounds", "certify", "evaluation"),
    "model_card": ("hub", "evaluation", "certify"),
    "training": ("models", "optim", "caps", "certify", "evaluation", "hub", "model_card"),
    "testing": ("bounds", "caps", "nn"),
}
EVERYTHING = "cli"

# Of the standard library, what runs code that the reader does not see, or reaches outside the folder being checked.
_KERNEL_REFUSES = {
    *("importlib", "imp", "pkgutil", "runpy", "zipimport", "code", "codeop"),
    *("pickle", "shelve", "marshal", "copyreg", "ctypes", "subprocess", "multiprocessing", "socket", "urllib", "http"),
}
_KERNEL_REFUSES_CALLS = {"__import__", "eval", "exec", "compile"}

# The command line starts fast: its modules import these and nothing else at their top.
_CLI_TOP = {"typer", "rich"}


@dataclass(frozen=True)
class Import:
    """One imported module: who imports it, on which line, and whether at the top, in a function, or for types only."""

    module: str
    target: str
    line: int
    when: Literal["top", "deferred", "typing"]

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def sources(package: Path) -> dict[str, Path]:
    """Dotted module name -> file, for every module of the package."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        modules[".".join((PACKAGE, *parts))] = path
    return modules


def imports(package: Path) -> list[Import]:
    """Every import statement of every module but the package's own `__init__`, which names all rooms lazily."""
    modules = sources(package)
    return [
        found
        for module, path in modules.items()
        if module != PACKAGE
        for found in dict.fromkeys(_imports_of(module, path, frozenset(modules)))  # once, not for each name
    ]


def room(module: str) -> str:
    """The room that a module of the package stands in: the first name after the package's."""
    return module.split(".")[1] if "." in module else ""


def stands_on(source: str) -> set[str]:
    """The rooms that a room may import."""
    below: set[str] = set() if source in {"bounds", "errors"} else {"errors"}
    todo = list(BELOW[source])
    while todo:
        below.add(here := todo.pop())
        todo += BELOW[here]
    return below


def wrong_directions(package: Path) -> list[str]:
    """Imports from a room that does not stand below, and imports of the package's own lazy names."""
    found = []
    for each in imports(package):
        if not _is_ours(each.target):
            continue
        source, target = room(each.module), room(each.target)
        if source not in BELOW and source != EVERYTHING:
            found.append(f"{each.module}: the room {source!r} stands in no table; add it to BELOW")
        elif target in {"", "__version__"}:
            if source == "bounds" or target == "":
                found.append(f"{each}: name the module that defines it")
        elif target != source and source != EVERYTHING and target not in stands_on(source):
            found.append(f"{each}: {target} does not stand below {source}")
    return found


def cycles(package: Path) -> list[str]:
    """The first cycle among imports that happen at run time, those inside functions included."""
    graph: dict[str, set[str]] = {module: set() for module in sources(package)}
    for each in imports(package):
        if each.when != "typing" and each.target in graph and each.target not in {each.module, PACKAGE}:
            graph[each.module].add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def impure_kernel(package: Path) -> list[str]:
    """What the kernel imports besides the standard library and NumPy, and how it could run code unseen."""
    found = []
    for each in imports(package):
        top = each.target.split(".")[0]
        if room(each.module) != "bounds" or (_is_ours(each.target) and room(each.target) == "bounds"):
            continue
        if top != "numpy" and (top not in sys.stdlib_module_names or top in _KERNEL_REFUSES):
            found.append(f"{each}: the kernel stands on the standard library and NumPy alone")
    for module, path in sources(package).items():
        if room(module) == "bounds":
            found += [f"{module}:{line} calls {name}" for line, name in _refused_calls(path)]
    return found


def heavy_command_line(package: Path) -> list[str]:
    """Imports at the top of the command line's modules that would make `--help` slow: they belong in the commands."""
    found = []
    for each in imports(package):
        top = each.target.split(".")[0]
        light = top in sys.stdlib_module_names or top in _CLI_TOP
        light = light or (_is_ours(each.target) and room(each.target) in {EVERYTHING, "errors", "__version__"})
        if room(each.module) == EVERYTHING and each.when == "top" and not light:
            found.append(f"{each}: import it inside the command")
    return found


def undeclared(package: Path, pyproject: Path) -> list[str]:
    """Imports of distributions that pyproject.toml does not name among the dependencies."""
    wanted = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    declared = {_normal(text.split(">")[0]) for text in wanted}
    homes = packages_distributions()
    found = []
    for each in imports(package):
        top = each.target.split(".")[0]
        if _is_ours(each.target) or top in sys.stdlib_module_names or each.when == "typing":
            continue
        if not declared & {_normal(name) for name in homes.get(top, [top])}:
            found.append(f"{each}: pyproject.toml does not name it")
    return found


def _is_ours(target: str) -> bool:
    return target.split(".")[0] == PACKAGE


def _normal(distribution: str) -> str:
    return distribution.strip().lower().replace("_", "-")


def _refused_calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and node.id in _KERNEL_REFUSES_CALLS:
            yield node.lineno, node.id
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"np.load", "numpy.load"}:
            yield node.lineno, "np.load"  # which can unpickle


def _imports_of(module: str, path: Path, modules: frozenset[str]) -> Iterator[Import]:
    parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, when in _statements(ast.parse(path.read_text()), "top"):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, when)
        else:
            base = _absolute(node, parent)
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                is_name_of_root = base == PACKAGE and alias.name == "__version__"
                yield Import(module, deeper if deeper in modules or is_name_of_root else base, node.lineno, when)


def _absolute(node: ast.ImportFrom, parent: str) -> str:
    if not node.level:
        return node.module or ""
    base = parent.split(".")[: len(parent.split(".")) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


_When = Literal["top", "deferred", "typing"]


def _statements(node: ast.AST, when: _When) -> Iterator[tuple[ast.Import | ast.ImportFrom, _When]]:
    """The import statements below a node, each with the time at which it runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(child, "deferred" if when == "top" else when)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for statement in child.body:
                yield from _statements(ast.Module([statement], []), "typing")
            for statement in child.orelse:
                yield from _statements(ast.Module([statement], []), when)
        else:
            yield from _statements(child, when)
