"""Which optimizer and which constraint give the most accuracy for a Lipschitz bound? The MLP study of the paper.

The setting follows "Training Transformers with Enforced Lipschitz Constants" (arXiv 2507.13338) on CIFAR-10: an MLP of
three matrices without biases, ReLU, pixels in [0, 1], a linearly decaying learning rate. Every cell of the sweep
in ``configs/frontier_cifar_mlp.yaml`` trains one network with AdamW or Muon under one technique at one strength, and is
bounded by ``hf_lipschitz.certify``: the bound is proved for the stored weights, not estimated. ::

    python examples/frontier_cifar_mlp.py --data DATASET --output examples/results

trains what the table in the output folder does not hold yet, a row a cell as it ends, and draws the two pictures: bound
against accuracy, and bound against accuracy certified at a radius of 36/255. Two cores take about a minute a
cell (several for ``spectral_hard_cap``); ``--jobs 2`` trains two cells at a time with one thread each.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.progress import Progress
from torch import Tensor, nn

from hf_lipschitz import certified_accuracy, certified_radius, certify
from hf_lipschitz.caps.registry import CAPS
from hf_lipschitz.caps.spectral_weight_decay import spectral_weight_decay
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.radii import pair_norms
from hf_lipschitz.nn.init import orthogonal_weight
from hf_lipschitz.optim.enforcement import Enforcer
from hf_lipschitz.optim.spectral_muon import SpectralMuon
from hf_lipschitz.training.data import load_image_data
from hf_lipschitz.training.recipe import DataSection

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "frontier_cifar_mlp.yaml"
OPTIMIZERS = ("muon", "adamw")


@dataclass(frozen=True)
class Cell:
    """One network to train; ``value`` is the cap (RMS to RMS) or the rate of a decay."""

    optimizer: str
    technique: str
    value: float


@dataclass(frozen=True)
class Row:
    """What became of a cell.

    ``bound`` is the proved l2 bound from pixels to logits, ``bound_rms`` the same from RMS to RMS norms (the product of
    the paper), both of the network that the loss sees: with the logit scale. ``norms`` are the three matrices' RMS
    norms, ``excess`` the largest proved one over its cap, relative.
    """

    optimizer: str
    technique: str
    value: float
    accuracy: float
    certified: float
    bound: float
    bound_rms: float
    norms: str
    excess: float
    loss: float
    seconds: float


def cells(config: dict[str, Any]) -> Iterator[Cell]:
    """The sweep, in the order of the file."""
    for optimizer in OPTIMIZERS:
        yield Cell(optimizer, "none", 0.0)
    for technique, values in config["caps"].items():
        for value, optimizer in itertools.product(values, OPTIMIZERS):
            yield Cell(optimizer, technique, float(value))
    for technique, rates in config["decays"].items():
        for optimizer in OPTIMIZERS:
            for rate in rates[optimizer]:
                yield Cell(optimizer, technique, float(rate))


def network(width: int) -> nn.Sequential:
    """Orthogonal weights at RMS norm 1; nothing starts at zero, where ReLU would keep it."""
    sizes = [(width, 3 * 32 * 32), (width, width), (10, width)]
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (rows, columns) in enumerate(sizes):
        layer = nn.Linear(columns, rows, bias=False)
        with torch.no_grad():
            layer.weight.copy_(orthogonal_weight(rows, columns) * rms_unit(layer.weight))
        layers += [layer] if index == 2 else [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def rms_unit(weight: Tensor) -> float:
    """The singular value of a matrix whose norm from RMS to RMS is 1."""
    return math.sqrt(weight.shape[0] / weight.shape[1])


def constraints(model: nn.Module, cell: Cell) -> list[dict[str, Any]]:
    """The technique as a rule a matrix; for what is no cap, a cap that is never reached."""
    cap, value = (cell.technique, cell.value) if cell.technique in CAPS else ("decay", 1e9)
    return [
        {"pattern": name.replace(".", r"\."), "cap": cap, "norm": "spectral", "value": value * rms_unit(weight)}
        for name, weight in model.named_parameters()
    ]


def optimizer_of(model: nn.Module, cell: Cell, config: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon moves each matrix by the same step in RMS norm, a third of the network's; AdamW is torch's."""
    decay = cell.value if cell.technique == "weight_decay" else 0.0
    if cell.optimizer == "adamw":
        settings = config["adamw"]
        return torch.optim.AdamW(
            model.parameters(), lr=settings["lr"], betas=tuple(settings["betas"]), weight_decay=decay
        )
    lr = config["muon"]["lr"] / 3.0
    groups = [
        {"params": [w], "role": "matrix", "lr": lr * rms_unit(w), "weight_decay": decay / rms_unit(w)}
        for w in model.parameters()
    ]
    return SpectralMuon(groups, lr=lr, momentum=config["muon"]["momentum"])


