"""The demo's display: all steps listed, the running one with a bar, the finished ones ticked off.

On a terminal it is one live display; elsewhere (CI, a pipe) each finished step is a line. All of it goes to stderr.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

_MARKS = {"waiting": "·", "running": "→", "done": "✓", "failed": "✗"}


class Step:
    """The running step: how far it is, and what to say of it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self.said = ""

    def expect(self, total: int) -> None:
        """Show a bar of so many units."""
        self._progress.update(self._task, total=total, completed=0)

    def advance(self, units: int = 1) -> None:
        """So many units are done."""
        self._progress.advance(self._task, units)

    def say(self, text: str) -> None:
        """What there is to know at this moment; the last words stay beside the tick."""
        self.said = text
        self._progress.update(self._task, detail=text)


class Board:
    """The list of steps, as a context manager."""

    def __init__(self, steps: Mapping[str, str], console: Console | None = None) -> None:
        """``steps``: name -> title, in order."""
        self._console = console or Console(stderr=True)
        self._titles = {name: f"{number} {title}" for number, (name, title) in enumerate(steps.items(), 1)}
        words = TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        self._progress = Progress(
            _Mark(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            _Bar(),
            words,
            _Seconds(),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
        )
        self._tasks = {
            name: self._progress.add_task(title, total=None, start=False, detail="", state="waiting")
            for name, title in self._titles.items()
        }
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Run a step: it is ticked off at the end, or crossed out if it raises."""
        task = self._tasks[name]
        self._progress.start_task(task)
        self._progress.update(task, state="running")
        step, start, state = Step(self._progress, task), time.perf_counter(), "failed"
        try:
            yield step
            state = "done"
        finally:
            self.seconds[name] = time.perf_counter() - start
            self._progress.update(task, state=state)
            self._progress.stop_task(task)
            if not self._console.is_terminal:
                line = f"{_MARKS[state]} {self._titles[name]} ({self.seconds[name]:.1f} s): {step.said}"
                self._console.print(line, soft_wrap=True, markup=False, highlight=False)


class _Mark(ProgressColumn):
    """· waiting, → running, ✓ done, ✗ failed."""

    def render(self, task: Task) -> Text:
        return Text(_MARKS[task.fields["state"]], style="green" if task.fields["state"] == "done" else "")


class _Bar(BarColumn):
    """A bar for the running step, nothing for the others."""

    def __init__(self) -> None:
        super().__init__(bar_width=16)

    def render(self, task: Task) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().render(task) if task.fields["state"] == "running" and task.total else Text("")


class _Seconds(ProgressColumn):
    """How long the step has taken."""

    def render(self, task: Task) -> Text:
        return Text("" if task.elapsed is None else f"{task.elapsed:5.1f} s", justify="right")
