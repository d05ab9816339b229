"""`certify`: writes the certificate of the stored weights, or says why there is none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file, save_file
from timm.models import save_for_hf
from transformers import ResNetConfig, ResNetForImageClassification

from tests.cli.conftest import Call

CERTIFICATE = "lipschitz_certificate.json"


def test_it_writes_the_same_certificate_again(call: Call, folder: Path) -> None:
    before = (folder / CERTIFICATE).read_bytes()
    (folder / CERTIFICATE).unlink()
    ran = call("certify", folder)
    assert ran.status == 0
    assert str(folder / CERTIFICATE) in ran.out and "to logits" in ran.out and "to features" in ran.out
    assert (folder / CERTIFICATE).read_bytes() == before


def test_json(call: Call, folder: Path) -> None:
    ran = call("certify", folder, "--json")
    value = ran.value
    assert ran.status == 0
    keys = {
        "certificate",
        "bound",
        "bound_features",
        "rounding_dtypes",
        "matrices",
        "files",
        "largest_factors",
        "notes",
    }
    assert set(value) == keys
    written = json.loads((folder / CERTIFICATE).read_text())
    assert value["bound"] == written["bound"] and value["files"] == written["digests"]["files"]


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_nan, "NaN"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (_config(model_type="no_such_model"), "digits cannot be certified"),
        (_config(architectures=["NoSuchClass"]), "NoSuchClass"),
        (_config(num_hidden_layers=2, stages=None), "weight"),
    ],
)
def test_what_cannot_be_certified(call: Call, folder: Path, spoil: Callable[[Path], object], says: str) -> None:
    (folder / CERTIFICATE).unlink()
    spoil(folder)
    ran = call("certify", folder)
    assert ran.status == 1
    assert says in ran.complaint and not ran.out
    assert not (folder / CERTIFICATE).exists()
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.fixture
def of_timm(tmp_path: Path) -> Path:
    """A ResNet with few channels, as timm saves it."""
    torch.manual_seed(0)
    sizes = {"layers": (1, 1, 1, 1), "channels": (4, 4, 6, 8), "num_classes": 3, "zero_init_last": False}
    save_for_hf(timm.create_model("resnet18", **sizes), tmp_path / "timm", safe_serialization=True)
    _config(pretrained_cfg={"input_size": [3, 32, 32], "num_classes": 3})(tmp_path / "timm")
    return tmp_path / "timm"


def test_a_folder_of_timm(call: Call, of_timm: Path) -> None:
    ran = call("certify", of_timm)
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert lines[0] == f"wrote {of_timm / CERTIFICATE}"
    assert "(log10 " in lines[1] and lines[1].endswith("in l2 from model_input to logits")
    assert lines[3].startswith("  largest factors: ") and "conv1 (convolution_batch_norm@1) " in lines[3]
    assert call("certify", of_timm, "--space", "pixels[0,1]", "--json").value["bound"]["from"] == "pixels[0,1]"
    other = call("certify", of_timm, "--norm", "token_max", "--json").value
    assert other["bound"]["norm"] == "token_max"
    factors = [each["factor"] for each in other["largest_factors"]]
    assert factors == sorted(factors, reverse=True) and len(factors) == 5


def test_the_shape_of_one_sample(call: Call, tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    assert "states no input size: give the shape of one sample" in call("certify", tmp_path).complaint
    ran = call("certify", tmp_path, "--input-shape", "3,16,16")
    assert ran.status == 0 and (tmp_path / CERTIFICATE).exists()
    for wrong in ("3,x", "3,,4", "0,4", ""):
        ran = call("certify", tmp_path, "--input-shape", wrong)
        assert ran.status == 2 and "give positive whole numbers with commas" in ran.complaint
    for wrong in ("16,16", "1,16,16", "3,4,4,4"):
        ran = call("certify", tmp_path, "--input-shape", wrong)
        assert ran.status == 2 and "states images of 3 channels, so give 3,height,width" in ran.complaint
    (tmp_path / "config.json").write_text("{")
    ran = call("certify", tmp_path, "--input-shape", "3,16,16")
    assert ran.status == 1 and "config.json: not valid JSON" in ran.complaint


def test_a_stock_vit_is_refused_by_name(call: Call, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_vit"), tmp_path, safe_serialization=True)
    ran = call("certify", tmp_path)
    assert ran.status == 1 and not (tmp_path / CERTIFICATE).exists()
    assert "blocks.0.attn (Attention): scaled_dot_product_attention cannot be certified" in ran.complaint


@pytest.mark.slow_ci
@pytest.mark.parametrize("norm", ["l2", "token_max"])
def test_a_resnet_18_takes_less_than_a_minute(call: Call, tmp_path: Path, norm: str) -> None:
    torch.manual_seed(0)
    save_for_hf(timm.create_model("resnet18", zero_init_last=False), tmp_path, safe_serialization=True)
    start = time.perf_counter()
    ran = call("certify", tmp_path, "--norm", norm)
    assert ran.status == 0 and "largest factors: " in ran.out
    assert time.perf_counter() - start < 60.0


def test_a_cast_copy(call: Call, folder: Path, tmp_path: Path) -> None:
    """Certified from its own weights; the original stays as it was, and the distance of outputs is stated."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ran = call("certify", folder, "--cast", "bfloat16", "--output", tmp_path / "copy", "--json")
    assert ran.status == 0 and "bfloat16" in ran.value["rounding_dtypes"]
    change = {key: float(value) for key, value in ran.value["change"].items()}
    assert 0.0 < change["features"] < 100.0 and 0.0 < change["logits"] < 100.0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert call("verify", tmp_path / "copy").status == 0
    ran = call("certify", folder, "--cast", "int8", "--output", tmp_path / "other")
    assert ran.status == 0 and "logits differ from the original's by at most" in ran.out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--cast", "bfloat16"), "--cast and --output belong together"),
        (("--output", "x"), "--cast and --output belong together"),
        (("--cast", "int4", "--output", "x"), "no cast is named 'int4': choose bfloat16, float16, int8"),
    ],
)
def test_casts_that_are_refused(call: Call, folder: Path, options: tuple[str, ...], complaint: str) -> None:
    ran = call("certify", folder, *options)
    assert ran.status == 2 and complaint in ran.complaint and ran.out == ""
