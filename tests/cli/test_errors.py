"""A user's mistake is one line on stderr and status 2, wrong content is status 1, and only a defect has a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.checkpoint_folder import CheckpointError
from hf_lipschitz.cli import main
from hf_lipschitz.errors import UserError
from tests.cli.conftest import Call

# The command line and what its one line of complaint says.
MISTAKES = [
    (["verfy", "x"], "'verify'"),
    (["--verison"], "--version"),
    (["verify"], "FOLDER_OR_REPO"),
    (["verify", "x", "--requier", "bound"], "--require"),
    (["verify", "x", "--require", "everything"], "'bound', 'program'"),
    (["verify", "x", "--max-bound", "small"], "--max-bound"),
    (["verify", "no-such-folder"], "neither a folder here nor written org/name"),
    (["verify", "./no-such-folder"], "is not a folder"),
    (["verify", "{folder}", "--trust", "nobodys-rules"], "nobodys-rules"),
    (["certify", "no-such-folder"], "no-such-folder is not a folder"),
    (["certify", "{folder}", "--nrom", "l2"], "--norm"),
    (["evaluate", "no-such-folder", "--data.path", "digits"], "is not a folder"),
    (["evaluate", "{folder}"], "add --data.path PATH"),
    (["evaluate", "{folder}", "--data.path", "digits", "--radii", "1,x"], "--radii is '1,x'"),
    (["evaluate", "{folder}", "--data.path", "digits", "--radii", "-1"], "at least 0"),
    (["evaluate", "{folder}", "--data.path", "digits", "--radi", "1"], "--radii"),
    (["evaluate", "{folder}", "--data.pth", "digits"], "--data.path"),
    (["push", "no-such-folder", "someone/model"], "is not a folder"),
    (["push", "{folder}"], "REPO"),
    (["push", "{folder}", "someone/model", "--privat"], "--private"),
    (["demo", "--out", "{folder}"], "is not empty"),
    (["demo", "--out", "{folder}", "--overwrite"], "which no demo has made"),
    (["demo", "--endpoint", "http://127.0.0.1:9"], "add --repo org/name"),
    (["demo", "--quik"], "--quick"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES)
def test_a_mistake_is_one_line(call: Call, folder: Path, arguments: list[str], says: str) -> None:
    before = sorted(folder.iterdir())
    ran = call(*(argument.format(folder=folder) for argument in arguments))
    assert ran.status == 2
    assert says in ran.complaint and not ran.out
    assert sorted(folder.iterdir()) == before


def _failing(error: BaseException) -> Callable[..., None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KernelError("this machine cannot verify"), 2, "this machine cannot verify"),
        (UserError("a thing is wrong: mend it"), 2, "a thing is wrong: mend it"),
        (UserError("two\n  lines"), 2, "two lines"),
        (CheckpointError("a file is wrong: replace it"), 1, "a file is wrong: replace it"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
        (OSError("it is broken\n"), 2, "it is broken"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2, "'x' is not installed"),
    ],
)
def test_errors_of_known_kinds(
    monkeypatch: pytest.MonkeyPatch, call: Call, error: Exception, status: int, says: str
) -> None:
    monkeypatch.setattr(main, "app", lambda **_: _failing(error)())
    ran = call()
    assert (ran.status, ran.complaint) == (
        status,
        f"hf-lipschitz: {says}" if "installed" not in says else ran.complaint,
    )
    assert says in ran.complaint


def test_a_defect_of_ours_has_a_traceback(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr(main, "app", lambda **_: _failing(ValueError("no user did this"))())
    ran = call()
    assert ran.status == 2
    assert "Traceback" in ran.err and "please report it" in ran.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_an_interruption(monkeypatch: pytest.MonkeyPatch, call: Call, error: BaseException) -> None:
    interrupted = typer.Typer()
    interrupted.command()(_failing(error))
    monkeypatch.setattr(main, "app", interrupted)
    assert call().status == 130
