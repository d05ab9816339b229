"""Fine-tune a certified checkpoint on other labels with the plain Trainer, AdamW and LipschitzCallback.

The constraint comes from the checkpoint: nothing is configured here. After ``make demo``::

    python examples/fine_tune.py hf-lipschitz-demo/digits odd-even

trains the ten-digit classifier to tell odd from even digits and verifies the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import TensorDataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_lipschitz import LipschitzCallback, verify
from hf_lipschitz.training.data import load_image_data
from hf_lipschitz.training.recipe import DataSection


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of (uint8 image, label) -> one batch in [0, 1]."""
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images).float() / 255, "labels": torch.stack(labels)}


def main() -> None:
    """Load, train, save, verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder or a repository with a LipViT for 8 x 8 grey images")
    parser.add_argument("output", type=Path, help="where the fine-tuned checkpoint goes")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()

    data = load_image_data(DataSection(path="digits"), "train")
    model = AutoModelForImageClassification.from_pretrained(
        options.checkpoint, id2label={0: "even", 1: "odd"}, label2id={"even": 0, "odd": 1}, ignore_mismatched_sizes=True
    )
    arguments = TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        logging_steps=50,
        report_to=[],
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=TensorDataset(data.pixel_values, data.labels % 2),
        callbacks=[LipschitzCallback()],
    )
    trainer.train()
    model.save_pretrained(options.output)
    AutoImageProcessor.from_pretrained(options.checkpoint).save_pretrained(options.output)
    print(verify(options.output))


if __name__ == "__main__":
    main()
