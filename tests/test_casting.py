"""Cast copies: a folder of their own, certified from their own weights, and how far they are from the original."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_lipschitz.casting import CASTS, cast_checkpoint
from hf_lipschitz.certify import certify, write_certificate
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.verification import verify
from hf_lipschitz.weight_change import bound_weight_change
from tests.models.cases import tiny

_LEVELS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "int8": 1.0 / 254.0 * 16.0}  # of a row's largest entry, at most


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LipViTForImageClassification(tiny(image_mean=[0.5, 0.5], image_std=[0.5, 0.5]))
    model.save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "README.md").write_text("of the original")
    return tmp_path / "original"


@pytest.mark.parametrize("dtype", CASTS)
def test_a_copy_is_certified_from_its_own_weights(folder: Path, dtype: str) -> None:
    copy = folder.parent / "copy"
    cast_checkpoint(folder, dtype, copy)
    certificate = write_certificate(copy)
    assert verify(copy).ok and not (copy / "README.md").exists()
    assert certificate.bound.value != certify(folder).bound.value
    assert ("bfloat16" in certificate.rounding) == (dtype == "bfloat16")
    before, after = (load_file(path / "model.safetensors") for path in (folder, copy))
    for name, tensor in before.items():
        rounded = after[name].float()
        largest = tensor.abs().flatten(1).amax(dim=1) if tensor.ndim > 1 else tensor.abs()
        moved = (rounded - tensor).abs().flatten(1).amax(dim=1) if tensor.ndim > 1 else (rounded - tensor).abs()
        assert torch.all(moved <= _LEVELS[dtype] * largest + 1e-12), name
        assert after[name].dtype == (torch.float32 if dtype == "int8" else getattr(torch, dtype))
    assert json.loads((copy / "config.json").read_text())["dtype"] == ("float32" if dtype == "int8" else dtype)


@pytest.mark.parametrize("dtype", CASTS)
def test_no_image_moves_the_outputs_further(folder: Path, dtype: str) -> None:
    copy = folder.parent / "copy"
    cast_checkpoint(folder, dtype, copy)
    bound = bound_weight_change(folder, copy)
    models = [AutoModelForImageClassification.from_pretrained(path).double().eval() for path in (folder, copy)]
    images = torch.rand(32, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
    with torch.no_grad():
        one, other = (model(images).logits for model in models)
    moved = float((one - other).norm(dim=1).max())
    assert 0.0 < moved <= bound.logits < np.inf


def test_int8_has_255_levels_a_row(folder: Path) -> None:
    copy = folder.parent / "copy"
    cast_checkpoint(folder, "int8", copy)
    for name, tensor in load_file(copy / "model.safetensors").items():
        if tensor.ndim == 2:
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127.0
            levels = tensor / scale.clamp_min(1e-30)
            assert torch.all((levels - levels.round()).abs() < 1e-3), name


@pytest.mark.parametrize(
    ("dtype", "prepare", "message"),
    [
        ("int4", lambda folder, copy: None, "no cast is named 'int4'"),
        ("int8", lambda folder, copy: (copy.mkdir(), (copy / "x").write_text("")), "not an empty folder"),
        ("int8", lambda folder, copy: (folder / "model.safetensors").unlink(), "holds no safetensors weights"),
        ("float16", lambda folder, copy: _enlarge(folder), "holds values that float16 does not"),
    ],
    ids=["dtype", "output", "weights", "range"],
)
def test_what_cannot_be_cast(folder: Path, dtype: str, prepare: object, message: str) -> None:
    copy = folder.parent / "copy"
    prepare(folder, copy)  # type: ignore[operator]
    left = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(UserError, match=message):
        cast_checkpoint(folder, dtype, copy)
    assert sorted(path.name for path in folder.parent.iterdir()) == left


def _enlarge(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
