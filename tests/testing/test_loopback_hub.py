"""The loopback Hub through the unmodified client: one row an operation, and what it must refuse."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, errors

from hf_lipschitz.testing.loopback_hub import LoopbackHub
from tests.fixtures_hub import CARD, api, loopback_hub  # noqa: F401
from tests.testing.cases import OPERATIONS, REPO, WEIGHTS, commit, head, read


@pytest.fixture
def filled(api: HfApi) -> HfApi:
    """A repository with a card, a configuration in a subfolder, and weights."""
    api.create_repo(REPO)
    operations = [
        CommitOperationAdd("README.md", CARD.encode()),
        CommitOperationAdd("sub/config.json", b'{"a": 1}'),
        CommitOperationAdd("model.safetensors", WEIGHTS),
    ]
    api.create_commit(REPO, operations, commit_message="first")
    return api


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_client(operation: Callable[[HfApi, Path], None], filled: HfApi, tmp_path: Path) -> None:
    operation(filled, tmp_path)


MISSING = [
    (lambda client: client.model_info("someone/none"), errors.RepositoryNotFoundError),
    (lambda client: client.model_info(REPO, revision="none"), errors.RevisionNotFoundError),
    (lambda client: client.model_info(REPO, revision="0" * 40), errors.RevisionNotFoundError),
    (lambda client: client.hf_hub_download(REPO, "none.json"), errors.EntryNotFoundError),
    (lambda client: client.hf_hub_download(REPO, "x", revision="none"), errors.RevisionNotFoundError),
    (lambda client: commit(client, "x", b"x", revision="none"), errors.RevisionNotFoundError),
]


@pytest.mark.parametrize(("ask", "error"), MISSING)
def test_missing_things_have_the_hubs_error(
    ask: Callable[[HfApi], object], error: type[Exception], filled: HfApi
) -> None:
    with pytest.raises(error):
        ask(filled)


@pytest.mark.parametrize("token", [False, "hf_wrong"], ids=["no token", "wrong token"])
def test_writes_need_the_token(token: str | bool, filled: HfApi) -> None:
    stranger = HfApi(endpoint=filled.endpoint, token=token)
    before = head(filled)
    for write in (
        lambda: stranger.create_repo("someone/else"),
        lambda: commit(stranger, "x", b"x"),
        lambda: stranger.create_branch(REPO, branch="b"),
        lambda: stranger.delete_repo(REPO),
    ):
        with pytest.raises(errors.HfHubHTTPError, match="401"):
            write()
    assert head(filled) == before and {b.name for b in filled.list_repo_refs(REPO).branches} == {"main"}


def test_private_repositories_are_invisible_without_token(api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    stranger = HfApi(endpoint=api.endpoint, token=False)
    with pytest.raises(errors.RepositoryNotFoundError):
        stranger.model_info(REPO)
    with pytest.raises(errors.RepositoryNotFoundError):
        stranger.hf_hub_download(REPO, ".gitattributes", cache_dir=tmp_path)
    assert api.model_info(REPO).private is True


def lfs_batch(hub: LoopbackHub, sha256: str, size: int) -> str:
    """The upload address that the server gives for an announced file."""
    body = json.dumps({"operation": "upload", "objects": [{"oid": sha256, "size": size}]}).encode()
    address = f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch"
    request = urllib.request.Request(address, body, {"Authorization": f"Bearer {hub.token}"}, method="POST")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["objects"][0]["actions"]["upload"]["href"]


BAD_BODIES = [
    ("flipped bit", lambda body: bytes([body[0] ^ 1]) + body[1:]),
    ("truncated", lambda body: body[:-1]),
    ("too long", lambda body: body + b"\0"),
    ("empty", lambda body: b""),
]


@pytest.mark.parametrize(("name", "damage"), BAD_BODIES, ids=[name for name, _ in BAD_BODIES])
def test_a_damaged_upload_is_refused(
    name: str,
    damage: Callable[[bytes], bytes],
    loopback_hub: LoopbackHub,
    filled: HfApi,
) -> None:
    body = b"weights" * 1000
    sha256 = hashlib.sha256(body).hexdigest()
    address = lfs_batch(loopback_hub, sha256, len(body))

    def put(content: bytes, to: str = address) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(to, content, method="PUT")) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert put(damage(body)) == 400
    stored = loopback_hub.root / "hub" / "models" / REPO / "objects" / "lfs"
    assert not (stored / sha256).exists() and not list(stored.glob(".partial-*"))
    assert put(body, address.replace("signature=", "signature=0")) == 403
    assert put(body) == 200 and (stored / sha256).read_bytes() == body


def test_an_upload_announced_with_another_size_is_refused(loopback_hub: LoopbackHub, filled: HfApi) -> None:
    body = b"weights" * 1000
    address = lfs_batch(loopback_hub, hashlib.sha256(body).hexdigest(), len(body) + 1)
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(urllib.request.Request(address, body, method="PUT"))
    caught.value.close()


def test_commits_at_the_same_time_are_all_kept(filled: HfApi) -> None:
    with ThreadPoolExecutor(max_workers=8) as threads:
        made = set(threads.map(lambda number: commit(filled, f"{number}.txt", b"%d" % number), range(8)))
    assert made < {entry.commit_id for entry in filled.list_repo_commits(REPO)}
    assert {f"{number}.txt" for number in range(8)} < set(filled.list_repo_files(REPO))


def test_a_commit_of_weights_that_were_never_uploaded_is_refused(filled: HfApi) -> None:
    operation = CommitOperationAdd("other.safetensors", b"never sent")
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(errors.BadRequestError, match="never uploaded"):
        filled.create_commit(REPO, [operation], commit_message="lie")


MALFORMED = [
    ("POST", f"/api/models/{REPO}/commit/main", b"not json"),
    ("POST", f"/api/models/{REPO}/commit/main", b'{"key": "file"}'),
    ("POST", f"/api/models/{REPO}/preupload/main", b"[]"),
    ("POST", "/api/repos/create", b'{"name": "../../escape"}'),
    ("POST", "/api/repos/create", b'{"name": "a", "organization": ".."}'),
    (
        "POST",
        f"/api/models/{REPO}/commit/main",
        b'{"key":"header","value":{"summary":"s"}}\n{"key":"file","value":{"path":"../x","content":"","encoding":"base64"}}',
    ),
]


@pytest.mark.parametrize(("method", "path", "body"), MALFORMED)
def test_a_malformed_request_is_answered_with_400(
    method: str,
    path: str,
    body: bytes,
    loopback_hub: LoopbackHub,
    filled: HfApi,
) -> None:
    request = urllib.request.Request(
        loopback_hub.endpoint + path, body, {"Authorization": f"Bearer {loopback_hub.token}"}, method=method
    )
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request)
    caught.value.close()


def test_ranges(loopback_hub: LoopbackHub, filled: HfApi) -> None:
    request = urllib.request.Request(
        f"{loopback_hub.endpoint}/{REPO}/resolve/main/model.safetensors", headers={"Range": "bytes=8-15"}
    )
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read()) == (206, WEIGHTS[8:16])
        assert answer.headers["Content-Range"] == f"bytes 8-15/{len(WEIGHTS)}"


def test_what_is_stored_outlives_the_server(tmp_path: Path, filled: HfApi, loopback_hub: LoopbackHub) -> None:
    before = head(filled)
    with LoopbackHub(loopback_hub.root) as second:
        client = HfApi(endpoint=second.endpoint, token=second.token)
        assert head(client) == before and read(client, "model.safetensors", "main", tmp_path) == WEIGHTS


def test_listens_on_this_machine_only(loopback_hub: LoopbackHub) -> None:
    assert loopback_hub.endpoint.startswith("http://127.0.0.1:")
    with pytest.raises(RuntimeError, match="with"):
        LoopbackHub(loopback_hub.root).endpoint  # noqa: B018


CHILD = """
import huggingface_hub as hub
hub.create_repo("someone/child")
hub.upload_file(path_or_fileobj=b"w" * 100, path_in_repo="w.safetensors", repo_id="someone/child", commit_message="x")
path = hub.hf_hub_download("someone/child", "w.safetensors")
print(path)
"""


def test_the_environment_serves_a_child_process(loopback_hub: LoopbackHub) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **loopback_hub.environment()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(loopback_hub.root / "hf_home")
    paths = [path for _, path in loopback_hub.requests]
    assert not any("xet" in path for path in paths)
    assert ("POST", "/api/repos/create") in loopback_hub.requests


def test_by_hand(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_lipschitz.testing.loopback_hub", "--root", str(tmp_path / "a root")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines = [server.stdout.readline().strip() for _ in range(3)]
            values = dict(line.removeprefix("export ").split("=", 1) for line in lines)
            client = HfApi(endpoint=values["HF_ENDPOINT"], token=values["HF_TOKEN"])
            address = f"{client.endpoint}/api/whoami-v2"
            request = urllib.request.Request(address, headers={"Authorization": f"Bearer {client.token}"})
            with urllib.request.urlopen(request) as answer:
                assert answer.status == 200
        finally:
            server.terminate()
