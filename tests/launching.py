"""Runs a module of the tests in one new process, or in several that torch's launcher starts together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(module: str, folder: Path, *launcher: str) -> None:
    """``python LAUNCHER -m MODULE FOLDER`` from the root of the repository, one thread a process; it must succeed.

    Args:
        module: dotted name.
        folder: made first; the module writes its reports there.
        launcher: ``TWO`` for two processes, nothing for one.
    """
    folder.mkdir()
    command = [sys.executable, *launcher, "-m", module, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
