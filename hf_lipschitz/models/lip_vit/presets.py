"""Named sizes of LipViT. ``nano`` is hierarchical and made for two CPU cores, the others are plain ViTs."""

from __future__ import annotations

from typing import Any


def _plain(width: int, depth: int) -> dict[str, dict[str, Any]]:
    size = {"hidden_size": width, "num_hidden_layers": depth}
    return {
        "": {**size, "image_size": 32, "patch_size": 4},
        "-patch16-224": {**size, "image_size": 224, "patch_size": 16},
    }


_NANO: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "stages": [
        {"depth": 0, "width": 64},
        {"depth": 1, "width": 128},
        {"depth": 1, "width": 256},
        {"depth": 0, "width": 256},
        {"depth": 0, "width": 256},
    ],
    "batch_centering": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "nano": _NANO,
    "nano-patch14-224": {**_NANO, "image_size": 224, "patch_size": 14},
    **{
        f"{name}{suffix}": preset
        for name, width, depth in (("tiny", 384, 12), ("small", 512, 24), ("base", 1024, 40))
        for suffix, preset in _plain(width, depth).items()
    },
}
