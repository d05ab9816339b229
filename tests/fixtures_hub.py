"""The loopback Hub as a fixture, and a folder that looks like a checkpoint without costing a model.

Import what a test module uses (`from tests.fixtures_hub import loopback_hub, api`), or name this module in
`pytest_plugins` of the top conftest.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import HfApi
from safetensors.numpy import save_file

from hf_lipschitz.hub import FetchedFolder, fetch
from hf_lipschitz.testing.loopback_hub import LoopbackHub

REPO = "someone/model"
MakeCheckpoint = Callable[..., Path]
Fetch = Callable[..., FetchedFolder]
CARD = "---\ntags:\n- lipschitz\npipeline_tag: image-classification\n---\n\n# A model\n"
_UPLOAD_WARNING = "Use 'content=<...>' to upload raw bytes"


@pytest.fixture
def loopback_hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoopbackHub]:
    """A Hub of this test's own, usable in this process by `endpoint=` and `token=`, and by `environment()` in others.

    Tests run offline; what is undone here is that, for this test and for the client alone (the network stays shut).
    """
    # The client's own way of uploading large files warns; pytest has other filters while it sets up and while it calls.
    warnings.filterwarnings("ignore", _UPLOAD_WARNING, DeprecationWarning)
    request.node.add_marker(pytest.mark.filterwarnings(f"ignore:{_UPLOAD_WARNING}:DeprecationWarning"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with LoopbackHub(tmp_path / "loopback") as hub:
        yield hub
    # The client keeps one connection pool for the whole process: close it, so that no socket outlives its server.
    huggingface_hub.close_session()


@pytest.fixture
def api(loopback_hub: LoopbackHub) -> HfApi:
    """The unmodified client, logged in to the loopback Hub."""
    return HfApi(endpoint=loopback_hub.endpoint, token=loopback_hub.token)


def certify_anew(folder: Path) -> None:
    """Write a stand-in certificate: right digests of the files that are there, and no claim."""
    names = [path.name for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)}
    certificate = {"format": "hf-lipschitz-certificate", "version": 1, "digests": {"files": digests}}
    (folder / "lipschitz_certificate.json").write_text(json.dumps(certificate), encoding="utf-8")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """A function that makes a checkpoint folder: `make_checkpoint(name, seed=, shards=)`."""

    def make(name: str = "checkpoint", *, seed: int = 0, shards: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "lip_vit"}', encoding="utf-8")
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        rng = np.random.default_rng(seed)
        tensors = {f"w{i}": rng.standard_normal((4, 4), dtype=np.float32) for i in range(shards)}
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
        else:
            files = {key: f"model-{i + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(tensors)}
            for key, file in files.items():
                save_file({key: tensors[key]}, folder / file)
            index = {"metadata": {}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        certify_anew(folder)
        return folder

    return make


@pytest.fixture
def login(loopback_hub: LoopbackHub) -> dict[str, str]:
    """Where and as whom `push` goes."""
    return {"endpoint": loopback_hub.endpoint, "token": loopback_hub.token}


@pytest.fixture
def fetched(login: dict[str, str], tmp_path: Path) -> Fetch:
    """`fetch` with this test's Hub and cache."""
    return lambda reference=REPO, **options: fetch(reference, cache_dir=tmp_path / "cache", **{**login, **options})


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message
