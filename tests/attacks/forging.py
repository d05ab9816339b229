"""What an attacker can do: any bytes in any file, all digests made right again."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.certificate import FILE_NAME, Bound, Certificate
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.weights import SINGLE, read_weights
from hf_lipschitz.certify import make_certificate
from hf_lipschitz.models.lip_vit.image_processing_lip_vit import LipViTImageProcessor
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from tests.models.cases import tiny

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
Attack = Callable[[Path], Any]


def honest_folder(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A checkpoint that verifies: orthogonal weights, random biases, an image processor."""
    torch.manual_seed(seed)
    model = LipViTForImageClassification(tiny(num_channels=3, token_mixer="hybrid", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    LipViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def certificate_of(folder: Path) -> Certificate:
    return Certificate.from_bytes((folder / FILE_NAME).read_bytes())


def state(folder: Path, **changes: Any) -> None:
    """Write the certificate with some of its fields changed."""
    certificate = dataclasses.replace(certificate_of(folder), **changes)
    (folder / FILE_NAME).write_bytes(certificate.to_bytes())


def rewrite(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the certificate's JSON in place, then make its digest and its canonical form right."""
    content = json.loads((folder / FILE_NAME).read_bytes())
    change(content)
    (folder / FILE_NAME).write_bytes(sealed(content))


def sealed(content: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a certificate's JSON with the right content digest."""
    rest = {key: value for key, value in content.items() if key != "content_digest"}
    return strict_json.canonical({**rest, "content_digest": strict_json.sha256(strict_json.canonical(rest))})


def rehash(folder: Path) -> None:
    """Make the certificate's digests those of the files that lie there."""
    files = {name: strict_json.sha256((folder / name).read_bytes()) for name in certificate_of(folder).files}
    state(folder, files=files)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file (None removes one)."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    path.write_text(json.dumps(content, indent=2))


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json and make the digests right."""
    edit_json(folder / CONFIG, **changes)
    rehash(folder)


def edit_weights(folder: Path, change: Callable[[dict[str, Array]], Any]) -> None:
    """Change the stored tensors and make the digests right."""
    tensors = {name: np.array(value) for name, value in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file({name: np.array(value, order="C") for name, value in tensors.items()}, folder / SINGLE)
    rehash(folder)


def forge_program(folder: Path, change: Callable[[list[Node]], list[Node]], outputs: Any = None) -> None:
    """Certify another program with the same weights: bounds, rounding and norms are all right, for that program."""
    old = certificate_of(folder)
    program = Program(tuple(change(list(copy.deepcopy(old.program.nodes)))), outputs or old.program.outputs).canonical()
    forged = make_certificate(program, read_weights(folder), old.files)
    (folder / FILE_NAME).write_bytes(dataclasses.replace(forged, versions=old.versions).to_bytes())


def scaled(bound: Bound, factor: float) -> Bound:
    return dataclasses.replace(bound, value=bound.value * factor)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


# Attacks as values: what a table of them is made of


def digests(attack: Callable[[dict[str, str]], Any]) -> Attack:
    return lambda folder: rewrite(folder, lambda content: attack(content["digests"]["files"]))


def written(name: str, data: bytes = b"") -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return attack


def linked(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return attack


def cut(name: str, count: int = 1) -> Attack:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def retyped(change: Callable[[str], str]) -> Attack:
    return lambda folder: (folder / FILE_NAME).write_text(change((folder / FILE_NAME).read_text()))


def restated(change: Callable[[Any], Any]) -> Attack:
    return lambda folder: rewrite(folder, change)


def configured(**changes: Any) -> Attack:
    return lambda folder: edit_config(folder, **changes)


def reweighted(change: Callable[[dict[str, Any]], Any]) -> Attack:
    return lambda folder: edit_weights(folder, change)


def processed(**changes: Any) -> Attack:
    return lambda folder: edit_json(folder / PROCESSOR, **changes)
