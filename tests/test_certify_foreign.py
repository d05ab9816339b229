"""certify of other people's models: in memory with an example input, and in folders of timm and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_lipschitz import certify
from hf_lipschitz.bounds.certificate import Certificate
from hf_lipschitz.bounds.check import check_folder
from hf_lipschitz.bounds.engine import bound_program, evaluate_program
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.weights import SINGLE, read_weights
from hf_lipschitz.certify import state_arrays, write_certificate
from hf_lipschitz.errors import UserError
from tests.models.cases import filled, tiny

_EXAMPLE = torch.zeros(1, 3, 16, 16)


def small_timm(**changes: Any) -> nn.Module:
    """A ResNet of timm with few channels, so that its norms take no time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "layers": (1, 1, 1, 1),
        "channels": (4, 4, 6, 8),
        "num_classes": 3,
        "zero_init_last": False,
    }
    return timm.create_model("resnet18", **{**sizes, **changes})


@pytest.fixture
def of_timm(tmp_path: Path) -> Path:
    """A folder as timm saves it, for images of 32 x 32 pixels."""
    folder = tmp_path / "timm"
    save_for_hf(small_timm(), folder, safe_serialization=True)
    change(folder, pretrained_cfg={"input_size": [3, 32, 32], "num_classes": 3})
    return folder


@pytest.fixture
def of_transformers(tmp_path: Path) -> Path:
    """A folder of a transformers class that states no program; its config states no input size."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def change(folder: Path, **keys: Any) -> None:
    """Replace keys of config.json."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **keys}))


