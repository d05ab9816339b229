"""The command `hf-lipschitz`: the list of its commands, and what becomes of errors.

Exit status: 0 fine; 1 something is wrong with the content of a folder or repository; 2 usage, network, a missing
package or path; 130 interrupted. A user's mistake is one line on stderr; only a defect of ours shows a traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from hf_lipschitz import __version__
from hf_lipschitz.cli.certify import certify
from hf_lipschitz.cli.demo import demo
from hf_lipschitz.cli.evaluate import evaluate
from hf_lipschitz.cli.inspect import inspect
from hf_lipschitz.cli.output import complain, note, result
from hf_lipschitz.cli.push import push
from hf_lipschitz.cli.train import train
from hf_lipschitz.cli.verify import verify
from hf_lipschitz.errors import UserError

WRONG_CONTENT, WRONG_USE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="hf-lipschitz",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command()(demo)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command()(certify)
app.command()(verify)
app.command()(evaluate)
app.command()(inspect)
app.command()(push)


@app.callback(invoke_without_command=True)
def hf_lipschitz(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Train, certify, verify and share models whose Lipschitz bound is proved from their weights."""
    if version:
        result(f"hf-lipschitz {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        result(context.get_help())


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status."""
    try:
        status = app(args=list(arguments), prog_name="hf-lipschitz", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except typer.TyperException as error:
        return _usage(error)
    except Exception as error:
        sentence, status = explain(error)
        if sentence is None:
            traceback.print_exc()
            note("hf-lipschitz: this is a defect of hf-lipschitz, please report it with the lines above")
        else:
            complain(sentence)
        return status


def explain(error: Exception) -> tuple[str | None, int]:
    """The one sentence for a user's mistake (None for a defect of ours), and the exit status."""
    from hf_lipschitz.bounds.errors import KernelError
    from hf_lipschitz.checkpoint_folder import CheckpointError

    if isinstance(error, CheckpointError):
        return str(error), WRONG_CONTENT
    if isinstance(error, UserError | KernelError):
        return str(error), WRONG_USE
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("hf_lipschitz"):
        return f"the package {error.name!r} is not installed: run pip install hf-lipschitz, which brings it", WRONG_USE
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", WRONG_USE
    return None, WRONG_USE


def _usage(error: typer.TyperException) -> int:
    """A mistake in the command line itself: one line, with the command to look it up."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "hf-lipschitz"
    said = error.format_message().replace("Value error, ", "").rstrip(".?")
    complain(f"{said}; see {command} --help")
    return WRONG_USE


if __name__ == "__main__":
    main()
