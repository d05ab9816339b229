"""Any one flipped bit of the certificate, the configuration or the weights is found, and the file is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
from hf_lipschitz.bounds.check import _check_digests, check_folder
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.weights import SINGLE, read_weights
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTModel
from tests.attacks.forging import CONFIG, copied, flip, honest_folder
from tests.models.cases import tiny


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The body of a LipViT without blocks: a few hundred weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("smallest") / "folder"
    config = tiny(image_size=4, num_channels=1, stages=[{"depth": 0, "width": 4}], neck_depth=0)
    LipViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return honest_folder(tmp_path_factory.mktemp("honest") / "folder")


def _bits(path: Path) -> range:
    return range(8 * path.stat().st_size)


def _every_flip_of_a_file_is_found(folder: Path, name: str, bits: Iterable[int]) -> None:
    path = folder / name
    data = path.read_bytes()
    for bit in bits:
        flip(path, bit)
        report = check_folder(folder, BUILT_IN)
        assert report.claims["bound"] == "failed", f"{name}: bit {bit}"
        assert name in report.reasons[0], report.reasons
        path.write_bytes(data)
    assert check_folder(folder, BUILT_IN).claims["bound"] == "ok"


def _every_flip_of_a_certificate_is_found(folder: Path, bits: Iterable[int]) -> None:
    """Reading alone refuses it: form and digest come before any bound."""
    data = (folder / FILE_NAME).read_bytes()
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KernelError, match=FILE_NAME):
            Certificate.from_bytes(bytes(flipped))
    Certificate.from_bytes(data)


def _every_flip_of_the_config_is_found(folder: Path, bits: Iterable[int]) -> None:
    """The kernel does not parse it: its digest is all that counts."""
    certificate, weights = Certificate.from_bytes((folder / FILE_NAME).read_bytes()), read_weights(folder)
    path, data = folder / CONFIG, (folder / CONFIG).read_bytes()
    for bit in bits:
        flip(path, bit)
        with pytest.raises(KernelError, match=r"config\.json: its SHA-256 is not the certificate's"):
            _check_digests(folder, certificate, weights)
        path.write_bytes(data)
    _check_digests(folder, certificate, weights)


def test_certificate(honest: Path) -> None:
    _every_flip_of_a_certificate_is_found(honest, _bits(honest / FILE_NAME)[::61])


def test_config(honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "folder")
    _every_flip_of_a_file_is_found(folder, CONFIG, _bits(folder / CONFIG)[::53])


def test_weights(honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "folder")
    header = 8 * (8 + int.from_bytes((folder / SINGLE).read_bytes()[:8], "little"))
    _every_flip_of_a_file_is_found(folder, SINGLE, range(64))
    _every_flip_of_a_file_is_found(folder, SINGLE, range(64, header, 53))
    _every_flip_of_a_file_is_found(folder, SINGLE, _bits(folder / SINGLE)[header::97])


@pytest.mark.slow_ci
@pytest.mark.parametrize("name", [FILE_NAME, CONFIG, SINGLE])
def test_all_bits(smallest: Path, tmp_path: Path, name: str) -> None:
    folder = copied(smallest, tmp_path / "folder")
    if name == FILE_NAME:
        _every_flip_of_a_certificate_is_found(folder, _bits(folder / name))
    elif name == SINGLE:
        _every_flip_of_a_file_is_found(folder, name, _bits(folder / name))
    else:
        _every_flip_of_the_config_is_found(folder, _bits(folder / name))


@pytest.mark.parametrize("name", [FILE_NAME, CONFIG, SINGLE])
def test_the_command_says_so_with_its_exit_status(honest: Path, tmp_path: Path, name: str) -> None:
    folder = copied(honest, tmp_path / "folder")
    flip(folder / name, 8 * ((folder / name).stat().st_size // 2))
    command = [sys.executable, "-m", "hf_lipschitz.cli.main", "verify", str(folder), "--require", "bound"]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert run.returncode == 1, run.stdout + run.stderr
    assert name in run.stdout + run.stderr
