"""`certify`: writes the certificate of the stored weights, or says why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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
    assert set(value) == {"certificate", "bound", "bound_features", "rounding_dtypes", "matrices", "files"}
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
