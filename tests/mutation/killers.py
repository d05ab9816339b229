"""What may kill a mutant: each check raises if the kernel that is imported is wrong.

Read in a child process only, after the mutated copy of the package has been put first on the path.
"""

from __future__ import annotations

import contextlib
import io
import json
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from hf_lipschitz.bounds.rule import GEOMETRIES, Geometry
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds import test_random_programs, test_rules
from tests.bounds.cases import ROWS
from tests.bounds.row import Row
from tests.bounds.search import claimed_constant, lowered, reached_constant
from tests.second_checker import agreement, agreement_norms, terms
from tests.second_checker.table import FORMULAS

_UNIT_TESTS = (
    *("tests/bounds/test_arithmetic.py", "tests/bounds/test_engine.py", "tests/bounds/test_spectral.py"),
    *("tests/evaluation/test_deployed.py", "tests/models/test_rounding.py"),
)
# plugins were imported before the fork, which pytest warns of
_PYTEST = ("-q", "-x", "-p", "no:cacheprovider", "--no-header", "-W", "ignore::pytest.PytestAssertRewriteWarning")
_PROGRAMS = 18  # random programs that are walked twice
_KINDS = ("gaussian", "hot_rows", "repeated_rows")  # matrices that the search is run on


def rows_of(ops: Collection[str]) -> list[Row]:
    """The rows of the tables for these operations."""
    return [row for row in ROWS if row.op in ops]


def _key(row: Row, kind: str, geometry: Geometry) -> str:
    return f"{row.name} | {kind} | {geometry}"


def reached(ops: Collection[str]) -> dict[str, float]:
    """The ratios that the search reaches: they depend on what operations mean, not on the kernel's bounds."""
    return {
        _key(row, kind, geometry): reached_constant(row.example(kind), geometry)
        for row in rows_of(ops)
        for kind in _kinds(row)
        for geometry in GEOMETRIES
    }


def _kinds(row: Row) -> list[str]:
    return [kind for kind in row.kinds() if kind in _KINDS]


def refutation(ops: Collection[str], known: Path) -> None:
    """No ratio that the search reached exceeds a constant."""
    found = json.loads(known.read_text()) if known.exists() else {}
    for row in rows_of(ops):
        for kind in _kinds(row):
            for geometry in GEOMETRIES:
                bound = claimed_constant(row.example(kind), geometry)
                ratio = found.get(row.op, {}).get(_key(row, kind, geometry))
                assert ratio is None or ratio <= bound, f"{_key(row, kind, geometry)}: {ratio} > {bound}"


def second_checker(ops: Collection[str], kinds: Collection[str] = agreement.KINDS) -> None:
    """Constants, sizes and rounding of single nodes agree with exact arithmetic."""
    for row in rows_of(ops):
        for kind in set(row.kinds()) & set(kinds) if row.op in FORMULAS else ():
            for geometry in GEOMETRIES:
                agreement.compare_rule(row.example(kind), geometry, slack=agreement.slack_of(kind))
            for dtype in agreement.PRECISIONS:
                agreement.compare_rounding(row.example(kind), dtype)


def programs() -> None:
    """Whole random programs agree with exact arithmetic, node by node."""
    for seed in range(_PROGRAMS):
        program, weights = test_random_programs._program(seed)
        if {node.op for node in program.nodes} <= set(FORMULAS):
            for geometry in GEOMETRIES:
                agreement.compare_program(program, weights, geometry)


def norms() -> None:
    """Norms of matrices against exact ones, and against the formula term by term."""
    agreement_norms.compare_with_exact_norms()
    agreement_norms.compare_with_formula()
    agreement_norms.compare_array_norms()


def single_terms() -> None:
    """Terms that no example need reach, each where it is the one that counts."""
    for check in terms.CHECKS:
        check()


def sizes(ops: Collection[str]) -> None:
    """No value is larger than its rule says."""
    for row in rows_of(ops):
        test_rules.test_size(row)


def float32(ops: Collection[str]) -> None:
    """No float32 execution strays further than its rule says."""
    for row in rows_of(ops):
        test_rules.test_rounding_in_float32(row)


def unit_tests() -> None:
    """The tests of the core itself, as they are run every day."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main([*_PYTEST, *_UNIT_TESTS])
    failed = [line for line in output.getvalue().splitlines() if line.startswith("FAILED")]
    assert status == 0, failed[0] if failed else f"pytest ended with {status}"


Killer = tuple[str, Callable[[], None]]


def killers(ops: Collection[str], core: bool, known: Path) -> Iterator[Killer]:
    """(name, check) in the order in which they are tried, strict and fast ones first.

    What stands outside the rules is looked at by the strict ones alone: all rows of all rules would take minutes.
    """
    yield "terms", single_terms
    if core:
        yield "norms", norms
        yield "programs", programs
        yield "second checker", lambda: second_checker(ops, ("gaussian",))
        yield "unit tests", unit_tests
        return
    yield "second checker", lambda: second_checker(ops)
    yield "refutation", lambda: refutation(ops, known)
    yield "sizes", lambda: sizes(ops)
    yield "float32", lambda: float32(ops)


def killed_by(ops: Collection[str], core: bool, known: Path) -> list[str]:
    """The first check that fails, with its message; empty if the mutant survives them all."""
    for name, check in killers(ops, core, known):
        failure = _failure(check)
        if failure:
            return [f"{name}: {failure}"]
    return []


def lowered_killed_by(op: str, geometry: str, known: Path) -> list[str]:
    """Every one of refutation and second checker that sees the constant of ``op`` lowered by 2 % in one geometry."""
    rule = BUILT_IN[op]
    mutant = lowered(rule)
    for other in GEOMETRIES:
        if other != geometry:
            _honest(mutant, rule, other)
    BUILT_IN[op] = mutant
    checks: list[Killer] = [
        ("refutation", lambda: refutation([op], known)),
        ("second checker", lambda: second_checker([op])),
    ]
    failures = [(name, _failure(check)) for name, check in checks]
    return [f"{name}: {failure}" for name, failure in failures if failure]


def _honest(mutant: object, rule: object, geometry: str) -> None:
    """Let a lowered rule tell the truth in one geometry."""
    lie = mutant.lipschitz  # type: ignore[attr-defined]

    def lipschitz(call: object, asked: str, incoming: tuple[float, ...]) -> float:
        return (rule.lipschitz if asked == geometry else lie)(call, asked, incoming)  # type: ignore[attr-defined]

    mutant.lipschitz = lipschitz  # type: ignore[attr-defined]


def _failure(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:  # whatever a mutant raises, it was noticed
        text = str(error) or traceback.format_exc().strip().splitlines()[-3].strip()
        return f"{type(error).__name__}: {text.splitlines()[0][:160]}"
    return ""
