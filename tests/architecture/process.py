"""Runs a piece of Python in a process of its own, where nothing of this package has been imported yet."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

# Makes the process one in which only some distributions are installed.
_PRELUDE = """
import sys
class OnlySome:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if {installed!r} is not None and top not in sys.stdlib_module_names and top not in {installed!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, OnlySome())
"""


def run(
    code: str, installed: Iterable[str] | None = None, path: Iterable[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `code`; with `installed`, every import of another top-level module than those and the library's fails.

    Folders in `path` come first among those that modules are looked for in.
    """
    prelude = _PRELUDE.format(installed=None if installed is None else set(installed))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, _ROOT]))}
    command = [sys.executable, "-W", "error", "-c", prelude + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
