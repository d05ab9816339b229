"""Copies of a checkpoint in fewer bits: the folder rewritten tensor by tensor, to be certified from its own weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_lipschitz.errors import UserError
from hf_lipschitz.remote_code import REMOTE_FILE_NAME

CASTS = ("bfloat16", "float16", "int8")
# Taken over are weights, configurations and tokenizers; what speaks of the original's weights is not.
_TAKEN, _LEFT = (".safetensors", ".json", ".txt", ".model"), ("lipschitz_certificate.json", "trainer_state.json")


def cast_checkpoint(folder: Path, dtype: str, output: Path) -> None:
    """Write a copy of a checkpoint whose weights are rounded; it has no certificate yet.

    Args:
        folder: a checkpoint with safetensors weights, sharded or not.
        dtype: ``bfloat16`` or ``float16``: every floating tensor is stored in it. ``int8``: every tensor of two or more
            dimensions is rounded to 255 levels of a scale of its own for each row (symmetric, to nearest), the others
            are left as they are; the values are stored as float32, so that the copy loads like any other.
        output: a folder that does not exist yet, or is empty; nothing is left of it if writing fails.

    Raises:
        UserError: an unknown dtype, no weights, an output folder that is in use, or values out of range of the dtype.
    """
    if dtype not in CASTS:
        raise UserError(f"no cast is named {dtype!r}: choose {', '.join(CASTS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: choose another --output")
    files = sorted(path for path in folder.iterdir() if path.suffix in _TAKEN and path.name not in _LEFT)
    files += list(folder.glob(REMOTE_FILE_NAME))
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{folder} holds no safetensors weights: save the model with save_pretrained first")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        for path in files:
            _copy(path, partial / path.name, dtype)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(path: Path, target: Path, dtype: str) -> None:
    """One file of the folder: weights rounded, the dtype in the configuration changed, anything else as it is."""
    if path.suffix == ".safetensors":
        tensors = {name: _rounded(name, tensor, dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, target, metadata={"format": "pt"})
        return
    if path.name == "config.json":
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = "float32" if dtype == "int8" else dtype
        target.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return
    shutil.copyfile(path, target)


def _rounded(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The tensor as the copy stores it."""
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(torch.float32 if dtype == "int8" else getattr(torch, dtype))
    if dtype == "int8" and tensor.ndim >= 2:
        rounded = _row_quantized(rounded)
    if not torch.isfinite(rounded).all():
        raise UserError(f"tensor {name!r} holds values that {dtype} does not: cast to bfloat16 instead")
    return rounded


def _row_quantized(weight: torch.Tensor) -> torch.Tensor:
    """Each row as a multiple, -127 to 127, of a 127th of its largest entry; the shape stays."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / 127.0
    return ((rows / scale).round().clamp(-127, 127) * scale).view_as(weight).contiguous()
