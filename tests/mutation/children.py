"""A mutant is tried in a forked process: torch and NumPy are loaded once, the kernel anew from a mutated copy.

The working tree is never written to. The copy holds the whole package; one file of it is replaced for the time of a
trial, and nothing writes bytecode.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutation.mutants import Mutant

TIMEOUT = "timeout"
_KERNEL = Path("hf_lipschitz") / "bounds"


def copied(package: Path) -> Path:
    """A fresh copy of the package in a temporary folder; returns the folder to put on the path."""
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@dataclass
class Trial:
    """A child at work: its process id, the end of the pipe that its answer comes from, and when it has to be done."""

    process: int
    pipe: int
    deadline: float

    def answer(self) -> Any:
        """What the child found; None while it runs; TIMEOUT if it was too slow (it is stopped)."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if not done:
            if time.monotonic() < self.deadline:
                return None
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            os.close(self.pipe)
            return TIMEOUT
        with os.fdopen(self.pipe) as stream:
            text = stream.read()
        return json.loads(text) if text else [f"the process ended with status {status}"]


def started(work: Callable[[], Any], folder: Path, seconds: float) -> Trial:
    """Fork; in the child put ``folder`` first on the path, do the work and send its result back as JSON."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return Trial(process, reading, time.monotonic() + seconds)
    os.close(reading)
    try:
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        result = _loaded_from(folder) or work()
    except BaseException as error:  # the child ends here, whatever happened: its parent reads what
        result = [f"import: {type(error).__name__}: {str(error)[:160]}"]
    with os.fdopen(writing, "w") as stream:
        json.dump(result, stream)
    os._exit(0)


def _loaded_from(folder: Path) -> None:
    """Make sure that the copy is what gets imported."""
    import hf_lipschitz

    if not Path(hf_lipschitz.__file__ or "").is_relative_to(folder):
        raise ImportError(f"the package was imported from {hf_lipschitz.__file__}, not from the copy")


class Replaced:
    """The copy with one file replaced, and put back afterwards."""

    def __init__(self, folder: Path, mutant: Mutant) -> None:
        self._path = folder / _KERNEL / mutant.path
        self._original = self._path.read_text() if mutant.text else ""
        if mutant.text:
            self._path.write_text(mutant.text)

    def restore(self) -> None:
        if self._original:
            self._path.write_text(self._original)


def finished(trial: Trial) -> Any:
    """Wait for one child."""
    while (answer := trial.answer()) is None:
        time.sleep(0.02)
    return answer
