"""Folders of other people's models: the model built locally from its config, and given exactly the stored weights.

Two kinds: timm's (config.json with ``architecture`` and no model type of transformers) and transformers classes that
state no bound program. Nothing is fetched, and no code of the folder is run: classes come from the installed packages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.engine import UNREAD_SUFFIXES
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.errors import UserError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
# Arguments with which timm would read weights from elsewhere.
_FETCHING = ("pretrained", "checkpoint", "cache", "state_dict")


def is_timm(folder: Path) -> bool:
    """Whether config.json is timm's; one that also names a model type of transformers is theirs."""
    config = _config(folder)
    return "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper"


def timm_model(folder: Path) -> torch.nn.Module:
    """The timm model that a folder's config describes, its weights not read.

    Raises:
        UserError: an architecture that the installed timm does not know, or arguments that fetch something.
    """
    import timm

    config = _config(folder)
    name = config["architecture"]
    arguments = strict_json.object_of(config.get("model_args") or {}, f"{CONFIG}: model_args")
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{CONFIG}: timm {timm.__version__} knows no architecture {name!r}: update timm")
    for key in arguments:
        if key.startswith(_FETCHING):
            raise UserError(f"{CONFIG}: the model argument {key!r} reads weights from elsewhere: remove it")
    return _built(lambda: timm.create_model(f"local-dir:{folder}", pretrained=False))


def transformers_model(kind: Callable[[Any], Any], config: Any) -> torch.nn.Module:
    """The model of a transformers class, its weights not read."""
    return _built(lambda: kind(config))


def load_exactly(model: torch.nn.Module, weights: Mapping[str, Array]) -> None:
    """Turn a model into float64 and copy stored weights into it, name by name.

    Raises:
        UserError: a tensor of the model that is not stored, one stored that the model has not, or another shape.
    """
    import torch

    state, kind = model.double().state_dict(), type(model).__name__
    for name in sorted({*state, *weights}):
        if name not in weights and not name.endswith(UNREAD_SUFFIXES):
            raise UserError(f"tensor {name!r} of {kind} is not in the weights: save the model again")
        if name not in state:
            raise UserError(f"tensor {name!r} is stored, but {kind} has none: save its state dict under its own names")
        if name in weights and tuple(state[name].shape) != weights[name].shape:
            found = f"{weights[name].shape}, {kind} takes {tuple(state[name].shape)}"
            raise UserError(f"tensor {name!r} has shape {found}: the config is of another model")
    with torch.no_grad():
        for name in {*state} & {*weights}:
            state[name].copy_(torch.from_numpy(np.array(weights[name])))


def example_shape(folder: Path) -> tuple[int, ...]:
    """The sample shape that a config states: timm's ``input_size``, or ``num_channels`` and ``image_size``.

    Raises:
        UserError: it states none.
    """
    config = _config(folder)
    stated = (config.get("pretrained_cfg") or {}).get("input_size") if "architecture" in config else None
    if stated is None and {"num_channels", "image_size"} <= set(config):
        size = config["image_size"]
        stated = [config["num_channels"], *(size if isinstance(size, list) else [size, size])]
    if not isinstance(stated, list) or not stated or not all(type(n) is int and n > 0 for n in stated):
        raise UserError(f"{CONFIG} states no input size: give the shape of one sample, such as 3,224,224")
    return tuple(stated)


def check_shape(folder: Path, shape: Sequence[int]) -> None:
    """Refuse the shape of a sample that a config contradicts, before a model is built and traced with it.

    Raises:
        UserError: the config states a number of channels, and the shape is not that of images with as many.
    """
    config = _config(folder)
    size = (config.get("pretrained_cfg") or {}).get("input_size") if "architecture" in config else None
    channels = size[0] if isinstance(size, list) and size else config.get("num_channels")
    if type(channels) is int and (len(shape) != 3 or shape[0] != channels):
        raise UserError(
            f"{','.join(map(str, shape))} is no shape of one sample: {CONFIG} states images of {channels} channels, so "
            f"give {channels},height,width"
        )


def example(shape: Sequence[int]) -> torch.Tensor:
    """A batch of one sample of a shape."""
    import torch

    return torch.zeros(1, *shape)


def _config(folder: Path) -> dict[str, Any]:
    return strict_json.object_of(strict_json.parse(strict_json.read_bytes(folder / CONFIG), CONFIG), CONFIG)


def _built(build: Callable[[], Any]) -> torch.nn.Module:
    try:
        return build().eval()
    except Exception as error:  # whatever a foreign constructor raises at what the folder's author wrote
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the model cannot be built from {CONFIG} ({reason}): mend the config") from None
