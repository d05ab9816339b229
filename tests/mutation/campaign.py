"""A campaign: all mutants of the kernel, each tried once, resumable, with a baseline first."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutation.children import TIMEOUT, Replaced, Trial, copied, finished, started
from tests.mutation.mutants import Mutant, bound_files, mutants_of
from tests.mutation.report import Result, append, read_log, write

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE, _KERNEL = ROOT / "hf_lipschitz", ROOT / "hf_lipschitz" / "bounds"
_CHECKS = ("tests/second_checker", "tests/mutation", "tests/bounds")
_BASELINE_SECONDS = 3600.0


@dataclass(frozen=True)
class Known:
    """The rules of the table: operation -> (file, relative to the kernel; names of its classes, bases last)."""

    rules: dict[str, tuple[str, tuple[str, ...]]]

    def ops_of(self, mutant: Mutant) -> list[str]:
        """The operations that a mutant may change: those of its class, or of its file, or all."""
        if mutant.kind == "constant":
            return [mutant.owner]
        of_class = [op for op, (_, classes) in self.rules.items() if mutant.owner and mutant.owner in classes]
        of_file = [op for op, (file, _) in self.rules.items() if file == mutant.path]
        return of_class or of_file or list(self.rules)

    def is_core(self, mutant: Mutant) -> bool:
        """Whether a mutant stands outside the files of rules."""
        return mutant.kind != "constant" and not mutant.path.startswith("rules/")


def known_rules(folder: Path) -> Known:
    """Read the table of rules from a copy of the package (in a child: the parent never imports the kernel)."""

    def read() -> dict[str, Any]:
        from hf_lipschitz.bounds.rules.table import BUILT_IN

        return {
            op: (type(rule).__module__.rpartition(".")[2], [base.__name__ for base in type(rule).__mro__])
            for op, rule in BUILT_IN.items()
        }

    found = finished(started(read, folder, 120.0))
    if not isinstance(found, dict):
        raise ValueError(f"the table of rules cannot be read: {found}")
    return Known({op: (f"rules/{file}.py", tuple(classes)) for op, (file, classes) in found.items()})


def all_mutants(known: Known) -> list[Mutant]:
    """Lowered constants of every rule in both geometries, then the mistakes in the text of every file."""
    constants = [
        Mutant(f"{file} {op} constant x 0.98 in {geometry}", "constant", file, op, geometry)
        for op, (file, _) in known.rules.items()
        for geometry in ("l2", "token_max")
        if op not in ("input@1", "embedding@1")  # origins have no constant
    ]
    return constants + [mutant for path in bound_files(_KERNEL) for mutant in mutants_of(path, _KERNEL)]


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def version_of(mutant: Mutant) -> str:
    """Changes when the mutated file changes; a campaign of a changed file is run again."""
    return _digest(_KERNEL / mutant.path)


def baseline(ops: list[str], core: bool, folder: Path, state: Path) -> list[str]:
    """Search every operation once, then run all checks on the unmutated kernel; returns what failed.

    With ``core`` both the checks of mutants of the core and those of mutants of rules: a check that fails without any
    mistake would seem to catch every one.
    """
    reached_file = state / "reached.json"
    state.mkdir(parents=True, exist_ok=True)
    for op in ops:
        failure = _search(op, folder, reached_file)
        if failure:
            return [failure]

    def check() -> list[str]:
        from tests.mutation.killers import killed_by

        return (killed_by(ops, True, reached_file) if core else []) or killed_by(ops, False, reached_file)

    return finished(started(check, folder, _BASELINE_SECONDS))


def _search(op: str, folder: Path, reached_file: Path) -> str:
    """Find what one operation reaches, unless an earlier campaign did; returns what went wrong, or nothing."""
    have = json.loads(reached_file.read_text()) if reached_file.exists() else {}
    if op in have:
        return ""

    def search() -> dict[str, float]:
        from tests.mutation.killers import reached

        return reached([op])

    found = finished(started(search, folder, _BASELINE_SECONDS))
    if not isinstance(found, dict):
        return f"{op}: {found}"
    write(reached_file, json.dumps(have | {op: found}))
    return ""


def _work(mutant: Mutant, known: Known, reached_file: Path) -> Callable[[], list[str]]:
    def work() -> list[str]:
        from tests.mutation import killers

        if mutant.kind == "constant":
            return killers.lowered_killed_by(mutant.owner, mutant.function, reached_file)
        return killers.killed_by(known.ops_of(mutant), known.is_core(mutant), reached_file)

    return work


def run(mutants: list[Mutant], known: Known, state: Path, jobs: int, seconds: float) -> Iterator[Result]:
    """Try the mutants that the log does not know in this version, ``jobs`` at a time; yields results as they come."""
    log = state / "results.jsonl"
    done = read_log(log)
    waiting = [m for m in mutants if not (m.name in done and done[m.name].version == version_of(m))]
    folders = [copied(_PACKAGE) for _ in range(jobs)]
    busy: dict[Path, tuple[Mutant, Replaced, Trial]] = {}
    try:
        while waiting or busy:
            for folder in folders:
                if folder not in busy and waiting:
                    mutant = waiting.pop(0)
                    replaced = Replaced(folder, mutant)
                    work = _work(mutant, known, state / "reached.json")
                    busy[folder] = mutant, replaced, started(work, folder, seconds)
            for folder, (mutant, replaced, trial) in list(busy.items()):
                answer = trial.answer()
                if answer is None:
                    continue
                replaced.restore()
                del busy[folder]
                # one that never ends is not killed by a check: it needs a reason
                killers = () if answer == TIMEOUT else tuple(answer)
                result = Result(mutant.name, mutant.kind, version_of(mutant), killers)
                append(log, result)
                yield result
            time.sleep(0.01)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
