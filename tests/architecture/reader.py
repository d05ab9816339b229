"""The world that README.md assumes: a Hub that holds ``your-org/lip-vit``, and a data set called ``data``.

Run as a script in a process whose environment names a loopback Hub; the arguments are files with the Python blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def publish(folder: Path) -> None:
    """Push a tiny certified LipViT for 8 x 8 images to the Hub of the environment."""
    from hf_lipschitz import LipViTConfig, LipViTForImageClassification, push
    from hf_lipschitz.training.run import save_processor

    config = LipViTConfig(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=1)
    LipViTForImageClassification(config).save_pretrained(folder)
    save_processor(folder, config)
    push(folder, "your-org/lip-vit")


def some_images() -> list[dict[str, Any]]:
    """Thirty-two random images with labels, as rows that the Trainer's default collator understands."""
    import torch

    return [{"pixel_values": torch.rand(3, 8, 8), "labels": i % 2} for i in range(32)]


def main(paths: list[str]) -> None:
    """Publish the checkpoint, then execute each file's text in one namespace."""
    publish(Path("published"))
    namespace: dict[str, Any] = {"__name__": "__main__", "data": some_images()}
    for path in paths:
        exec(compile(Path(path).read_text(), path, "exec"), namespace)


if __name__ == "__main__":
    main(sys.argv[1:])
