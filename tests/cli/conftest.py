"""A small certified checkpoint, and the command line called in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lipschitz.cli.main import run
from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.training.run import save_processor


@dataclass(frozen=True)
class Ran:
    """What one call of the command line left."""

    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """Stdout as JSON: fails where anything else is on it."""
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line on stderr; there must be no other and no traceback."""
        (line,) = self.err.splitlines()
        assert line.startswith("hf-lipschitz: ")
        return line


Call = Callable[..., Ran]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """`call("verify", folder, "--json")`; transformers says as much afterwards as before."""
    from transformers.utils import logging

    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small a second thread only waits

    def call_it(*arguments: object) -> Ran:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    yield call_it
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained classifier of 8 x 8 digits, saved with its certificate. Not to be written to."""
    torch.manual_seed(0)
    config = LipViTConfig(
        image_size=8, num_channels=1, patch_size=4, hidden_size=16, num_hidden_layers=1, num_labels=10
    )
    folder = tmp_path_factory.mktemp("made") / "digits"
    LipViTForImageClassification(config).eval().save_pretrained(folder)
    save_processor(folder, config)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for one test."""
    return Path(shutil.copytree(made, tmp_path / "digits"))


def flip_a_bit(path: Path, position: int) -> None:
    """Flip the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
