"""Whatever the documentation asks a reader to type works: Python blocks are run, command lines are checked.

The Python blocks of a file run in order, in one namespace, in an empty folder, against a loopback Hub that holds what
the pages assume (reader.py). A block that no test can run stands in
`NOT_RUN` with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hf_lipschitz.testing.loopback_hub import LoopbackHub
from tests.architecture import code_blocks
from tests.architecture.code_blocks import Block

_ROOT = Path(__file__).resolve().parents[2]
_NAMES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
_PAGES = [page for page in (*map(_ROOT.joinpath, _NAMES), *sorted((_ROOT / "docs").rglob("*.md"))) if page.exists()]

# (page, first line of the block) -> why no test runs it. An entry without its block is a failure.
NOT_RUN: dict[tuple[str, str], str] = {}


def _blocks(languages: set[str]) -> list[Block]:
    return [block for page in _PAGES for block in code_blocks.blocks(page) if block.language in languages]


def _is_run(block: Block) -> bool:
    return (block.path.name, block.text.partition("\n")[0]) not in NOT_RUN


def _command_line() -> Any:
    from hf_lipschitz.cli.main import app

    return typer.main.get_command(app)


def _run_python(found: list[Block], workspace: Path) -> subprocess.CompletedProcess[str]:
    """Run blocks in one namespace of a new process whose Hub is a loopback Hub; see reader.py."""
    files = [workspace / f"block{index}.py" for index in range(len(found))]
    for file, block in zip(files, found, strict=True):
        file.write_text(block.text)
    with LoopbackHub(workspace / "hub") as hub:
        environment = {**os.environ, **hub.environment(), "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.architecture.reader", *map(str, files)]
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one: where a reader would type the Python blocks."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_a_readme() -> None:
    assert (_ROOT / "README.md").exists()
    assert _blocks(code_blocks.PYTHON) and _blocks(code_blocks.COMMANDS)


def test_every_block_says_what_it_is() -> None:
    known = code_blocks.PYTHON | code_blocks.COMMANDS | code_blocks.SHOWN
    every = [block for page in _PAGES for block in code_blocks.blocks(page)]
    assert [f"{block} is {block.language!r}" for block in every if block.language not in known] == []


def test_every_reason_for_not_running_has_its_block() -> None:
    every = {(block.path.name, block.text.partition("\n")[0]) for block in _blocks(code_blocks.PYTHON)}
    assert set(NOT_RUN) - every == set()


@pytest.mark.parametrize("page", sorted({block.path for block in _blocks(code_blocks.PYTHON)}), ids=str)
@pytest.mark.slow_ci
def test_python_blocks_run(page: Path, workspace: Path) -> None:
    found = [block for block in _blocks(code_blocks.PYTHON) if block.path == page and _is_run(block)]
    result = _run_python(found, workspace)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("block", _blocks(code_blocks.COMMANDS), ids=str)
def test_commands_exist(block: Block) -> None:
    reader = code_blocks.Reader(_ROOT, _command_line())
    found = [f"line {n}: {bad}" for n, line in code_blocks.command_lines(block) for bad in reader.objections(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("block", _blocks(code_blocks.SHOWN), ids=str)
def test_data_blocks_parse(block: Block) -> None:
    if block.language == "json":
        json.loads(block.text)
    if block.language == "yaml":
        yaml.safe_load(block.text)
    assert block.text.strip()


def test_the_console_script_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="hf-lipschitz")
    assert [script.value for script in scripts] == ["hf_lipschitz.cli.main:main"]
    script = Path(sys.executable).with_name("hf-lipschitz")
    run = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "verify" in run.stdout


# The checks themselves, on a page with planted mistakes.

_PAGE = """
Text with `inline` code.

```python
x = 1
```

```python
assert x == {x}
```

```console
$ make demo && hf-lipschitz verify folder --max-bound 1.0 \\
    --json
not a command
```

```bash
# a comment
HF_ENDPOINT=x hf-lipschitz train a.yaml --data.path ../data  # another
python -m pip install -e ".[test]"
```
"""


@pytest.fixture
def reader() -> code_blocks.Reader:
    app = typer.Typer()

    @app.command()
    def verify(folder: str, max_bound: float = 1.0, json: bool = False) -> None: ...

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def train(config: str, resume: bool = False) -> None: ...

    return code_blocks.Reader(_ROOT, typer.main.get_command(app))


@pytest.mark.slow_ci
def test_a_good_page(tmp_path: Path, reader: code_blocks.Reader) -> None:
    page = tmp_path / "page.md"
    page.write_text(_PAGE.format(x=1))
    first, second, console, bash = code_blocks.blocks(page)
    assert (first.line, first.language, first.text) == (5, "python", "x = 1\n")
    assert _run_python([first, second], tmp_path).returncode == 0
    assert [line for line, _ in code_blocks.command_lines(console)] == [13]
    assert [line for line, _ in code_blocks.command_lines(bash)] == [20, 21]
    for block in (console, bash):
        for _, line in code_blocks.command_lines(block):
            assert reader.objections(line) == []


@pytest.mark.slow_ci
def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(_PAGE.format(x=2))
    result = _run_python([block for block in code_blocks.blocks(page) if block.language == "python"], tmp_path)
    assert result.returncode == 1 and "AssertionError" in result.stderr and "block1.py" in result.stderr


@pytest.mark.parametrize(
    ("line", "objection"),
    [
        ("make dmeo", "no make target 'dmeo'"),
        ("hf-lipschitz verfy folder", "no subcommand 'verfy'"),
        ("hf-lipschitz verify folder --bound 1", "verify: no option --bound"),
        ("hf-lipschitz verify folder --data.path x", "verify: no option --data.path"),
        ("hf-lipschitz train a.yaml --resumee", "train: no option --resumee"),
        ("hf-lipschitz --verison", "no option --verison"),
        ("cd x && hf-lipschitz verfy folder", "no subcommand 'verfy'"),
        ('pip install -e ".[tests]"', "no extra 'tests'"),
        ("pip install hf_lipschits", "not this project"),
        ("python examples/nothing.py", "no script examples/nothing.py"),
        ("python -m pytest tests/nothing", "no path tests/nothing"),
        ("git reset --hard", "not for readers"),
        ("curl example.org", "no rule knows"),
    ],
)
def test_a_planted_mistake_in_a_command_is_found(reader: code_blocks.Reader, line: str, objection: str) -> None:
    (found,) = reader.objections(line)
    assert objection in found
