"""Runs in a process of its own, whose environment names the loopback Hub: trains, pushes, and walks every commit.

`python -m tests.training.pushing FOLDER` prints JSON: for every repository its commits, oldest first, each with what
kernel-only verification says of the root and of every checkpoint folder in it.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from huggingface_hub import HfApi
from transformers import Trainer

from hf_lipschitz import verify
from hf_lipschitz.models.certified_model import UncertifiedWarning
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.training.run import image_processor
from hf_lipschitz.training.trainer import LipschitzTrainer
from tests.training.small import tiny_model, tiny_trainer

CARD = "---\ntags:\n- lipschitz\n---\n\n# Our card\n"
KINDS: dict[str, type[Trainer]] = {"plain": Trainer, "ours": LipschitzTrainer}
STRATEGIES = ("every_save", "checkpoint", "end")


def main(folder: Path) -> dict[str, Any]:
    """Everything that is pushed, and what is found on the Hub afterwards."""
    for kind in KINDS:
        for strategy in STRATEGIES:
            push_while_training(folder / kind / strategy, kind, strategy)
    overlapping_pushes(folder / "overlapping")
    state = push_the_model(folder / "model")
    api = HfApi()
    repos = [f"loopback/{kind}-{strategy}" for kind in KINDS for strategy in STRATEGIES]
    repos += ["loopback/overlapping", "loopback/model", "loopback/saved"]
    return {"state": state, "repos": {repo: walk(api, repo, folder / "walk" / repo) for repo in repos}}


def push_while_training(output: Path, kind: str, strategy: str) -> None:
    """Six steps, each saved; then two pushes by hand, of other weights each."""
    output.mkdir(parents=True)
    (output / "README.md").write_text(CARD)
    model = tiny_model()
    settings = {"push_to_hub": True, "hub_model_id": f"loopback/{kind}-{strategy}", "hub_strategy": strategy}
    options = {"processing_class": image_processor(model.config)}
    trainer = tiny_trainer(output, model, kind=KINDS[kind], options=options, save_steps=1, max_steps=6, **settings)
    trainer.train()
    trainer.push_to_hub()
    change(model)
    trainer.push_to_hub(commit_message="Once more")


def overlapping_pushes(output: Path) -> None:
    """Pushes in the background, weights changing in between."""
    model = tiny_model()
    settings = {"push_to_hub": True, "hub_model_id": "loopback/overlapping", "save_strategy": "no"}
    trainer = tiny_trainer(output, model, kind=LipschitzTrainer, **settings)
    trainer.train()
    for number in range(4):
        change(model)
        trainer.push_to_hub(f"Push {number}", False)
    trainer.push_to_hub("Nothing new")


def push_the_model(output: Path) -> dict[str, Any]:
    """The model's own ways to the Hub, and what it knows of its certificate afterwards."""
    tiny_model().save_pretrained(output)
    model: Any = LipViTForImageClassification.from_pretrained(output)
    before = model.certificate
    model.push_to_hub("loopback/model")
    after = model.certificate
    fetched = LipViTForImageClassification.from_pretrained("loopback/model")
    change(model)
    model.push_to_hub("loopback/model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UncertifiedWarning)
        changed = model.certificate
    model.save_pretrained(output / "again", push_to_hub=True, repo_id="loopback/saved")
    return {
        "kept after a push": before is not None and after == before,
        "in the model from the Hub": fetched.certificate is not None,
        "of changed weights": changed is not None,
        "said": [str(warning.message) for warning in caught],
        "after saving": model.certificate is not None,
    }


def change(model: Any) -> None:
    with torch.no_grad():
        model.classifier.bias.add_(1.0)


def walk(api: HfApi, repo: str, folder: Path) -> list[dict[str, Any]]:
    """Every commit of a repository, oldest first."""
    commits = []
    for commit in reversed(api.list_repo_commits(repo)):
        snapshot = Path(api.snapshot_download(repo, revision=commit.commit_id, local_dir=folder / commit.commit_id))
        card = snapshot / "README.md"
        found = {
            "title": commit.title,
            "files": sorted(path.name for path in snapshot.iterdir()),
            "card": card.read_text() if card.exists() else None,
            "whole": verdict(snapshot),
        }
        inner = [path for path in snapshot.glob("*checkpoint*") if path.is_dir()]
        for path in inner:
            shutil.move(path, snapshot.with_name(f"{snapshot.name}-{path.name}"))
        moved = [snapshot.with_name(f"{snapshot.name}-{path.name}") for path in inner]
        found["folders"] = {path.name[40:] or "root": verdict(path) for path in (snapshot, *moved)}
        commits.append(found)
    return commits


def verdict(folder: Path) -> list[str] | None:
    """The reasons why a folder does not verify; None where it holds no weights."""
    if not list(folder.glob("*.safetensors")):
        return None
    found = verify(folder, require="bound")
    return [] if found.ok else list(found.reasons) or ["not ok"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    outcome = main(Path(sys.argv[1]))
    print("\n" + json.dumps(outcome))
