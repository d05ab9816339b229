"""Configuration files that make transformers load something else than what was checked; nothing is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.remote_code import PROCESSOR_AUTO_MAP, REMOTE_FILE_NAME

CONFIGURATIONS = ("config.json", "preprocessor_config.json", "processor_config.json")
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PROCESSORS = CONFIGURATIONS[1:]
_OWN_PROCESSORS = [name.rpartition(".")[2] for name in PROCESSOR_AUTO_MAP["AutoImageProcessor"].values()]
# Keys with which transformers loads other weights, another configuration, or code from elsewhere.
_REDIRECTIONS = (
    *("transformers_weights", "configuration_files", "quantization_config", "custom_pipelines"),
    *("attn_implementation", "experts_implementation", "per_layer_config"),
)


def redirections(path: Path) -> list[str]:
    """Where a configuration makes transformers load something else than what is checked here."""
    if not path.exists():
        return []
    try:
        values = strict_json.object_of(strict_json.parse(strict_json.read_bytes(path), path.name), path.name)
    except KernelError as error:
        return [str(error)]
    nested = [values, *(value for value in values.values() if isinstance(value, dict))]
    found = {key for each in nested for key in _REDIRECTIONS if each.get(key) is not None}
    found |= {key for key in values if key.startswith("_") and key != "_name_or_path"}  # set through properties
    reasons = [f"{path.name}: {key!r} may replace the weights or the code that was checked" for key in sorted(found)]
    classes = {name for each in nested for name in _leaves(each.get("auto_map", []))}
    module = REMOTE_FILE_NAME.removesuffix(".py")
    foreign = sorted(str(name) for name in classes if not re.fullmatch(rf"{module}\.\w+", str(name)))
    return reasons + [f"{path.name}: auto_map names {name!r}, code that is not the published file" for name in foreign]


def _leaves(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if children is None else [leaf for child in children for leaf in _leaves(child)]


def check_dtype(path: Path, stored: Mapping[str, str]) -> None:
    """Raise KernelError where config.json names another dtype than the weights have: loading would cast them.

    Args:
        path: of config.json.
        stored: tensor name -> safetensors dtype.
    """
    values = strict_json.object_of(strict_json.parse(strict_json.read_bytes(path), path.name), path.name)
    for key in ("dtype", "torch_dtype"):
        wanted = values.get(key)
        other = sorted({dtype for dtype in stored.values() if dtype in _DTYPES.values()} - {_DTYPES.get(str(wanted))})
        if wanted is not None and other:
            raise KernelError(
                f"{path.name}: {key} {wanted!r} casts weights stored as {', '.join(other)} when they are loaded"
            )


def check_processor(folder: Path) -> None:
    """The image processor is saved after the model, so it is checked by meaning: rescale to [0, 1], no normalising."""
    for name in _PROCESSORS:
        if not (folder / name).exists():
            continue
        values = strict_json.object_of(strict_json.parse(strict_json.read_bytes(folder / name), name), name)
        if name == "processor_config.json":  # transformers nests it there, and only there
            values = strict_json.object_of(values.get("image_processor", values), name)
        elif "image_processor" in values:
            raise KernelError(f"{name}: 'image_processor' does not belong here; save the processor again")
        if values.get("do_normalize", True) is not False:
            raise KernelError(f"{name}: the processor normalises, the certificate speaks of pixels in [0, 1]")
        if values.get("do_rescale") is not True or values.get("rescale_factor") != 1.0 / 255.0:
            raise KernelError(f"{name}: the processor must rescale by 1/255, so that pixels lie in [0, 1]")
        if values.get("image_processor_type", _OWN_PROCESSORS[0]) not in _OWN_PROCESSORS:
            raise KernelError(f"{name}: {values['image_processor_type']!r} is none of {', '.join(_OWN_PROCESSORS)}")
