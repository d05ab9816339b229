"""What the commands print, and where: results on stdout, progress and complaints on stderr.

With ``--json`` stdout carries one JSON value and nothing else; whatever libraries print while a command works goes to
stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, progress on stderr.")]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="Address of the Hub (default: HF_ENDPOINT).")
]


def print_json(value: Any) -> None:
    """One JSON value on stdout; numbers that are not finite must have been replaced."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def result(text: str) -> None:
    """A line of the result, on stdout; long lines are not wrapped."""
    typer.echo(text)


def note(text: str) -> None:
    """A line about what is going on, on stderr."""
    typer.echo(text, err=True)


def complain(text: str) -> None:
    """One line on stderr that says what was wrong."""
    typer.echo(f"hf-lipschitz: {printable(' '.join(text.split()))}", err=True)


def printable(text: str) -> str:
    """The text with everything escaped that would do something to a terminal: names in foreign folders may hold it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def stderr_console() -> Console:
    """A rich console for progress."""
    from rich.console import Console

    return Console(stderr=True)


def progress_bar() -> Progress:
    """A rich progress display on stderr; nothing is shown where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """While this is open, what libraries print goes to stderr, and their own bars for each file are off."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    with contextlib.redirect_stdout(sys.stderr):
        yield


def quiet_transformers() -> None:
    """No bar for each loading of weights and no notices, where transformers is installed."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # who needs it says so better
    logging.disable_progress_bar()
    logging.set_verbosity_error()
