"""A recipe -> a trained, constrained, certified checkpoint folder."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.import_utils import is_torchvision_available

from hf_lipschitz.bounds.certificate import FILE_NAME
from hf_lipschitz.caps.arithmetic import NonFiniteWeightError, matmul_dtype
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.certified_model import CertifiedModel
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.optim.routing import constraints_of, route
from hf_lipschitz.optim.spectral_muon import NonFiniteGradientError, spectral_muon
from hf_lipschitz.training.callback import LipschitzCallback
from hf_lipschitz.training.data import BatchedImages, ImageData, load_image_data
from hf_lipschitz.training.losses import CertifiedLoss
from hf_lipschitz.training.recipe import Recipe
from hf_lipschitz.training.trainer import LipschitzTrainer, LossProgress

# TrainingArguments that a recipe says elsewhere, and where.
_OWN_KEYS = {
    "output_dir": "the output folder",
    "max_steps": "trainer.max_steps",
    "per_device_train_batch_size": "trainer.batch_size",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "trainer.schedule",
    "warmup_steps": "trainer.warmup_fraction",
    "bf16": "trainer.bf16",
    "logging_steps": "trainer.logging_steps",
    "save_steps": "trainer.save_steps",
    "seed": "trainer.seed",
}


@dataclass(frozen=True)
class TrainedModel:
    """What a run leaves: the checkpoint folder, the model, the recipe, the log history, and how long training took."""

    folder: Path
    model: CertifiedModel
    recipe: Recipe
    history: list[dict[str, Any]]
    seconds: float


def train(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    progress: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    data: ImageData | None = None,
) -> TrainedModel:
    """Train as a recipe says and save model, processor, certificate and ``trainer_state.json`` into ``output_dir``.

    Args:
        recipe: the run.
        output_dir: the checkpoint folder; the Trainer's own checkpoints go into ``checkpoint-N`` inside it.
        progress: show the Trainer's progress bar and log lines.
        resume: go on from the last ``checkpoint-N``.
        overwrite: delete what ``output_dir`` holds first.
        data: training images, where they are loaded already.

    Raises:
        UserError: anything in recipe, data or folder that a user can mend.
    """
    folder = Path(output_dir)
    checkpoint = _earlier_run(folder, resume, overwrite)
    set_seed(recipe.trainer.seed)
    config = build_config(recipe)
    if data is None:
        data = load_image_data(recipe.data, "train", size=config.image_size, channels=config.num_channels)
    config.id2label = dict(enumerate(data.label_names))
    config.label2id = {name: index for index, name in enumerate(data.label_names)}
    data.check(config)
    model = LipViTForImageClassification(config)
    route(model.named_parameters(), constraints_of(model))  # before the Trainer makes a folder
    trainer = build_trainer(recipe, model, data, folder, progress=progress)
    if overwrite and trainer.is_world_process_zero():  # last, so that a mistake in the recipe costs nothing
        _empty(folder)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (NonFiniteGradientError, NonFiniteWeightError) as error:
        raise UserError(f"training stopped after step {trainer.state.global_step}: {error}") from error
    seconds = time.perf_counter() - start
    model.eval()
    if trainer.is_world_process_zero():
        _save(trainer, folder)
    return TrainedModel(folder, model, recipe, list(trainer.state.log_history), seconds)


def build_config(recipe: Recipe) -> LipViTConfig:
    """The model configuration of a recipe; UserError for keys it does not know or sizes that do not fit."""
    section = recipe.model
    known = {field.name for field in dataclasses.fields(LipViTConfig)}  # pyright: ignore[reportArgumentType]
    for key in section.config:
        if key not in known:
            raise UserError(
                f"model.config.{key} is no LipViT configuration key: choose among {', '.join(sorted(known))}"
            )
    try:
        if section.preset is not None:
            return LipViTConfig.from_preset(section.preset, **section.config)
        return LipViTConfig(**section.config)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None


def build_trainer(
    recipe: Recipe, model: LipViTForImageClassification, data: ImageData, folder: Path, *, progress: bool = True
) -> LipschitzTrainer:
    """The Trainer of a recipe: certified loss, optimizer, schedule, callback."""
    config = model.config
    loss = CertifiedLoss(
        model,
        recipe.loss.name,
        lipschitz=1.0 / min(config.image_std or [1.0]),
        epsilon=recipe.loss.epsilon,
        scale=recipe.loss.scale,
    )
    arguments = training_arguments(recipe, folder, progress=progress)
    optimizer: dict[str, Any] = {}
    if recipe.optimizer.name == "spectral_muon":
        # "args" says which processes train together; lr and weight decay are the recipe's own.
        settings = {**recipe.optimizer.model_dump(exclude={"name", "headroom"}), "args": arguments}
        optimizer = {"optimizer_cls_and_kwargs": (spectral_muon, settings)}
    every = recipe.trainer.estimate_steps
    lipschitz = LipschitzCallback(
        headroom=recipe.optimizer.headroom,
        estimate_every=every,
        estimate_inputs=None if every is None else data.pixel_values,
    )
    needed = arguments.train_batch_size * arguments.world_size
    if len(data) < needed:
        raise UserError(f"a batch takes {needed} images and there are {len(data)}: lower trainer.batch_size")
    try:
        return LipschitzTrainer(
            model=model,
            args=arguments,
            processing_class=image_processor(config),
            train_dataset=BatchedImages(data, crop=recipe.data.crop, flip=recipe.data.flip),
            data_collator=BatchedImages.collate,
            compute_loss_func=loss,
            callbacks=[lipschitz, LossProgress(loss)],
            **optimizer,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # arguments that do not go together, a missing package
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def training_arguments(recipe: Recipe, folder: Path, *, progress: bool = True) -> TrainingArguments:
    """transformers' TrainingArguments of a recipe; UserError for arguments it does not know."""
    section = recipe.trainer
    on_cpu = not torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": section.max_steps,
        "per_device_train_batch_size": section.batch_size,
        "learning_rate": recipe.optimizer.lr,
        "lr_scheduler_type": section.schedule,
        "warmup_steps": round(section.warmup_fraction * section.max_steps),
        "bf16": section.bf16 if section.bf16 != "auto" else matmul_dtype(_device()) == torch.bfloat16,
        "logging_steps": section.logging_steps,
        "save_strategy": "no" if section.save_steps is None else "steps",
        "save_steps": section.save_steps or 500,
        "save_total_limit": 2,
        "seed": section.seed,
        "max_grad_norm": 0.0,
        "report_to": [],
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu,
        "optim": "adamw_torch",
        "weight_decay": recipe.optimizer.weight_decay,
    }
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key, value in section.arguments.items():
        if key not in known:
            raise UserError(f"trainer.arguments.{key} is no key of transformers.TrainingArguments: look it up there")
        if key in _OWN_KEYS:
            raise UserError(f"trainer.arguments.{key} is set twice: leave it out and use {_OWN_KEYS[key]}")
        arguments[key] = value
    try:
        return TrainingArguments(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from None


def image_processor(config: LipViTConfig) -> Any:
    """The processor of a model: its number of channels, its image size, rescale to [0, 1], normalise nothing."""
    if is_torchvision_available():
        from hf_lipschitz.models.lip_vit.image_processing_lip_vit import LipViTImageProcessor as Processor
    else:
        from hf_lipschitz.models.lip_vit.image_processing_pil_lip_vit import LipViTImageProcessorPil as Processor
    size = {"height": config.image_size, "width": config.image_size}
    return Processor(size=size, num_channels=config.num_channels)  # pyright: ignore[reportCallIssue]


def save_processor(folder: Path, config: LipViTConfig) -> None:
    """Write ``preprocessor_config.json``."""
    image_processor(config).save_pretrained(folder)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _earlier_run(folder: Path, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to go on from, if any; UserError where the folder holds what nobody asked to touch."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another output folder")
    if resume:
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if checkpoint is None:
            raise UserError(f"{folder} holds no checkpoint-N to go on from: leave out --resume")
        return checkpoint
    is_first = int(os.environ.get("RANK", "0")) == 0  # the others may find what the first process has begun to write
    if is_first and not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder, or pass --overwrite or --resume")
    return None


def _empty(folder: Path) -> None:
    """Delete what a folder holds, but not the folder, which may be a link or a mount."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _save(trainer: LipschitzTrainer, folder: Path) -> None:
    """Model, certificate, processor and ``trainer_state.json``; UserError where the weights cannot be certified."""
    model: Any = trainer.model
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_processor(folder, model.config)
    trainer.save_state()
    if not (folder / FILE_NAME).exists():
        raise UserError(f"{folder} was saved without a certificate: see the warning above")
