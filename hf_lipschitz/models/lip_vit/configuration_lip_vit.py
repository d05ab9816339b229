"""LipViT configuration."""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from hf_lipschitz.models.lip_vit.presets import PRESETS

TOKEN_MIXERS = ("shift", "orthogonal", "attention", "hybrid")
ACTIVATIONS = ("maxmin", "abs", "group_sort")
ATTENTION_NORMALIZATIONS = ("softmax", "sinkhorn")
POOLINGS = ("l2", "sum")
# Keys that configurations once had not, with what was so before them: defaults may change, saved folders must not.
_BEFORE = {"attention_normalization": "softmax"}
_INTEGERS = {
    "image_size": (1, 65536),
    "num_channels": (1, 65536),
    "patch_size": (1, 4096),
    "hidden_size": (1, 65536),
    "num_hidden_layers": (0, 4096),
    "num_attention_heads": (1, 4096),
    "group_size": (2, 65536),
    "neck_depth": (0, 4096),
}


@strict
class LipViTConfig(PreTrainedConfig):
    r"""
    Configuration of a LipViT. Input is in pixel units [0, 1]; the model normalises inside.

    Args:
        image_size (`int`): side of the square input image, in pixels.
        num_channels (`int`): channels of the input image.
        patch_size (`int`): side of a patch; divides `image_size`.
        image_mean, image_std (`list[float]`): normalisation inside the model, one number a channel; 1 / min(std) is a
            factor of the bound from pixels.
        hidden_size, num_hidden_layers (`int`): width and number of blocks of the plain (one-stage) ViT. With `stages`
            they are set to the last width and the total depth.
        stages (`list[dict]`): `[{"depth": d, "width": w}, ...]`; between stages 2x2 patches merge through an
            orthogonal map.
        token_mixer (`str`): `"shift"`, `"orthogonal"`, `"attention"` or `"hybrid"` (shift and attention alternating).
        num_attention_heads (`int`): heads of the attention mixers; divides every width that has one.
        attention_normalization (`str`): of the attention mixers: `"sinkhorn"` (the weights of every query and of
            every key sum to one, which takes the factor sqrt(c) out of the bound) or `"softmax"` (of every query). A
            saved configuration without this key means softmax.
        shift_fraction (`float`): share of the channels that each of the four shifts moves (at least one channel).
        activation (`str`): `"maxmin"`, `"abs"` (on `abs_fraction` of the channels) or `"group_sort"` (groups of
            `group_size`).
        pooling (`str`): `"l2"` (norm over tokens) or `"sum"` (sum / sqrt(N)).
        neck_depth (`int`): orthogonal maps with activation after pooling.
        batch_centering (`bool`): subtract the batch mean after every map (a running mean, a bias, in evaluation).
        loss_scale (`float`): factor on the logits inside the model's own cross entropy (a loss temperature, not in the
            logits).
        constraints (`list[dict]`): which parameter carries which cap; by default every map is kept orthogonal and the
            head's rows in the unit ball.
    """

    model_type = "lip_vit"

    image_size: int = 32
    num_channels: int = 3
    patch_size: int = 4
    image_mean: list[float | int] | None = None
    image_std: list[float | int] | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 8
    stages: list[dict[str, int]] | None = None
    token_mixer: str = "shift"
    num_attention_heads: int = 4
    attention_normalization: str = "sinkhorn"
    shift_fraction: float | int = 0.0625
    activation: str = "maxmin"
    abs_fraction: float | int = 0.75
    group_size: int = 4
    pooling: str = "l2"
    pool_eps: float = 1e-12
    neck_depth: int = 1
    batch_centering: bool = False
    loss_scale: float | int = 3.0
    constraints: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_integers(self)
        self.image_mean = [0.5] * self.num_channels if self.image_mean is None else self.image_mean
        self.image_std = [1.0] * self.num_channels if self.image_std is None else self.image_std
        if self.stages is None:
            self.stages = [{"depth": self.num_hidden_layers, "width": self.hidden_size}]
        _check_stages(self.stages)
        self.hidden_size = self.stages[-1]["width"]
        self.num_hidden_layers = sum(stage["depth"] for stage in self.stages)
        if self.constraints is None:
            self.constraints = default_constraints()
        _check_choices(self)
        _check_sizes(self)
        _check_constraints(self.constraints)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LipViTConfig:
        """The configuration of a named size, such as `"nano"` or `"base-patch16-224"`; keyword arguments override
        it.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration as it was saved: where a key is missing, what was so before the key existed."""
        return super().from_dict({**_BEFORE, **config_dict}, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the thin remote-code file serves instead of copies of this package's source."""

    def grids(self) -> list[tuple[int, int]]:
        """The token grid (rows, columns) of each stage."""
        side = self.image_size // self.patch_size
        return [(side >> index, side >> index) for index in range(len(self.stages or []))]


def default_constraints() -> list[dict[str, Any]]:
    """Every matrix of the body orthogonal (norm at most 1), the head's rows in the unit ball."""
    body = r"(lip_vit\.)?(embeddings|stages|neck)\..*weight"
    return [
        {"pattern": body, "cap": "stiefel", "norm": "spectral", "value": 1.0},
        {"pattern": r"classifier\.weight", "cap": "row_normalize", "norm": "row", "value": 1.0},
    ]


def _check_integers(config: LipViTConfig) -> None:
    for key, (least, most) in _INTEGERS.items():
        value = getattr(config, key)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{key} is {value!r}: it must be an integer from {least} to {most}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_stages(stages: list[dict[str, int]]) -> None:
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"stages is {stages!r}: write it as a list of {{'depth': integer, 'width': integer}}")
    for index, stage in enumerate(stages):
        if set(stage) != {"depth", "width"} or any(type(value) is not int for value in stage.values()):
            raise ValueError(f"stages[{index}] is {stage}: write it as {{'depth': integer, 'width': integer}}")
        if stage["depth"] < 0 or stage["width"] < 1:
            raise ValueError(f"stages[{index}] is {stage}: depth must be at least 0 and width at least 1")
    if not stages:
        raise ValueError("stages is empty: give at least one {'depth': d, 'width': w}")


