"""`hf-lipschitz push`: verify a folder, push it in one commit, fetch that commit back, and verify again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_lipschitz.cli.output import EndpointOption, JsonOption, print_json, result, working
from hf_lipschitz.cli.verified import verified_or_exit
from hf_lipschitz.errors import UserError


def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder with its certificate.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name; made if it does not exist.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="An existing branch to commit to.")] = "main",
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Push a certified folder to the Hub (token: HF_TOKEN or `hf auth login`) and verify what arrived."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a checkpoint")
    verified_or_exit(str(folder), as_json=as_json)
    from hf_lipschitz.hub import push as send

    with working():
        pushed = send(folder, repo, endpoint=endpoint, private=private, revision=revision)
    verdict = verified_or_exit(f"{pushed.repo_id}@{pushed.commit}", as_json=as_json, endpoint=endpoint)
    if as_json:
        facts = {"ok": True, "repo": pushed.repo_id, "commit": pushed.commit, "url": pushed.url}
        print_json({**facts, "verification": verdict.to_json()})
        return
    result(f"pushed {folder} to {pushed.repo_id} at commit {pushed.commit}, and verified what arrived")
    result(f"  {pushed.url}")
    result(f"verify: hf-lipschitz verify {pushed.repo_id}@{pushed.commit}")
