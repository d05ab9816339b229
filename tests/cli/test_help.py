"""Help is complete and instant: nothing heavy is imported for it, nor for verifying with the kernel alone."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import typer

from hf_lipschitz import __version__
from hf_lipschitz.cli.main import app
from tests.architecture import process
from tests.cli.conftest import Call

COMMANDS = ("demo", "train", "certify", "verify", "evaluate", "inspect", "push")
_HEAVY = ("torch", "transformers", "huggingface_hub", "datasets", "matplotlib", "sklearn", "yaml")
# The command line's own library with what it needs, and what the interpreter keeps outside its standard library.
_TYPER = ("typer", "shellingham", "rich", "annotated_doc", "pydantic", "pydantic_core", "typing_extensions")
_TYPER += ("annotated_types", "typing_inspection", "pygments", "markdown_it", "mdurl")
_PYTHON = (sysconfig._get_sysconfigdata_name(),)


def test_every_command_is_there() -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(call: Call, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    ran = call(command, "--help")
    assert ran.status == 0 and not ran.err
    for parameter in typer.main.get_command(app).commands[command].params:
        assert parameter.param_type_name == "argument" or parameter.opts[0] in ran.out
    assert "--json" in ran.out


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_list_of_commands(call: Call, arguments: tuple[str, ...]) -> None:
    ran = call(*arguments)
    assert ran.status == 0
    assert all(command in ran.out for command in COMMANDS)


def test_version(call: Call) -> None:
    assert call("--version").out == f"hf-lipschitz {__version__}\n"


def _loaded(arguments: list[str]) -> str:
    code = f"from hf_lipschitz.cli.main import run\nstatus = run({arguments!r})\n"
    return f"{code}print('status', status, [m for m in {_HEAVY!r} if m in sys.modules])"


@pytest.mark.parametrize("command", [[], *[[command] for command in COMMANDS]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    ran = process.run(_loaded([*command, "--help"]))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "status 0 []"


def test_the_kernel_verifies_without_torch_and_hub(made: Path) -> None:
    installed = ["hf_lipschitz", "numpy", *_TYPER, *_PYTHON]
    ran = process.run(_loaded(["verify", str(made), "--require", "bound"]), installed)
    assert ran.stdout.splitlines()[-1] == "status 0 []", ran.stderr
    assert "claim 1 only" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify", "{made}"], "torch and transformers are needed"),
        (["verify", "someone/model", "--require", "bound"], "'huggingface_hub' is not installed"),
        (["train", "a.yaml", "--output", "x"], "is not installed"),
        (["certify", "{made}"], "is not installed"),
    ],
)
def test_a_missing_package_is_named(made: Path, arguments: list[str], says: str) -> None:
    installed = ["hf_lipschitz", "numpy", *_TYPER, *_PYTHON]
    ran = process.run(_loaded([argument.format(made=made) for argument in arguments]), installed)
    assert ran.stdout.splitlines()[-1].startswith("status 2 "), ran.stderr
    (line,) = ran.stderr.splitlines()
    assert says in line
