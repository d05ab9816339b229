"""Softmax or Sinkhorn: certified accuracy of the two attention normalisations on the nano recipe, same steps each.

Trains the mixers ``attention`` and ``hybrid`` of LipViT nano with either normalisation, evaluates each checkpoint on
the whole test split, and prints a table. Resumable: a run whose result is there is not repeated::

    python benchmarks/attention_normalization.py --data ../shared/data/cifar10-jpeg --steps 600 --output runs
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "lip_vit_nano_cifar10.yaml"
MIXERS = ("attention", "hybrid")
NORMALIZATIONS = ("softmax", "sinkhorn")
RADII = {"0.1411764705882353": "36/255", "0.2823529411764706": "72/255", "1.0": "1"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of this package; what it prints for people stays visible."""
    return subprocess.run(
        [sys.executable, "-m", "hf_lipschitz.cli.main", *arguments], check=True, stdout=subprocess.PIPE, text=True
    )


def result(mixer: str, normalization: str, data: str, steps: int, output: Path) -> dict[str, Any]:
    """Train and evaluate one model, or read what an earlier run left."""
    folder = output / f"{mixer}-{normalization}-{steps}"
    kept = folder.with_suffix(".json")
    if not kept.exists():
        if not (folder / "lipschitz_certificate.json").exists():
            choice = ("--model.config.token_mixer", mixer, "--model.config.attention_normalization", normalization)
            run = ("--data.path", data, "--trainer.max_steps", str(steps), "--trainer.save_steps", "null")
            command("train", str(RECIPE), *choice, *run, "--output", str(folder))
        measured = command("evaluate", str(folder), "--data.path", data, "--no-card", "--json").stdout
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(json.dumps(json.loads(measured)["evaluation"], indent=1))
        os.replace(temporary, kept)
    return json.loads(kept.read_text())


def main() -> None:
    """Print the table as Markdown, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="uoft-cs/cifar10")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = {
        (mixer, kind): result(mixer, kind, options.data, options.steps, options.output)
        for mixer in MIXERS
        for kind in NORMALIZATIONS
    }
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch", "transformers"))
    print(f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, {packages}; ", end="")
    print(f"{options.steps} steps of the recipe {RECIPE.name}, {Path(options.data).name}, seed 0\n")
    print(
        f"| mixer | normalisation | clean | {' | '.join(f'certified at {r}' for r in RADII.values())} | mean radius |"
    )
    print("| --- | --- | --- |" + " --- |" * (len(RADII) + 1))
    for (mixer, kind), found in rows.items():
        certified = " | ".join(f"{100 * found['certified'][key]:.1f} %" for key in RADII)
        print(
            f"| {mixer} | {kind} | {100 * found['clean_accuracy']:.1f} % | {certified} | {found['mean_radius']:.4f} |"
        )


if __name__ == "__main__":
    main()
