"""Copies of a checkpoint in fewer bits, certified from their own weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from hf_lipschitz.errors import UserError

CASTS = ("bfloat16", "float16", "int8")


def cast_checkpoint(folder: Path, dtype: str, output: Path) -> None:
    """Write a copy of a checkpoint whose weights are rounded, with a certificate of its own.

    Args:
        folder: a checkpoint of one of this package's models.
        dtype: ``bfloat16`` or ``float16``: every floating tensor is stored in it. ``int8``: every matrix is rounded to
            255 levels of its own scale a row (symmetric, round to nearest), vectors are left as they are; the values
            are stored as float32, so that the copy loads like any other.
        output: a folder that does not exist yet, or is empty; nothing is left of it if writing fails.

    Raises:
        UserError: an unknown dtype, an output folder that is in use, or values that the dtype does not hold.
    """
    from transformers import AutoModelForImageClassification

    if dtype not in CASTS:
        raise UserError(f"no cast is named {dtype!r}: choose {', '.join(CASTS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: choose another --output")
    model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_rounded(name, tensor, dtype))
    if dtype != "int8":
        model = model.to(getattr(torch, dtype))
    partial = output.with_name(f".{output.name}.partial")
    try:
        model.save_pretrained(partial)
        for extra in ("preprocessor_config.json",):
            if (folder / extra).is_file():
                shutil.copyfile(folder / extra, partial / extra)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rounded(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The values that the copy holds, in the dtype of the original."""
    if not tensor.is_floating_point():
        return tensor
    if dtype == "int8":
        return _row_quantized(tensor) if tensor.ndim >= 2 else tensor
    rounded = tensor.to(getattr(torch, dtype))
    if not torch.isfinite(rounded).all():
        raise UserError(f"tensor {name!r} holds values that {dtype} does not: cast to bfloat16 instead")
    return rounded.to(tensor.dtype)


def _row_quantized(weight: torch.Tensor) -> torch.Tensor:
    """Each row as a multiple, -127 to 127, of a 127th of its largest entry; the shape and dtype stay."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / 127.0
    return ((rows / scale).round().clamp(-127, 127) * scale).view_as(weight)
