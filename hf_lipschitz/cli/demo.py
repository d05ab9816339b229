"""`hf-lipschitz demo`: the whole way on scikit-learn's handwritten digits, in under three minutes on two CPU cores.

Train, save, reload in a new process, evaluate and attack, push and fetch, fine-tune, report. By default the Hub is one
of the project's own that this command starts on 127.0.0.1 and that ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lipschitz.cli.demo_progress import Board
from hf_lipschitz.cli.demo_steps import DemoFailure, Outcome, Settings
from hf_lipschitz.cli.output import (
    EndpointOption,
    JsonOption,
    complain,
    note,
    print_json,
    quiet_transformers,
    result,
    working,
)
from hf_lipschitz.errors import UserError

STEPS = {
    "train": "train a LipViT",
    "save": "save and certify",
    "reload": "reload elsewhere",
    "evaluate": "evaluate and attack",
    "push": "push, fetch, verify",
    "fine_tune": "fine-tune, odd / even",
    "report": "report",
}
GATES = {0.0: 0.97, 36 / 255: 0.93, 72 / 255: 0.85}  # accuracy on held-out digits; at radius 0 it is the clean one
_OWN = {"digits", "odd-even", "fetched", "hub"}  # what a demo leaves in its folder
_QUICK = {"trainer.max_steps": "120", "trainer.logging_steps": "30"}


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where its folders go.")] = Path(
        "hf-lipschitz-demo"
    ),
    overwrite: Annotated[bool, typer.Option(help="Delete what an earlier demo left there.")] = False,
    repo: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Push to this repository of a real Hub instead.")
    ] = None,
    endpoint: EndpointOption = None,
    quick: Annotated[bool, typer.Option(help="Few steps and images: all checks but those of accuracy.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the initial weights and the batches.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train, certify, attack, push, verify, reload and fine-tune a small LipViT on real handwritten digits."""
    if endpoint is not None and repo is None:
        raise UserError("--endpoint says where a repository is, but none is named: add --repo org/name")
    _prepare(out, overwrite)
    start = time.perf_counter()
    with working(), _hub(out, repo, endpoint) as hub:
        settings = _settings(out, quick, seed, hub)
        outcome, seconds = _run(settings, quick)
    summary = _summary(settings, outcome, seconds, time.perf_counter() - start)
    if as_json:
        print_json(summary)
    else:
        _print_report(settings, outcome)
    for problem in outcome.problems:
        complain(problem)
    raise typer.Exit(1 if outcome.problems else 0)


def _prepare(out: Path, overwrite: bool) -> None:
    """Make the folder; one that is not empty is refused, and one that is no demo's is not deleted."""
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder with --out")
    if present and not overwrite:
        raise UserError(f"{out} is not empty: choose another folder with --out, or pass --overwrite")
    if strange := sorted(present - _OWN):
        raise UserError(
            f"{out} holds {strange[0]!r}, which no demo has made, so it is left alone: choose another --out"
        )
    for name in present:
        shutil.rmtree(out / name)
    out.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _hub(out: Path, repo: str | None, endpoint: str | None) -> Iterator[dict[str, Any]]:
    """Where to push: the repository, the Hub's address and the token."""
    if repo is not None:
        from huggingface_hub import get_token

        if (token := get_token()) is None:
            raise UserError("there is no access token to push with: log in with hf auth login, or set HF_TOKEN")
        yield {"repo": repo, "endpoint": endpoint, "token": token, "is_loopback": False}
        return
    from hf_lipschitz.testing.loopback_hub import LoopbackHub

    with LoopbackHub(out / "hub") as hub:
        os.environ.update(hub.environment())  # before the client is imported: no cache, no token but the demo's
        name = f"{hub.user}/lip-vit-digits"
        yield {"repo": name, "endpoint": hub.endpoint, "token": hub.token, "is_loopback": True}


def _settings(out: Path, quick: bool, seed: int, hub: dict[str, Any]) -> Settings:
    from hf_lipschitz.training.recipe import load_recipe, packaged_recipe

    overrides = {"trainer.seed": str(seed), "trainer.save_steps": "null", **(_QUICK if quick else {})}
    recipe = load_recipe(packaged_recipe("lip_vit_digits.yaml"), overrides)
    return Settings(
        out=out, recipe=recipe, attacked_images=64 if quick else None, fine_tuning_steps=40 if quick else 300, **hub
    )


