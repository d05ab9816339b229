"""One process of a distributed run, or the only one: trains, and prints what this process ended with, as JSON.

`torchrun --nproc_per_node 2 -m tests.training.distributed FOLDER` makes two of them. Together they see the batches
that a single process with twice the batch size sees.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging

from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.training.recipe import load_recipe, packaged_recipe
from hf_lipschitz.training.run import train
from tests.leaving import leave_together
from tests.training.small import tiny_model, tiny_trainer

RECIPE = {
    "model.config.stages": "[{depth: 1, width: 8}]",
    "trainer.max_steps": "6",
    "trainer.save_steps": "3",
    "trainer.logging_steps": "3",
}


def main(folder: Path) -> None:
    """A Trainer with the callback, for every optimizer, and a recipe."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    report: dict[str, Any] = {}
    for optimizer in ("spectral_muon", "adamw"):
        trainer = tiny_trainer(
            folder / optimizer, tiny_model(), optimizer=optimizer, per_device_train_batch_size=6 // processes
        )
        trainer.train()
        report[optimizer] = described(trainer.model)
    recipe = load_recipe(packaged_recipe("lip_vit_digits.yaml"), {**RECIPE, "trainer.batch_size": str(64 // processes)})
    report["recipe"] = described(train(recipe, folder / "recipe", progress=False).model)
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


def described(model: Any) -> dict[str, Any]:
    return {
        "excess": Enforcer(model).max_excess(),
        "weights": {name: value.double().flatten().tolist() for name, value in model.state_dict().items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    main(Path(sys.argv[1]))
    if "WORLD_SIZE" in os.environ:
        leave_together()
