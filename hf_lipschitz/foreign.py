"""Folders of other people's models: the model built locally from its config, with exactly the stored weights.

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


def timm_model(folder: Path, weights: Mapping[str, Array]) -> torch.nn.Module:
    """The float64 timm model of a folder, in evaluation mode.

    Raises:
        UserError: an architecture that the installed timm does not know, arguments that fetch something, or weights
            that are not exactly the model's.
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
    return _with_weights(lambda: timm.create_model(f"local-dir:{folder}", pretrained=False), weights)


def transformers_model(kind: Callable[[Any], Any], config: Any, weights: Mapping[str, Array]) -> torch.nn.Module:
    """The float64 model of a transformers class, in evaluation mode, with exactly the stored weights."""
    return _with_weights(lambda: kind(config), weights)


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


def example(shape: Sequence[int]) -> torch.Tensor:
    """A batch of one sample of a shape."""
    import torch

    return torch.zeros(1, *shape)


def _config(folder: Path) -> dict[str, Any]:
    return strict_json.object_of(strict_json.parse(strict_json.read_bytes(folder / CONFIG), CONFIG), CONFIG)


def _with_weights(build: Callable[[], Any], weights: Mapping[str, Array]) -> torch.nn.Module:
    import torch

    try:
        model = build().double().eval()
    except Exception as error:  # whatever a foreign constructor raises at what the folder's author wrote
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the model cannot be built from {CONFIG} ({reason}): mend the config") from None
    state = model.state_dict()
    for name in sorted({*state, *weights}):
        if name not in weights and not name.endswith(UNREAD_SUFFIXES):
            raise UserError(f"tensor {name!r} of {type(model).__name__} is not in the weights: save the model again")
        if name not in state:
            raise UserError(f"tensor {name!r} is stored, but {type(model).__name__} has none: save the model again")
        if name in weights and tuple(state[name].shape) != weights[name].shape:
            found = f"{weights[name].shape}, {type(model).__name__} takes {tuple(state[name].shape)}"
            raise UserError(f"tensor {name!r} has shape {found}: the config is of another model")
    with torch.no_grad():
        for name in {*state} & {*weights}:
            state[name].copy_(torch.from_numpy(np.array(weights[name])))
    return model
