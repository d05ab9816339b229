"""`push`: verified before and after, in one commit, to the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_lipschitz.testing.loopback_hub import LoopbackHub
from tests.cli.conftest import Call, flip_a_bit
from tests.fixtures_hub import api, loopback_hub

__all__ = ["api", "loopback_hub"]  # fixtures
REPO = "someone/digits"


@pytest.fixture
def token(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)


@pytest.mark.usefixtures("token")
def test_it_arrives_and_verifies(call: Call, folder: Path, loopback_hub: LoopbackHub, api: HfApi) -> None:
    ran = call("push", folder, REPO, "--endpoint", loopback_hub.endpoint, "--json")
    assert ran.status == 0, ran.err
    value = ran.value
    assert set(value) == {"ok", "repo", "commit", "url", "verification"}
    assert (value["ok"], value["repo"]) == (True, REPO)
    assert value["commit"] == api.model_info(REPO).sha == value["verification"]["commit"]
    assert value["verification"]["claims"] == dict.fromkeys(("bound", "program", "rounding"), "ok")

    reference = f"{REPO}@{value['commit']}"
    verified = call("verify", reference, "--endpoint", loopback_hub.endpoint)
    assert verified.status == 0 and f"at commit {value['commit']}" in verified.out

    again = call("push", folder, REPO, "--endpoint", loopback_hub.endpoint)
    assert again.status == 0 and f"verify: hf-lipschitz verify {REPO}@" in again.out


@pytest.mark.usefixtures("token")
def test_a_spoilt_folder_is_not_pushed(call: Call, folder: Path, loopback_hub: LoopbackHub) -> None:
    flip_a_bit(folder / "model.safetensors", -1)
    ran = call("push", folder, REPO, "--endpoint", loopback_hub.endpoint, "--json")
    assert ran.status == 1
    assert "does not verify" in ran.complaint
    assert ran.value["ok"] is False
    assert loopback_hub.requests == []


@pytest.mark.usefixtures("token")
def test_what_was_spoilt_on_the_way_is_noticed(call: Call, folder: Path, loopback_hub: LoopbackHub, api: HfApi) -> None:
    assert call("push", folder, REPO, "--endpoint", loopback_hub.endpoint).status == 0
    spoilt = (folder / "config.json").read_bytes().replace(b'"2"', b'"3"')
    api.upload_file(path_or_fileobj=spoilt, path_in_repo="config.json", repo_id=REPO)
    ran = call("verify", REPO, "--endpoint", loopback_hub.endpoint, "--json")
    assert ran.status == 1
    assert ran.value["commit"] == api.model_info(REPO).sha


def test_no_token(call: Call, folder: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    ran = call("push", folder, REPO, "--endpoint", loopback_hub.endpoint)
    assert ran.status == 2
    assert "no access token" in ran.err.splitlines()[-1]


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    ("repo", "options", "says"),
    [
        ("not a name", [], "org/name"),
        (REPO, ["--revision", "no-such-branch"], "no-such-branch"),
        (REPO, ["--endpoint", "http://127.0.0.1:9"], "cannot be reached"),
    ],
)
def test_mistakes(
    call: Call, folder: Path, loopback_hub: LoopbackHub, repo: str, options: list[str], says: str
) -> None:
    ran = call("push", folder, repo, "--endpoint", loopback_hub.endpoint, *options)
    assert ran.status == 2
    assert says in ran.err.splitlines()[-1] and "Traceback" not in ran.err
