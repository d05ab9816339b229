"""The mutation script itself: it finds what is planted, judges fairly, and touches nothing but its copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation import campaign
from tests.mutation.campaign import ROOT
from tests.mutation.mutants import Mutant, bound_files, mutants_of
from tests.mutation.report import Result, read_reasons, reason_of, table, verdict

_KERNEL = ROOT / "hf_lipschitz" / "bounds"
_SOURCE = """
class Rule:
    def gains(self, call):
        need(call.a + call.b, "no mutant here")
        return (add_up(mul_up(gamma(6, u), x), self._more(call)),)

    def _more(self, call):
        return max(1.0, call.x[1 + 2])

    def apply(self, call):
        return call.x + 1
"""


def _made(tmp_path: Path, source: str) -> list[Mutant]:
    folder = tmp_path / "rules"
    folder.mkdir()
    (folder / "some.py").write_text(source)
    return mutants_of(folder / "some.py", tmp_path)


def test_which_mistakes_are_made(tmp_path: Path) -> None:
    """Terms, factors and counts of what a bound rests on; nothing in refusals, indices or the meaning."""
    mutants = _made(tmp_path, _SOURCE)
    assert [mutant.name for mutant in mutants] == [
        "rules/some.py Rule.gains term mul_up(gamma(6, u), x) of add_up(mul_up(gamma(6, u), x), self._more(call))",
        "rules/some.py Rule.gains term self._more(call) of add_up(mul_up(gamma(6, u), x), self._more(call))",
        "rules/some.py Rule.gains factor gamma(6, u) of mul_up(gamma(6, u), x)",
        "rules/some.py Rule.gains factor x of mul_up(gamma(6, u), x)",
        "rules/some.py Rule.gains count 1 of gamma(6, u)",
        "rules/some.py Rule._more term 1.0 of max(1.0, call.x[1 + 2])",
        "rules/some.py Rule._more term call.x[1 + 2] of max(1.0, call.x[1 + 2])",
    ]
    assert "return ((add_up(self._more(call))),)" in mutants[0].text
    assert "gamma(5, u)" in mutants[4].text
    assert "return (call.x[1 + 2])" in mutants[5].text


def test_mutants_of_the_kernel_are_programs() -> None:
    for path in bound_files(_KERNEL):
        original = path.read_text()
        for mutant in mutants_of(path, _KERNEL)[::5]:
            compile(mutant.text, mutant.path, "exec")
            assert mutant.text != original


def test_every_file_of_rules_is_mutated() -> None:
    mutated = {path.relative_to(_KERNEL).as_posix() for path in bound_files(_KERNEL)}
    assert {"spectral.py", "rounding.py", "engine.py", "rules/affine.py", "rules/attention.py"} <= mutated
    assert not any(path.startswith(("certificate", "weights", "rules/attributes")) for path in mutated)


def test_verdict() -> None:
    killed = [Result(f"file.py f term {i}", "term", "0", ("norms: it is too low",)) for i in range(18)]
    alive = Result("file.py f term x[0]", "term", "0", ())
    reasons = {"file.py f term x[0]": "the last rounding covers it"}
    assert reason_of(alive.name, reasons)
    assert verdict([*killed, alive], reasons) == []
    assert verdict([*killed, alive], {}) == ["survived without a reason: file.py f term x[0]"]
    assert "more than 10%" in verdict([*killed[:3], alive], reasons)[0]
    assert "| all | | 19 | 18 | 1 |" in table([*killed, alive], reasons)


def test_reasons_are_sentences() -> None:
    assert read_reasons(Path(__file__).with_name("reasons.yaml"))


@pytest.mark.parametrize("failing", [True, False], ids=["core", "rules"])
def test_a_check_that_fails_without_a_mistake_stops_a_campaign(
    failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would seem to catch every mutant that it is run on: those of the core, or those of rules."""
    from tests.mutation import killers

    monkeypatch.setattr(killers, "killed_by", lambda ops, core, known: ["a check: fails"] if core is failing else [])
    assert campaign.baseline([], True, ROOT / "hf_lipschitz", tmp_path) == ["a check: fails"]
    assert campaign.baseline([], False, ROOT / "hf_lipschitz", tmp_path) == ([] if failing else ["a check: fails"])


@pytest.mark.slow_ci
@pytest.mark.parametrize(
    "only",
    [" Linear.rounding", "affine.py linear@1", "TokenMixing.rounding", "structure.py residual@1"],
)
def test_a_small_campaign(only: str, tmp_path: Path) -> None:
    """Every mistake in these is caught, in a copy; the files themselves stay as they are."""
    before = {path: path.read_bytes() for path in bound_files(_KERNEL)}
    command = [sys.executable, "-m", "tests.mutation", "--only", only, "--state", str(tmp_path / "state")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 survived" in done.stdout and "killed by" in done.stdout
    assert before == {path: path.read_bytes() for path in bound_files(_KERNEL)}
