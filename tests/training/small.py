"""Models of a few hundred parameters, images for them, and Trainers that need a tenth of a second a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_lipschitz.bounds.engine import bound_program
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.weights import read_weights
from hf_lipschitz.certify import program_of_folder
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.optim.spectral_muon import spectral_muon
from hf_lipschitz.training.callback import LipschitzCallback
from hf_lipschitz.training.data import BatchedImages, ImageData

# By name: the Trainer's keyword arguments, and a learning rate with which a step leaves the constraint by far.
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "spectral_muon": ({"optimizer_cls_and_kwargs": (spectral_muon, {"lr": 0.2})}, {}),
    "adamw": ({}, {"optim": "adamw_torch", "learning_rate": 0.1}),
    "sgd": ({}, {"optim": "sgd", "learning_rate": 2.0}),
}


def tiny_model(seed: int = 0, **config: Any) -> LipViTForImageClassification:
    """4 x 4 grey images in four patches, one block of width 8, three classes."""
    torch.manual_seed(seed)
    sizes = {"image_size": 4, "num_channels": 1, "patch_size": 2, "stages": [{"depth": 1, "width": 8}]}
    return LipViTForImageClassification(LipViTConfig(**{**sizes, "num_labels": 3, **config}))


def tiny_images(count: int = 36, seed: int = 1) -> ImageData:
    """Random images with random labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ImageData(pixels, torch.randint(0, 3, (count,), generator=generator), ["a", "b", "c"])


def tiny_arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Four steps of six images; every step is logged, every second one saved."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 6,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": 0.0,
    }
    return TrainingArguments(**{**defaults, **settings})


def tiny_trainer(
    folder: Path,
    model: Any = None,
    *callbacks: Any,
    optimizer: str = "adamw",
    kind: type[Trainer] = Trainer,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """A Trainer with ``LipschitzCallback()``, or with the callbacks given.

    ``options`` go to the Trainer, the remaining keywords to the TrainingArguments.
    """
    trainer_options, defaults = OPTIMIZERS[optimizer]
    return kind(
        model=tiny_model() if model is None else model,
        args=tiny_arguments(folder, **{**defaults, **settings}),
        train_dataset=BatchedImages(tiny_images()),
        data_collator=BatchedImages.collate,
        callbacks=list(callbacks) or [LipschitzCallback()],
        **{**trainer_options, **(options or {})},
    )


def worst_norms(model: Any) -> tuple[float, float]:
    """The largest singular value of the matrices of the body, and the longest row of the head, in float64."""
    body, rows = 0.0, 0.0
    for name, parameter in model.named_parameters():
        values = parameter.detach().double().numpy()
        if name == "classifier.weight":
            rows = float(np.linalg.norm(values, axis=1).max())
        elif values.ndim == 2 and name.endswith("weight"):
            body = max(body, float(np.linalg.svd(values, compute_uv=False).max()))
    return body, rows


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint folder, sharded or not."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def bound_of(folder: Path) -> float:
    """The bound to the logits, re-derived from the files of a checkpoint folder."""
    return bound_program(program_of_folder(folder), read_weights(folder), BUILT_IN).outputs["logits"].lipschitz


def equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
