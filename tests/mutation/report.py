"""The log of a campaign: one JSON line a mutant while it runs, a table and a verdict at its end."""

from __future__ import annotations

import fnmatch
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

MOST_SURVIVORS = 0.10  # the gate: at most this part of the mutants may survive, each with its reason


@dataclass(frozen=True)
class Result:
    """A mutant's fate. ``version`` is a digest of the file it was made from; ``killers`` say why."""

    name: str
    kind: str
    version: str
    killers: tuple[str, ...]

    @property
    def survived(self) -> bool:
        return not self.killers


def read_log(path: Path) -> dict[str, Result]:
    """Results so far by mutant; a later line replaces an earlier one."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {line["name"]: Result(line["name"], line["kind"], line["version"], tuple(line["killers"])) for line in lines}


def append(path: Path, result: Result) -> None:
    """Add one line to the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(asdict(result)) + "\n")


def read_reasons(path: Path) -> dict[str, str]:
    """Pattern of mutants' names -> why they survive."""
    reasons = yaml.safe_load(path.read_text()) or {}
    for pattern, reason in reasons.items():
        if not (isinstance(pattern, str) and isinstance(reason, str) and len(reason.split()) >= 4):
            raise ValueError(f"{path}: {pattern!r} needs a reason of a few words, found {reason!r}: write one")
    return reasons


def reason_of(name: str, reasons: Mapping[str, str]) -> str:
    """The reason listed for a survivor, or nothing. In patterns ``*`` stands for anything; brackets are brackets."""
    for pattern, reason in reasons.items():
        if fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")):
            return reason
    return ""


def verdict(results: Iterable[Result], reasons: Mapping[str, str]) -> list[str]:
    """What is wrong with a campaign: survivors without a reason, too many survivors, reasons for nothing."""
    results = list(results)
    survivors = [result for result in results if result.survived]
    faults = [f"survived without a reason: {each.name}" for each in survivors if not reason_of(each.name, reasons)]
    if len(survivors) > MOST_SURVIVORS * len(results):
        faults.append(f"{len(survivors)} of {len(results)} survived: more than {MOST_SURVIVORS:.0%}")
    return faults


def unused(results: Iterable[Result], reasons: Mapping[str, str]) -> list[str]:
    """Reasons that no survivor needs any more."""
    names = [result.name for result in results if result.survived]
    return [pattern for pattern in reasons if not any(reason_of(name, {pattern: reasons[pattern]}) for name in names)]


def table(results: Iterable[Result], reasons: Mapping[str, str]) -> str:
    """Markdown: totals by file and kind, what killed, and every survivor with its reason."""
    results = sorted(results, key=lambda result: result.name)
    lines = [
        "# Mutants of the kernel",
        "",
        *_PREFACE,
        "",
        "| file | kind | mutants | killed | survived |",
        "|---|---|--:|--:|--:|",
    ]
    groups = Counter((result.name.split(" ")[0], result.kind) for result in results)
    for (file, kind), count in sorted(groups.items()):
        alive = sum(1 for r in results if r.survived and (r.name.split(" ")[0], r.kind) == (file, kind))
        lines.append(f"| `{file}` | {kind} | {count} | {count - alive} | {alive} |")
    alive = sum(result.survived for result in results)
    lines += [f"| all | | {len(results)} | {len(results) - alive} | {alive} |", "", "## What killed them", ""]
    lines += [
        "Terms, factors and counts are tried until the first check fails; lowered constants with both of theirs.",
        "",
    ]
    by = Counter((result.kind, killer.split(":")[0]) for result in results for killer in result.killers)
    lines += ["| kind | check | killed |", "|---|---|--:|"]
    lines += [f"| {kind} | {check} | {count} |" for (kind, check), count in sorted(by.items())]
    lines += ["", "## Survivors", "", "| mutant | reason |", "|---|---|"]
    lines += [
        f"| `{r.name.replace('|', chr(92) + '|')}` | {reason_of(r.name, reasons) or 'none'} |"
        for r in results
        if r.survived
    ]
    return "\n".join(lines) + "\n"


_PREFACE = (
    "Written by `python -m tests.mutation --write`. Every mutant is one mistake in the kernel",
    "(`tests/mutation/mutants.py` says which kinds); a mutant is killed when a check fails because of it",
    "(`tests/mutation/killers.py`).",
)


def write(path: Path, text: str) -> None:
    """Write a file by way of a temporary name beside it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)
