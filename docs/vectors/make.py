"""Make the test vectors: one folder that verifies, and folders that must not, each with the claim that fails.

``python docs/vectors/make.py`` replaces the folders beside it and ``expected.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

from hf_lipschitz import LipViTConfig, LipViTForImageClassification, verify
from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.certificate import FILE_NAME

HERE = Path(__file__).parent
WEIGHTS = "model.safetensors"


def good(folder: Path, seed: int = 0) -> None:
    """A tiny LipViT with every kind of mixer that a hybrid has."""
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "num_channels": 1, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2}
    config = LipViTConfig(**sizes, token_mixer="hybrid", num_attention_heads=2, num_labels=3)
    model = LipViTForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter), alpha=1.0 if "mixer" not in name else 0.5)
    model.save_pretrained(folder)


def rewritten(change: Callable[[dict[str, Any]], None], *, digests: bool = False) -> Callable[[Path], None]:
    """A lie told consistently: the certificate changed, its digests made to fit."""

    def apply(folder: Path) -> None:
        certificate = json.loads((folder / FILE_NAME).read_text())
        change(certificate)
        if digests:
            certificate["digests"]["files"][WEIGHTS] = strict_json.sha256((folder / WEIGHTS).read_bytes())
        del certificate["content_digest"]
        certificate["content_digest"] = strict_json.sha256(strict_json.canonical(certificate))
        (folder / FILE_NAME).write_bytes(strict_json.canonical(certificate))

    return apply


def _lower(key: str) -> Callable[[dict[str, Any]], None]:
    def change(certificate: dict[str, Any]) -> None:
        from hf_lipschitz.bounds.certificate import Bound

        old = certificate[key]
        bound = Bound(float.fromhex(old["value"]) * 0.9, old["norm"], old["from"], old["to"])
        certificate[key] = bound.to_json()

    return change


def _lower_rounding(certificate: dict[str, Any]) -> None:
    entry = certificate["rounding"]["float32"]
    entry["features_error"] = (float.fromhex(entry["features_error"]) / 2).hex()


def _delete_activation(certificate: dict[str, Any]) -> None:
    program = certificate["program"]
    index = next(i for i, node in enumerate(program["nodes"]) if node["op"] == "maxmin@1")
    (before,) = program["nodes"].pop(index)["inputs"]

    def moved(i: int) -> int:
        return before if i == index else i - (i > index)

    for node in program["nodes"]:
        node["inputs"] = [moved(i) for i in node["inputs"]]
    program["outputs"] = {name: moved(i) for name, i in program["outputs"].items()}


def _replace_activation(certificate: dict[str, Any]) -> None:
    node = next(node for node in certificate["program"]["nodes"] if node["op"] == "maxmin@1")
    node.update(op="abs@1", attrs={"channels": 8})


def _swap_tensors(certificate: dict[str, Any]) -> None:
    nodes = [node for node in certificate["program"]["nodes"] if node["op"] == "linear@1" and "bias" in node["tensors"]]
    first, second = (node for node in nodes if "channel" in node["tensors"]["weight"])
    first["tensors"], second["tensors"] = second["tensors"], first["tensors"]


def _edit_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = dict(load_file(folder / WEIGHTS))
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        rewritten(lambda certificate: None, digests=True)(folder)

    return apply


def _double(tensors: dict[str, Any]) -> None:
    name = next(name for name in sorted(tensors) if name.endswith("channel.linear.weight"))
    tensors[name] = tensors[name] * 2


def _flip(file: str, byte: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[byte] ^= 1
        (folder / file).write_bytes(bytes(data))

    return apply


def _duplicate_key(folder: Path) -> None:
    text = (folder / FILE_NAME).read_text()
    (folder / FILE_NAME).write_text(text.replace('  "format":', '  "format": "x",\n  "format":', 1))


def _spelled_otherwise(folder: Path) -> None:
    (folder / FILE_NAME).write_text(json.dumps(json.loads((folder / FILE_NAME).read_text()), sort_keys=True))


BAD: dict[str, Callable[[Path], None]] = {
    "bit-flipped-in-weights": _flip(WEIGHTS, -3),
    "bit-flipped-in-config": _flip("config.json", 40),
    "bit-flipped-in-certificate": _flip(FILE_NAME, 900),
    "weights-truncated": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]),
    "weights-of-another-run": lambda folder: good_weights_from(1, folder),
    "weights-doubled": _edit_weights(_double),
    "weights-with-nan": _edit_weights(lambda tensors: tensors["classifier.bias"].fill(float("nan"))),
    "weights-with-another-tensor": _edit_weights(lambda t: t.update(extra=t["classifier.bias"])),
    "bound-lowered": rewritten(_lower("bound")),
    "features-bound-lowered": rewritten(_lower("bound_features")),
    "rounding-lowered": rewritten(_lower_rounding),
    "node-deleted": rewritten(_delete_activation),
    "activation-replaced": rewritten(_replace_activation),
    "tensors-swapped": rewritten(_swap_tensors),
    "key-duplicated": _duplicate_key,
    "not-canonical": _spelled_otherwise,
    "certificate-missing": lambda folder: (folder / FILE_NAME).unlink(),
}


def good_weights_from(seed: int, folder: Path) -> None:
    """Put the weights of another run into a folder."""
    other = folder.with_name("other")
    good(other, seed)
    shutil.copyfile(other / WEIGHTS, folder / WEIGHTS)
    shutil.rmtree(other)


def main() -> None:
    """Write all folders and what verifying each must say."""
    for old in HERE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    good(HERE / "good")
    for name, spoil in BAD.items():
        shutil.copytree(HERE / "good", HERE / name)
        spoil(HERE / name)
    expected = {name: verify(HERE / name).claims for name in ("good", *BAD)}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    print(json.dumps(expected, indent=2))


if __name__ == "__main__":
    main()
