"""certify: a certificate of the tensors as stored, or one sentence why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_lipschitz
from hf_lipschitz import certify
from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
from hf_lipschitz.bounds.check import SLACK
from hf_lipschitz.bounds.engine import bound_program
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.weights import SINGLE, read_weights
from hf_lipschitz.certify import model_class, program_of_folder, state_arrays, write_certificate
from hf_lipschitz.errors import UserError
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification, LipViTModel
from hf_lipschitz.verification import verify
from tests.models.cases import filled, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    filled(tiny(token_mixer="hybrid")).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder(folder: Path) -> None:
    certificate = certify(folder)
    assert certificate.to_bytes() == (folder / FILE_NAME).read_bytes() == certify(str(folder)).to_bytes()
    assert set(certificate.files) == {"config.json", SINGLE}
    assert certificate.versions["hf_lipschitz"] == hf_lipschitz.__version__
    assert {"numpy", "python", "torch", "transformers"} <= set(certificate.versions)
    assert (certificate.bound.norm, certificate.bound.origin, certificate.bound.to) == ("l2", "pixels[0,1]", "logits")
    assert certificate.bound_features.to == "features" and set(certificate.rounding) == {"float32", "float64"}
    assert certificate.program == program_of_folder(folder)
    assert Certificate.from_bytes(certificate.to_bytes()) == certificate


def test_a_model_in_memory() -> None:
    model = filled(tiny())
    certificate = certify(model)
    assert certificate.files == {}
    derived = bound_program(model.bound_program(), state_arrays(model), BUILT_IN).outputs["logits"].lipschitz
    assert derived < certificate.bound.value <= derived * SLACK * (1.0 + 1e-15)
    assert certify(model.lip_vit).bound.value == pytest.approx(certificate.bound_features.value, rel=1e-12)


def test_the_stated_slack_makes_no_number_smaller(folder: Path) -> None:
    stated, weights = certify(folder), read_weights(folder)
    derived = bound_program(stated.program, weights, BUILT_IN)
    assert stated.bound.value > derived.outputs["logits"].lipschitz
    assert stated.bound_features.value > derived.outputs["features"].lipschitz
    assert stated.matrices.items() >= derived.norms.bounds.items()


def test_bfloat16_is_widened_exactly() -> None:
    model = filled(tiny()).to(torch.bfloat16)
    arrays = state_arrays(model)
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert certify(model).bound.value == certify(model.float()).bound.value


def test_the_other_norm(folder: Path) -> None:
    certificate = write_certificate(folder, norm="token_max")
    assert certificate.bound.norm == certificate.bound_features.norm == "token_max"
    assert certificate.rounding == {}
    verdict = verify(folder)
    assert verdict.ok and verdict.claims == {"bound": "ok", "program": "ok", "rounding": "not_checked"}
    with pytest.raises(KernelError, match="unknown geometry 'linf'"):
        certify(folder, norm="linf")  # type: ignore[arg-type]


def test_writing_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_certificate(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    _edit(folder, lambda tensors: tensors["classifier.bias"].fill_(float("nan")))
    with pytest.raises(KernelError, match=r"normalized_linear@1\): tensor 'classifier.bias' contains NaN"):
        write_certificate(folder)
    assert {path.name for path in folder.iterdir()} == set(before)
    assert (folder / FILE_NAME).read_bytes() == before[FILE_NAME]


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


_REFUSED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no weights", lambda f: (f / SINGLE).unlink(), "no model.safetensors and no .*: save the model as safetensors"),
    ("a pickle only", lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), "save the model as safetensors"),
    ("no config", lambda f: (f / "config.json").unlink(), "config.json: missing"),
    ("truncated", lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-4]), "truncated"),
    (
        "an extra tensor",
        lambda f: _edit(f, lambda t: t.update(x=torch.ones(2))),
        "tensor 'x' is stored but not covered",
    ),
    ("a missing tensor", lambda f: _edit(f, lambda t: t.pop("classifier.bias")), "'classifier.bias' .* but missing"),
    (
        "infinite weights",
        lambda f: _edit(f, lambda t: t["classifier.weight"].fill_(torch.inf)),
        "'classifier.weight' con",
    ),
    ("no architecture", lambda f: _config(f, architectures=None), r"'architectures' is \[\]; expected exactly one"),
    ("two architectures", lambda f: _config(f, architectures=["A", "B"]), r"'architectures' is \['A', 'B'\]"),
    ("an unknown class", lambda f: _config(f, architectures=["ViTModel"]), "no registered class is named 'ViTModel'"),
    ("another class", lambda f: _config(f, model_type="vit"), "no registered class is named 'LipViTForImageClass"),
    (
        "a class without program",
        lambda f: _config(f, model_type="vit", architectures=["ViTForImageClassification"]),
        "scaled_dot_product_attention cannot be certified",
    ),
    ("zero weights", lambda f: _edit(f, lambda t: [v.zero_() for v in t.values()]), "the bound is zero or infinite"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in _REFUSED], ids=[row[0] for row in _REFUSED])
def test_refused(folder: Path, change: Callable[[Path], Any], message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        certify(folder)
    assert isinstance(caught.value, UserError | KernelError)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder: give the path of a saved checkpoint"):
        certify(tmp_path / "nowhere")


def test_classes_are_found_by_their_exact_name(folder: Path) -> None:
    config = tiny()
    for kind in (LipViTModel, LipViTForImageClassification):
        config.architectures = [kind.__name__]
        assert model_class(config) is kind
    config.architectures = ["lipvitmodel"]
    with pytest.raises(UserError, match="no registered class"):
        model_class(config)