def decay_leading(optimizer: torch.optim.Optimizer, cell: Cell, base: float) -> None:
    """Spectral weight decay after each step: rate times learning rate off the largest singular value."""

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    lr = group["lr"] if base == 0.0 else group["lr"] / rms_unit(weight)
                    weight.copy_(spectral_weight_decay(weight, rate=min(1.0, lr * cell.value)))

    optimizer.register_step_post_hook(after_step)


def train(cell: Cell, config: dict[str, Any], images: Tensor, labels: Tensor) -> tuple[nn.Sequential, float, float]:
    """The trained network, its last losses' mean, and the largest relative excess of a proved norm over its cap."""
    torch.manual_seed(config["seed"])
    model = network(config["width"])
    optimizer = optimizer_of(model, cell, config)
    enforcer = Enforcer(model, constraints(model, cell))
    if cell.technique in CAPS:
        enforcer.repair()
        enforcer.attach(optimizer)
    elif cell.technique == "spectral_weight_decay":
        decay_leading(optimizer, cell, 0.0 if cell.optimizer == "adamw" else 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / config["steps"])
    generator, losses = torch.Generator().manual_seed(config["seed"]), []
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(config["steps"]):
        if len(order) < config["batch_size"]:
            order = torch.randperm(len(images), generator=generator)
        batch, order = order[: config["batch_size"]], order[config["batch_size"] :]
        optimizer.zero_grad()
        logits = config["logit_scale"] * model(images[batch].float() / 255.0)
        loss = nn.functional.cross_entropy(logits, labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), float(np.mean(losses[-50:])), enforcer.max_excess()


def measure(cell: Cell, config: dict[str, Any], data: tuple[Tensor, Tensor, Tensor, Tensor]) -> Row:
    """Train, certify, evaluate."""
    images, labels, test_images, test_labels = data
    start = time.perf_counter()
    model, loss, excess = train(cell, config, images, labels)
    seconds = time.perf_counter() - start
    certificate = certify(model, test_images[:1].float() / 255.0, space="pixels[0,1]")
    head = model[-1].weight.detach().double().numpy()
    with torch.no_grad():
        wide = model.double()
        logits = torch.cat([wide(part.double() / 255.0) for part in test_images.split(1000)]).numpy()
    correct = logits.argmax(axis=1) == test_labels.numpy()
    error = certificate.rounding["float64"].logits_error
    radii = certified_radius(logits, pair_norms(head, normalize=False), certificate.bound_features.value, 2.0 * error)
    weights = list(model.parameters())
    units = [rms_unit(weight) for weight in weights]
    return Row(
        optimizer=cell.optimizer,
        technique=cell.technique,
        value=cell.value,
        accuracy=float(correct.mean()),
        certified=certified_accuracy(radii, correct, float(Fraction(config["radius"]))),
        bound=certificate.bound.value * config["logit_scale"],
        bound_rms=certificate.bound.value * config["logit_scale"] / math.prod(units),
        norms=" ".join(f"{torch.linalg.matrix_norm(w, 2).item() / u:.3f}" for w, u in zip(weights, units, strict=True)),
        excess=excess if cell.technique in CAPS else math.nan,
        loss=loss,
        seconds=seconds,
    )


