"""`hf-lipschitz verify`: is a folder or repository what its certificate says? The exit status is the answer.

With ``--require bound`` a local folder needs NumPy and this command line alone: no torch, no transformers, no Hub.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from hf_lipschitz.cli.output import EndpointOption, JsonOption, print_json, quiet_transformers, result, working


def verify(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A folder, org/name or org/name@revision.")],
    require: Annotated[
        Literal["bound", "program"],
        typer.Option(help="bound: the kernel alone re-derives the bound. program: all claims, which needs torch."),
    ] = "program",
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="DIST", help="Also use the bound rules of this installed distribution; repeatable."),
    ] = None,
    max_bound: Annotated[
        float | None, typer.Option(metavar="X", help="Fail where the stated bound to the logits is above this.")
    ] = None,
    norm: Annotated[
        Literal["l2", "token_max"] | None, typer.Option(help="Fail where the certificate speaks of another norm.")
    ] = None,
    origin: Annotated[
        str | None, typer.Option("--from", metavar="SPACE", help="Fail where its input is not this, as pixels[0,1].")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Fail where the certificate file has another SHA-256.")
    ] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint against its certificate. Exit status: 0 it holds, 1 it does not, 2 it cannot be read."""
    from hf_lipschitz.verification import verify as check

    with working():
        if require == "program":
            quiet_transformers()
        verdict = check(
            source,
            require=require,
            trust=tuple(trust or ()),
            endpoint=endpoint,
            max_bound=max_bound,
            norm=norm,
            origin=origin,
            sha256=sha256,
        )
    if as_json:
        print_json({**verdict.to_json(), "require": require, "exit_status": verdict.exit_status})
    else:
        result(str(verdict))
    raise typer.Exit(verdict.exit_status)
