"""A program as a tree for readers: modules by the names of their tensors, branches where values part and meet again.

Every node but the input has one node that all its inputs come through last (its immediate dominator). From an output
back to the input these make a chain, on which the bound grows by factors that multiply; a node whose inputs are not on
the chain is where branches meet, and each branch is a chain again.

Modules are read off tensor names, as ``blocks.0.fc.weight`` belongs to ``blocks.0.fc``. An operation without tensors is
counted with what its neighbours have in common (a pool between two stages), and one that keeps the shape (an
activation) at least with the module around what it follows. Where branches meet, what they have in common counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_lipschitz.bounds.program import Program

Path = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """One node after ``before`` (-1: it is the input), with the branches that meet in it, one for each input.

    ``branches`` is empty where the node's inputs stand right before it; an empty branch is the value of ``before``
    itself.
    """

    before: int
    index: int
    branches: tuple[tuple[Item, ...], ...] = ()


@dataclass(frozen=True)
class Again:
    """A node that stands elsewhere in the tree already."""

    index: int


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of one module: all the bound passes from ``before`` (-1: nothing) to ``index``."""

    path: Path
    before: int
    index: int
    items: tuple[Item, ...]


Item = Leaf | Again | Block


def layout(program: Program, shapes: Sequence[tuple[int, ...]]) -> tuple[list[Path], tuple[Item, ...]]:
    """The module path of each node, and the tree.

    Args:
        program: in topological order with one input node. shapes: the sample shape of each node's value.
    """
    doms = _dominators(program)
    paths = _paths(program, shapes, doms)
    grower = _Grower(program, doms, paths)
    items: list[Item] = []
    for output in sorted(program.outputs.values(), reverse=True):
        if output not in grower.seen:
            items += grower.grow(-1, output)
    return paths, _grouped(items, (), paths)


def _dominators(program: Program) -> list[int]:
    """The immediate dominator of each node; -1 for the input (Cooper, Harvey and Kennedy 2001; one pass, no loops)."""
    doms: list[int] = []
    for node in program.nodes:
        meeting = node.inputs[0] if node.inputs else -1
        for other in node.inputs[1:]:
            while meeting != other:  # a dominator has a smaller index
                meeting, other = (doms[meeting], other) if meeting > other else (meeting, doms[other])
        doms.append(meeting)
    return doms


def _chain(doms: Sequence[int], top: int, end: int) -> list[int]:
    """The nodes after ``top`` through which all that reaches ``end`` passes, ``end`` last; empty if they are one."""
    found: list[int] = []
    while end != top:
        found.append(end)
        end = doms[end]
    return found[::-1]


def _paths(program: Program, shapes: Sequence[tuple[int, ...]], doms: Sequence[int]) -> list[Path]:
    own = [_common(tuple(name.split(".")[:-1]) for name in node.tensor_names()) for node in program.nodes]
    ahead: list[Path | None] = list(own)  # the module of the next node that has one
    for index in reversed(range(len(own))):
        for i in program.nodes[index].inputs:
            ahead[i] = ahead[i] if ahead[i] is not None else ahead[index]
    paths: list[Path] = []
    for index, node in enumerate(program.nodes):
        mine = own[index]
        if mine is None and len(node.inputs) == 1:
            i = node.inputs[0]
            around = paths[i] if own[i] is None else paths[i][:-1]
            shared = _common([paths[i], ahead[index] or ()]) or ()
            mine = max(around, shared, key=len) if shapes[i] == shapes[index] else shared
        elif mine is None:
            inside = [paths[i] for end in node.inputs for i in _chain(doms, doms[index], end)]
            mine = _common(inside) or (paths[doms[index]] if node.inputs and not inside else ())
        paths.append(mine or ())
    return paths


def _common(paths: Iterable[Path]) -> Path | None:
    """The longest common beginning; None of no paths."""
    shared: Path | None = None
    for path in paths:
        if shared is None:
            shared = path
            continue
        same = 0
        while same < min(len(shared), len(path)) and shared[same] == path[same]:
            same += 1
        shared = shared[:same]
    return shared


class _Grower:
    """Grows chains with their branches; a node grows once, so the tree is no larger than the program."""

    def __init__(self, program: Program, doms: Sequence[int], paths: Sequence[Path]) -> None:
        self.program, self.doms, self.paths = program, doms, paths
        self.seen: set[int] = set()

    def grow(self, top: int, end: int) -> list[Item]:
        """The chain from after ``top`` to ``end``."""
        items: list[Item] = []
        before = top
        for index in _chain(self.doms, top, end):
            if index in self.seen:
                items.append(Again(index))
            else:
                self.seen.add(index)
                items.append(Leaf(before, index, self._branches(index)))
            before = index
        known = max((place for place, item in enumerate(items) if isinstance(item, Again)), default=0)
        return items[known:]  # of what is known already, the last node says it all

    def _branches(self, index: int) -> tuple[tuple[Item, ...], ...]:
        top, inputs = self.doms[index], self.program.nodes[index].inputs
        if all(i == top for i in inputs):
            return ()
        return tuple(_grouped(self.grow(top, end), self.paths[index], self.paths) for end in inputs)


def _grouped(items: Sequence[Item], prefix: Path, paths: Sequence[Path]) -> tuple[Item, ...]:
    """Items whose paths go on from ``prefix`` with the same name become a block; a block of one item is that item."""
    found: list[Item] = []
    place = 0
    while place < len(items):
        name = _next_name(items[place], prefix, paths)
        run = place + 1
        while name is not None and run < len(items) and _next_name(items[run], prefix, paths) == name:
            run += 1
        members = items[place:run]
        if name is None or len(members) == 1:
            found += members
        else:
            path = (*prefix, name)
            inner = _grouped(members, path, paths)
            only = inner[0] if len(inner) == 1 else None
            found.append(only if only is not None else Block(path, _before(members[0]), members[-1].index, inner))
        place = run
    return tuple(found)


def _next_name(item: Item, prefix: Path, paths: Sequence[Path]) -> str | None:
    path = paths[item.index]
    if isinstance(item, Again) or path[: len(prefix)] != prefix or len(path) == len(prefix):
        return None
    return path[len(prefix)]


def _before(item: Item) -> int:
    return item.index if isinstance(item, Again) else item.before