def read_rows(table: Path) -> list[Row]:
    """The rows of a table, if there is one."""
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        kinds = {field.name: str if field.type == "str" else float for field in fields(Row)}
        return [Row(**{key: kinds[key](value) for key, value in line.items()}) for line in csv.DictReader(file)]


def write_rows(table: Path, rows: list[Row]) -> None:
    """The whole table, by way of a temporary name."""
    part = table.with_name(table.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    os.replace(part, table)


def draw(rows: list[Row], x: str, y: str, title: str, path: Path) -> None:
    """One picture: a colour a technique, filled marks for Muon and hollow ones for AdamW."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    techniques = list(dict.fromkeys(row.technique for row in rows))
    for index, technique in enumerate(techniques):
        for optimizer, mark in zip(OPTIMIZERS, ("o", "s"), strict=True):
            chosen = sorted(
                (getattr(row, x), getattr(row, y))
                for row in rows
                if (row.technique, row.optimizer) == (technique, optimizer)
            )
            face = f"C{index % 10}" if optimizer == "muon" else "none"
            line = "-" if optimizer == "muon" else ":"
            axes.plot(
                *zip(*chosen, strict=True), line, marker=mark, color=f"C{index % 10}", markerfacecolor=face,
                label=f"{optimizer}, {technique}", linewidth=1,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("proved Lipschitz bound of the logits (l2 to l2)" if x == "bound" else "the same, RMS to RMS")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


_DATA: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def _worker(task: tuple[Cell, dict[str, Any]]) -> Row:
    torch.set_num_threads(1)
    assert _DATA is not None  # inherited from the parent by the fork
    return measure(task[0], task[1], _DATA)


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a dataset name or folder; default: that of the configuration")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=Path("examples/results"))
    parser.add_argument("--only", default="", help="only techniques whose name contains this")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it out")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each above 1")
    options = parser.parse_args()
    if not options.config.is_file():
        parser.error(f"{options.config} is not a file: give the YAML of a sweep, such as {CONFIG.name}")
    config = yaml.safe_load(options.config.read_text())
    config["steps"] = options.steps or config["steps"]
    table = options.output / "frontier_cifar_mlp.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    rows = read_rows(table)
    done = {Cell(row.optimizer, row.technique, row.value) for row in rows}
    todo = [cell for cell in cells(config) if cell not in done and options.only in cell.technique]
    if todo:
        global _DATA
        section = DataSection(path=options.data or config["data"])
        try:
            train_data, test_data = load_image_data(section, "train"), load_image_data(section, "test")
        except UserError as error:
            parser.error(str(error))
        _DATA = (train_data.pixel_values, train_data.labels, test_data.pixel_values, test_data.labels)
        with Progress() as progress:
            bar = progress.add_task("training", total=len(todo))
            for row in results(todo, config, options.jobs):
                rows.append(row)
                write_rows(table, rows)
                progress.update(bar, advance=1, description=f"{row.optimizer} {row.technique} {row.value:g}")
    draw(rows, "bound", "accuracy", "test accuracy", options.output / "frontier_accuracy.png")
    radius = config["radius"]
    draw(
        rows, "bound", "certified", f"accuracy certified at radius {radius}", options.output / "frontier_certified.png"
    )


def results(todo: list[Cell], config: dict[str, Any], jobs: int) -> Iterator[Row]:
    """The rows as they are ready."""
    if jobs == 1:
        assert _DATA is not None
        measured: Callable[[Cell], Row] = lambda cell: measure(cell, config, _DATA)  # noqa: E731
        yield from map(measured, todo)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_worker, [(cell, config) for cell in todo])


if __name__ == "__main__":
    main()
