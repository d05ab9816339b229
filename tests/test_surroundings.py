"""The promises that the test suite itself rests on: no network, and no silent skip of the real data in CI."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.offline import is_loopback

_TESTS = Path(__file__).resolve().parent

_SKIPPING = """
import pytest
{module_level}
def test_on_real_data(real_data):
    assert real_data("cifar10-jpeg").exists()

def test_of_another_machine():
    pytest.skip("no GPU here")
"""
_MODULE_LEVEL = 'from tests import real_data; real_data.find("cifar10-jpeg")'


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "::1%lo", b"localhost", "", None])
def test_this_machine_is_allowed(host: object) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "0.0.0.1", "localhost.example.org", b"example.org"])
def test_other_machines_are_not(host: object) -> None:
    assert not is_loopback(host)


def test_connections_to_other_machines_are_refused() -> None:
    with pytest.raises(RuntimeError, match="tests use no network"):
        socket.create_connection(("example.org", 443), timeout=1)
    with socket.socket() as plain, pytest.raises(RuntimeError, match="tests use no network"):
        plain.connect(("192.0.2.1", 443))


def test_connections_to_this_machine_are_not() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize(
    ("module_level", "ci", "has_data", "outcome"),
    [
        ("", "true", False, "1 failed, 1 skipped"),
        ("", "", False, "2 skipped"),
        ("", "true", True, "1 passed, 1 skipped"),
        (_MODULE_LEVEL, "true", False, "1 error"),
        (_MODULE_LEVEL, "", False, "1 skipped"),
    ],
)
def test_missing_data_fails_in_ci_only(
    tmp_path: Path, module_level: str, ci: str, has_data: bool, outcome: str
) -> None:
    """Run a small project, with this conftest.py, that wants a data set."""
    project, data = tmp_path / "project", tmp_path / "data"
    (project / "tests").mkdir(parents=True)
    (data / "cifar10-jpeg" if has_data else data).mkdir(parents=True)
    for name in ("conftest.py", "offline.py", "real_data.py"):
        shutil.copy(_TESTS / name, project / "tests" / name)
    (project / "tests" / "test_it.py").write_text(_SKIPPING.format(module_level=module_level))
    environment = {**os.environ, "CI": ci, "HF_LIPSCHITZ_DATA": str(data)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=.", "tests"]
    run = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    last_line = run.stdout.strip().splitlines()[-1]
    assert last_line.startswith(outcome), run.stdout + run.stderr
    assert ("in CI the data must be there" in run.stdout) == ("failed" in outcome or "error" in outcome)