def _run(settings: Settings, quick: bool) -> tuple[Outcome, dict[str, float]]:
    """All steps, on the board; a step that fails ends the run with its reason among the problems."""
    import torch

    from hf_lipschitz.cli import demo_fine_tune, demo_steps

    quiet_transformers()
    # For matrices this small a second thread gains little, and where another process wants its core it costs minutes.
    torch.set_num_threads(1)
    outcome = Outcome()
    with Board(STEPS) as board:
        try:
            with board.step("train") as step:
                trainer, outcome.training = demo_steps.train(settings, step)
            with board.step("save") as step:
                demo_steps.save(settings, trainer, step)
            with board.step("reload") as step:
                outcome.reload = demo_steps.reload(settings, trainer.model, step)
            with board.step("evaluate") as step:
                outcome.evaluation, outcome.attacks = demo_steps.evaluate(settings, trainer.model, step)
            with board.step("push") as step:
                outcome.pushed = demo_steps.push_and_verify(settings, settings.digits, settings.repo)
                step.say(f"{outcome.pushed['repo']} at commit {outcome.pushed['commit'][:12]}, fetched and verified")
            with board.step("fine_tune") as step:
                outcome.fine_tuned = demo_fine_tune.fine_tune(settings, outcome.pushed["fetched"], step)
            with board.step("report") as step:
                outcome.problems += judge(outcome, quick)
                step.say("all checks passed" if not outcome.problems else f"{len(outcome.problems)} checks failed")
        except DemoFailure as failure:
            outcome.problems.append(str(failure))
    return outcome, board.seconds


def judge(outcome: Outcome, quick: bool) -> list[str]:
    """What is wrong with the figures, one sentence each; accuracy is not asked of a quick run."""
    problems = []
    for dtype in ("float32", "float64"):
        if changed := outcome.attacks[dtype]["changed"]:
            problems.append(f"the attack changed {changed} predictions of the {dtype} model inside certified radii")
    if not outcome.attacks["control"]["changed"]:
        problems.append("the attack changed nothing far outside the certified radii either, so it shows nothing")
    assert outcome.evaluation is not None
    for radius, least in GATES.items() if not quick else ():
        reached = outcome.evaluation.certified[radius] if radius else outcome.evaluation.clean_accuracy
        if reached < least:
            problems.append(f"accuracy at radius {radius:.4f} is {reached:.3f}, less than the {least} it should reach")
    return problems


def _summary(settings: Settings, outcome: Outcome, seconds: dict[str, float], total: float) -> dict[str, Any]:
    """What ``--json`` prints; the keys are the same for every run, None where a step was not reached."""
    tuned = outcome.fine_tuned
    return {
        "ok": not outcome.problems,
        "problems": outcome.problems,
        "seconds": round(total, 2),
        "steps": {title: round(taken, 2) for title, taken in seconds.items()},
        "seed": settings.recipe.trainer.seed,
        "folders": {"digits": str(settings.digits), "odd_even": str(settings.odd_even)},
        "training": outcome.training or None,
        "reload": outcome.reload or None,
        "evaluation": outcome.evaluation.as_dict() if outcome.evaluation else None,
        "attacks": outcome.attacks or None,
        "pushed": outcome.pushed or None,
        "fine_tuned": {
            "training": tuned["training"],
            "evaluation": tuned["evaluation"].as_dict(),
            "bound": tuned["certificate"].bound.to_json(),
            "pushed": tuned["pushed"],
        }
        if tuned
        else None,
    }


def _print_report(settings: Settings, outcome: Outcome) -> None:
    """The table, where everything is, and what to type next."""
    if outcome.evaluation is not None and outcome.fine_tuned:
        from rich.console import Console

        from hf_lipschitz.cli.demo_table import table

        Console().print(table(outcome))
    if outcome.problems:
        return
    where = "the loopback Hub, which has ended" if settings.is_loopback else settings.endpoint or "the Hub"
    note(f"pushed to {where}: {settings.repo} and {settings.repo}-odd-even")
    result(f"folders: {settings.digits} and {settings.odd_even}")
    result(f"verify:  hf-lipschitz verify {settings.digits}")
    result(f"push:    hf-lipschitz push {settings.digits} ORG/NAME")
