"""``python -m tests.mutation``: does every mistake in the kernel get caught?

Run from the root of the repository. ``--only PATTERN`` tries the mutants whose name holds it; a stopped campaign goes
on where it was (``--fresh`` starts again). Exit status 1 if a mutant survives that ``reasons.yaml`` does not explain,
or more than a tenth of them do. The whole takes long: it is run by hand, and ``results.md`` is its committed log.
"""

# ruff: noqa: E402  threads are limited before NumPy and torch are loaded
from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before NumPy and torch are loaded: children are forked

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import hypothesis  # noqa: F401  loaded once here, so that no child has to
import mpmath  # noqa: F401
import numpy  # noqa: F401
import pytest  # noqa: F401
import torch
import typer

from tests.mutation import campaign, report
from tests.mutation.children import copied

_HERE = Path(__file__).resolve().parent
_STATE = Path(tempfile.gettempdir()) / "hf-lipschitz-mutation"


def main(
    only: Annotated[str, typer.Option(help="Try only mutants whose name contains this.")] = "",
    jobs: Annotated[int, typer.Option(help="Children at a time.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Time limit of one mutant.")] = 600.0,
    state: Annotated[Path, typer.Option(help="Folder of the log of a campaign that goes on.")] = _STATE,
    fresh: Annotated[bool, typer.Option(help="Forget earlier results.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the mutants and stop.")] = False,
    skip_baseline: Annotated[bool, typer.Option(help="Trust that the unmutated kernel passes.")] = False,
    write: Annotated[bool, typer.Option(help="Write results.md (of a whole campaign).")] = False,
) -> None:
    """Try mutants and judge the campaign."""
    torch.set_num_threads(1)
    if fresh:
        shutil.rmtree(state, ignore_errors=True)
    folder = copied(campaign.ROOT / "hf_lipschitz")
    try:
        known = campaign.known_rules(folder)
        mutants = [mutant for mutant in campaign.all_mutants(known) if only in mutant.name]
        if listing:
            typer.echo("\n".join(mutant.name for mutant in mutants))
            return
        if not mutants:
            raise typer.BadParameter(f"no mutant is named like {only!r}: see --list")
        if not skip_baseline:
            ops = sorted({op for mutant in mutants for op in known.ops_of(mutant)})
            failures = campaign.baseline(ops, any(map(known.is_core, mutants)), folder, state)
            if failures:
                typer.echo(f"the unmutated kernel fails: {failures[0]}")
                raise typer.Exit(1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for result in campaign.run(mutants, known, state, jobs, seconds):
        fate = "SURVIVED" if result.survived else "killed by " + "; ".join(result.killers)
        typer.echo(f"{result.name}: {fate}")
    _judge({mutant.name for mutant in mutants}, state, write)


def _judge(names: set[str], state: Path, write: bool) -> None:
    reasons = report.read_reasons(_HERE / "reasons.yaml")
    results = [result for result in report.read_log(state / "results.jsonl").values() if result.name in names]
    survivors = sum(result.survived for result in results)
    typer.echo(f"{len(results)} mutants, {len(results) - survivors} killed, {survivors} survived")
    if write:
        report.write(_HERE / "results.md", report.table(results, reasons))
        for pattern in report.unused(results, reasons):
            typer.echo(f"no survivor needs the reason for {pattern!r} any more")
    faults = report.verdict(results, reasons)
    for fault in faults:
        typer.echo(fault)
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