def _check_constraints(constraints: list[dict[str, Any]]) -> None:
    """What needs no torch; cap names are checked where the caps are (hf_lipschitz/optim/routing.py)."""
    for index, rule in enumerate(constraints):
        value = rule.get("value")
        if not {"pattern", "cap", "value"} <= set(rule) <= {"pattern", "cap", "norm", "value", "heads"}:
            raise ValueError(
                f"constraints[{index}] is {rule}: it needs pattern, cap, value, and may have norm and heads"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0.0:
            raise ValueError(f"constraints[{index}] has the value {value!r}: a cap must be a number greater than 0")
        try:
            re.compile(rule["pattern"])
        except (re.error, TypeError) as error:
            raise ValueError(f"constraints[{index}] has a pattern that is no regular expression ({error})") from None


def _check_choices(config: LipViTConfig) -> None:
    choices = {
        "token_mixer": TOKEN_MIXERS,
        "attention_normalization": ATTENTION_NORMALIZATIONS,
        "activation": ACTIVATIONS,
        "pooling": POOLINGS,
    }
    for key, known in choices.items():
        if getattr(config, key) not in known:
            raise ValueError(f"{key} is {getattr(config, key)!r}; choose one of {', '.join(known)}")
    for key in ("image_mean", "image_std"):
        values = getattr(config, key)
        if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
            raise ValueError(f"{key} is {values!r}: give a list of numbers, one a channel")
        if len(values) != config.num_channels:
            raise ValueError(f"{key} has {len(values)} entries for {config.num_channels} channels: give one each")
        setattr(config, key, list(values))
    if not all(1e-6 <= value <= 1e6 for value in config.image_std or []):
        raise ValueError(f"image_std is {config.image_std}: every entry must be positive, from 1e-6 to 1e6")
    for key in ("shift_fraction", "abs_fraction", "pool_eps", "loss_scale"):
        if not _is_number(getattr(config, key)):
            raise ValueError(f"{key} is {getattr(config, key)!r}: it must be a finite number")
    if not 0.0 < config.shift_fraction <= 0.25:
        raise ValueError(f"shift_fraction is {config.shift_fraction}: each of four groups takes a share in (0, 0.25]")
    if not 0.0 < config.abs_fraction <= 1.0:
        raise ValueError(f"abs_fraction is {config.abs_fraction}: it must lie in (0, 1]")
    if not 1e-12 <= config.pool_eps <= 1.0:
        raise ValueError(f"pool_eps is {config.pool_eps}: it must lie in [1e-12, 1]")
    if config.loss_scale <= 0.0:
        raise ValueError(f"loss_scale is {config.loss_scale}: it must be positive")


def _check_sizes(config: LipViTConfig) -> None:
    stages = config.stages or []
    if config.image_size % config.patch_size != 0:
        raise ValueError(
            f"patch_size {config.patch_size} does not divide image_size {config.image_size}: choose one that does"
        )
    side = config.image_size // config.patch_size
    if side % 2 ** (len(stages) - 1) != 0:
        raise ValueError(
            f"a grid of {side} x {side} patches cannot be halved {len(stages) - 1} times: "
            "use fewer stages or another patch_size"
        )
    uses_attention = config.token_mixer in ("attention", "hybrid")
    for index, stage in enumerate(stages):
        width = stage["width"]
        if config.activation == "maxmin" and width % 2 != 0:
            raise ValueError(f"stage {index} has width {width}: MaxMin pairs channels, so the width must be even")
        if config.activation == "group_sort" and width % config.group_size != 0:
            raise ValueError(
                f"stage {index} has width {width}: GroupSort needs a multiple of group_size {config.group_size}"
            )
        if stage["depth"] > 0 and uses_attention and width % config.num_attention_heads != 0:
            raise ValueError(f"stage {index} has width {width}: not a multiple of {config.num_attention_heads} heads")
        if stage["depth"] > 0 and width < 4:
            raise ValueError(f"stage {index} has width {width}: a block needs at least 4 channels")


__all__ = ["LipViTConfig"]
