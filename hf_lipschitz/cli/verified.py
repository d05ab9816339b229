"""What commands do that go on only with a verified folder."""

from __future__ import annotations

from typing import Any

import typer

from hf_lipschitz.cli.output import complain, note, print_json, quiet_transformers, working


def verified_or_exit(source: str, *, as_json: bool, **options: Any) -> Any:
    """The verdict on a folder or repository if all claims hold; else say why on stderr and leave with status 1."""
    from hf_lipschitz.verification import verify

    with working():
        quiet_transformers()
        verdict = verify(source, **options)
    if verdict.ok:
        note(f"verified {source}")
        return verdict
    for reason in verdict.reasons or ("a claim could not be checked",):
        complain(f"{source} does not verify: {reason}")
    if as_json:
        print_json({"ok": False, "verification": verdict.to_json()})
    raise typer.Exit(1)
