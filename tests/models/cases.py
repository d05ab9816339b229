"""Small LipViTs of every kind, and the named sizes at a depth that a test can afford."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers.initialization import no_init_weights

from hf_lipschitz.models.lip_vit.configuration_lip_vit import ACTIVATIONS, POOLINGS, TOKEN_MIXERS, LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.models.lip_vit.presets import PRESETS

_TINY: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 2, "num_labels": 3}
_STAGES: dict[str, dict[str, Any]] = {
    "plain": {"stages": [{"depth": 2, "width": 8}]},
    "hierarchical": {
        "stages": [{"depth": 1, "width": 8}, {"depth": 0, "width": 12}, {"depth": 2, "width": 16}],
        "batch_centering": True,
        "neck_depth": 2,
        "image_mean": [0.4, 0.6],
        "image_std": [0.25, 2.0],
    },
}

# Every mixer with every activation, pooling and shape.
FORMS: dict[str, dict[str, Any]] = {
    f"{mixer} {activation} {pooling} {shape}": {
        **_TINY,
        **_STAGES[shape],
        "token_mixer": mixer,
        "attention_normalization": "softmax",
        "activation": activation,
        "pooling": pooling,
    }
    for mixer, activation, pooling, shape in itertools.product(TOKEN_MIXERS, ACTIVATIONS, POOLINGS, _STAGES)
}
FORMS |= {
    f"{mixer} sinkhorn {shape}": {
        **_TINY,
        **_STAGES[shape],
        "token_mixer": mixer,
        "attention_normalization": "sinkhorn",
    }
    for mixer, shape in itertools.product(("attention", "hybrid"), _STAGES)
}


def tiny(**changes: Any) -> LipViTConfig:
    """The smallest LipViT, with some keys changed."""
    return LipViTConfig(**{**_TINY, **_STAGES["plain"], **changes})


def preset(name: str, mixer: str, depth: int | None) -> LipViTConfig:
    """A named size at its real widths; ``depth`` replaces the number of blocks of a plain ViT (None keeps it)."""
    changes = {} if depth is None or "stages" in PRESETS[name] else {"num_hidden_layers": depth}
    return LipViTConfig.from_preset(name, token_mixer=mixer, num_labels=5, **changes)


def filled(config: LipViTConfig, seed: int = 0) -> LipViTForImageClassification:
    """A model in evaluation mode with all parameters and buffers random: quick to make, not orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    with no_init_weights():
        model = LipViTForImageClassification(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            scale = tensor.shape[-1] ** -0.5 if name.endswith("weight") else 0.3
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return model