def edit(folder: Path, function: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the stored tensors."""
    tensors = load_file(folder / SINGLE)
    function(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_a_model_in_memory() -> None:
    model = small_timm()
    certificate = certify(model, torch.zeros(2, 3, 32, 32), norm="token_max")
    assert certificate.files == {} and certificate.rounding == {}
    assert (certificate.bound.origin, certificate.bound.norm) == ("model_input", "token_max")
    assert certificate.program.nodes[0].attrs == {"shape": [3, 32, 32], "space": "model_input"}
    assert Certificate.from_bytes(certificate.to_bytes()) == certificate
    derived = bound_program(certificate.program, state_arrays(model), BUILT_IN, geometry="token_max")
    assert derived.outputs["logits"].lipschitz < certificate.bound.value < 1.001 * derived.outputs["logits"].lipschitz


def test_rounding_needs_bounded_inputs() -> None:
    model = small_timm()
    assert certify(model, _EXAMPLE).rounding == {}
    pixels = certify(model, _EXAMPLE, space="pixels[0,1]")
    assert set(pixels.rounding) == {"float64", "float32"} and pixels.bound.origin == "pixels[0,1]"


def test_our_own_models_need_no_example() -> None:
    model = filled(tiny())
    assert certify(model, torch.zeros(1, 2, 8, 8)).program == certify(model).program == model.bound_program()


def test_others_do() -> None:
    with pytest.raises(UserError, match=r"Linear states no bound program: give an example input, as in certify\(mod"):
        certify(nn.Linear(3, 3))


def test_a_diverged_model() -> None:
    model = nn.Linear(3, 3)
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(KernelError, match="tensor 'bias' contains NaN"):
        certify(model, torch.zeros(1, 3))


def test_an_unused_parameter() -> None:
    model = nn.Linear(3, 3)
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    with pytest.raises(KernelError, match="tensor 'spare' is stored but not covered by the program"):
        certify(model, torch.zeros(1, 3))


def test_a_folder_of_timm(of_timm: Path) -> None:
    certificate = write_certificate(of_timm)
    report = check_folder(of_timm, BUILT_IN)
    assert report.claims["bound"] == "ok" and not report.reasons
    assert set(certificate.files) == {"config.json", SINGLE}
    loaded = timm.create_model(f"local-dir:{of_timm}", pretrained=True).eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    executed = evaluate_program(certificate.program, read_weights(of_timm), BUILT_IN, x.numpy())["logits"]
    with torch.no_grad():
        assert executed == pytest.approx(loaded(x).numpy(), rel=1e-9, abs=1e-12)


def test_a_folder_of_transformers(of_transformers: Path) -> None:
    with pytest.raises(UserError, match=r"config.json states no input size: give the shape of one sample, such as 3,"):
        certify(of_transformers)
    certificate = certify(of_transformers, _EXAMPLE)
    loaded = ResNetForImageClassification.from_pretrained(of_transformers, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    executed = evaluate_program(certificate.program, read_weights(of_transformers), BUILT_IN, x.numpy())["logits"]
    with torch.no_grad():
        assert executed == pytest.approx(loaded(x).logits.numpy(), rel=1e-9, abs=1e-12)


def test_a_stock_vit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **size)).save_pretrained(tmp_path)
    says = (
        r"^vit\.\w+(\.\w+)*\.0\.attention(\.\w+)* \(ViT\w+\): (scaled_dot_product_attention|softmax) cannot be cert.*"
    )
    with pytest.raises(UserError, match=says + r"BoundedAttention does, or mix tokens with a stored matrix"):
        certify(tmp_path)


def test_a_stock_vit_of_timm_is_refused_with_the_way_out() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(UserError, match=r"^blocks.0.attn \(Attention\): scaled_dot_product_attention cannot be certif"):
        certify(model, torch.zeros(1, 3, 32, 32))


def test_weights_are_kept_exactly(of_timm: Path) -> None:
    """A weight that only float64 holds is bounded and executed as stored."""
    edit(of_timm, lambda t: t.update({"fc.weight": t["fc.weight"].double() + 2.0**-45}))
    certificate = certify(of_timm, _EXAMPLE)
    assert certificate.bound.value > certify(of_timm, _EXAMPLE).bound.value * (1.0 - 1e-12)
    assert read_weights(of_timm)["fc.weight"].dtype == np.float64


_REFUSED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("an unknown architecture", lambda f: change(f, architecture="resnet19"), "knows no architecture 'resnet19'"),
    ("one on the Hub", lambda f: change(f, architecture="hf-hub:timm/resnet18"), "knows no architecture 'hf-hub:timm"),
    ("no name", lambda f: change(f, architecture=["resnet18"]), r"knows no architecture \['resnet18'\]"),
    ("fetching", lambda f: change(f, model_args={"pretrained": True}), "'pretrained' reads weights from elsewhere"),
    ("a path", lambda f: change(f, model_args={"checkpoint_path": "x.bin"}), "'checkpoint_path' reads weights from"),
    ("nonsense", lambda f: change(f, model_args={"depth": 3}), r"cannot be built from config.json \(TypeError"),
    ("other arguments", lambda f: change(f, model_args=["depth"]), "model_args: expected an object"),
    ("no size", lambda f: change(f, pretrained_cfg={}), "states no input size"),
    ("a bad size", lambda f: change(f, pretrained_cfg={"input_size": [3, -1, 4]}), "states no input size"),
    (
        "another size",
        lambda f: edit(f, lambda t: t.update({"fc.bias": torch.ones(4)})),
        r"'fc.bias' has shape \(4,\), ",
    ),
    ("too much", lambda f: edit(f, lambda t: t.update(x=torch.ones(2))), "tensor 'x' is stored, but ResNet has none"),
    ("too little", lambda f: edit(f, lambda t: t.pop("fc.bias")), "tensor 'fc.bias' of ResNet is not in the weights"),
    ("NaN", lambda f: edit(f, lambda t: t["fc.bias"].fill_(torch.nan)), "tensor 'fc.bias' contains NaN"),
]


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in _REFUSED], ids=[row[0] for row in _REFUSED])
def test_refused(of_timm: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(of_timm)
    before = sorted(path.name for path in of_timm.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        write_certificate(of_timm)
    assert isinstance(caught.value, UserError | KernelError) and "\n" not in str(caught.value)
    assert sorted(path.name for path in of_timm.iterdir()) == before


def test_counters_may_be_missing(of_timm: Path) -> None:
    edit(of_timm, lambda t: [t.pop(name) for name in list(t) if name.endswith("num_batches_tracked")])
    assert certify(of_timm, _EXAMPLE).bound.value > 0.0
