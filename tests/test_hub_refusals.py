"""What `push`, `fetch` and references refuse: one row each, and always one sentence."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from hf_lipschitz.checkpoint_folder import CheckpointError, checkpoint_files
from hf_lipschitz.errors import UserError
from hf_lipschitz.hub import HubError, HubReference, LocalFolder, parse_reference, push
from hf_lipschitz.testing.loopback_hub import LoopbackHub
from tests.fixtures_hub import (  # noqa: F401
    REPO,
    Fetch,
    MakeCheckpoint,
    api,
    certify_anew,
    fetched,
    login,
    loopback_hub,
    make_checkpoint,
    one_sentence,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubReference("org/name")),
        ("org/name@main", HubReference("org/name", "main")),
        ("org/na-me_1.5@refs/pr/1", HubReference("org/na-me_1.5", "refs/pr/1")),
        (".", LocalFolder(Path("."))),
        ("./here/model", LocalFolder(Path("here/model"))),
        ("here/model", LocalFolder(Path("here/model"))),  # what exists is a folder, even if it looks like a repository
    ],
)
def test_parse_reference(text: str, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_reference(text) == expected
    assert parse_reference(str(tmp_path / "here")) == LocalFolder(tmp_path / "here")


@pytest.mark.parametrize(
    "text", ["", "name", "a/b/c", "org/name@", "@main", "./none", "/none/such", "~/none-such", "file"]
)
def test_parse_reference_refuses(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        parse_reference(text)
    one_sentence(error)


# Refusals: (name, what is done to a good folder, a word of the sentence)


def _add(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"x")


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


def _digests(**digests: str) -> Callable[[Path], object]:
    body = json.dumps({"digests": {"files": {name.replace("__", "."): digest for name, digest in digests.items()}}})
    return lambda folder: (folder / "lipschitz_certificate.json").write_text(body, encoding="utf-8")


REFUSED = [
    ("no config", _remove("config.json"), "There is no config.json"),
    ("no certificate", _remove("lipschitz_certificate.json"), "There is no lipschitz_certificate.json"),
    ("no weights", _remove("model.safetensors"), "There is no model.safetensors"),
    ("other weights", lambda f: (f / "model.safetensors").write_bytes(b"other"), "is not the file that was certified"),
    ("other config", lambda f: (f / "config.json").write_text("{}"), "'config.json' in .* is not the file"),
    ("pickle", _add("pytorch_model.bin"), "is a pickle"),
    ("pickle in capitals", _add("MODEL.PT"), "is a pickle"),
    ("code", _add("modeling.py"), "is code"),
    ("link", _link, "is a symbolic link"),
    ("linked folder", lambda f: (f / "sub").symlink_to(f.parent), "is a symbolic link"),
    ("weights that are not certified", _add("more.safetensors"), "does not cover 'more.safetensors'"),
    ("old index", lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index of an older"),
    ("certificate of nothing", _digests(), "does not cover 'config.json'"),
    ("certificate of a missing file", lambda f: [certify_anew(f), _rename_in_certificate(f)], "is not there"),
    ("damaged certificate", lambda f: (f / "lipschitz_certificate.json").write_text("{"), "is damaged"),
    ("certificate that is a list", lambda f: (f / "lipschitz_certificate.json").write_text("[]"), "is damaged"),
    ("no digests", lambda f: (f / "lipschitz_certificate.json").write_text('{"digests": {}}'), "no digests.files"),
]


def _rename_in_certificate(folder: Path) -> None:
    path = folder / "lipschitz_certificate.json"
    certificate = json.loads(path.read_bytes())
    certificate["digests"]["files"]["../secret"] = "0" * 64
    path.write_text(json.dumps(certificate), encoding="utf-8")


@pytest.mark.parametrize(("name", "spoil", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_push_refuses_a_folder(
    name: str,
    spoil: Callable[[Path], object],
    said: str,
    make_checkpoint: MakeCheckpoint,
    login: dict[str, str],
    loopback_hub: LoopbackHub,
) -> None:
    folder = make_checkpoint()
    checkpoint_files(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=said) as error:
        push(folder, REPO, **login)
    one_sentence(error)
    assert not loopback_hub.requests  # refused before anything was sent


def test_push_refuses_a_missing_shard(make_checkpoint: MakeCheckpoint, login: dict[str, str]) -> None:
    folder = make_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names a shard 'model-00002-of-00002\.safetensors' that is not there"):
        push(folder, REPO, **login)


def test_push_refuses_a_card_that_is_not_valid(make_checkpoint: MakeCheckpoint, login: dict[str, str]) -> None:
    folder = make_checkpoint()
    for text in (b"---\ntags: [\n---\n", b"---\nlanguage: \xff\n---\n"):
        (folder / "README.md").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"README\.md is not UTF-8 text with a valid metadata block") as error:
            push(folder, REPO, **login)
        one_sentence(error)


HUB_REFUSALS = [
    ("wrong token", {"token": "hf_wrong"}, "does not accept this access token"),
    ("no such branch", {"revision": "none"}, "has no branch, tag or commit 'none'"),
    ("no such host", {"endpoint": "http://127.0.0.1:9"}, "cannot be reached"),
    ("public repository", {"private": True}, "exists and is public"),
    ("bad name", {"repo_id": "a/b/c"}, "is not the name of a repository"),
]


@pytest.mark.parametrize(("name", "options", "said"), HUB_REFUSALS, ids=[row[0] for row in HUB_REFUSALS])
def test_push_says_what_the_hub_refuses(
    name: str,
    options: dict[str, str],
    said: str,
    make_checkpoint: MakeCheckpoint,
    login: dict[str, str],
    api: HfApi,
) -> None:
    api.create_repo(REPO)
    with pytest.raises(HubError, match=said) as error:
        push(make_checkpoint(), **{"repo_id": REPO, **login, **options})  # pyright: ignore
    one_sentence(error)
    assert api.list_repo_files(REPO) == [".gitattributes"]


def test_push_without_a_token(make_checkpoint: MakeCheckpoint, login: dict[str, str]) -> None:
    with pytest.raises(HubError, match=r"There is no access token .* `hf auth login`"):
        push(make_checkpoint(), REPO, endpoint=login["endpoint"])


def test_push_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder") as error:
        push(tmp_path / "none", REPO)
    one_sentence(error)


FETCH_REFUSALS = [
    ("no such repository", "someone/none", {}, "There is no someone/none"),
    ("no such revision", f"{REPO}@none", {}, "has no branch, tag or commit 'none'"),
    ("wrong token", REPO, {"token": "hf_wrong"}, "does not accept this access token"),
    ("no such host", REPO, {"endpoint": "http://127.0.0.1:9"}, "cannot be reached"),
    ("private repository", "someone/private", {"token": False}, "There is no someone/private"),
]


@pytest.mark.parametrize(
    ("name", "reference", "options", "said"), FETCH_REFUSALS, ids=[row[0] for row in FETCH_REFUSALS]
)
def test_fetch_says_what_the_hub_refuses(
    name: str,
    reference: str,
    options: dict[str, str],
    said: str,
    fetched: Fetch,
    api: HfApi,
) -> None:
    api.create_repo(REPO)
    api.create_repo("someone/private", private=True)
    with pytest.raises(HubError, match=said) as error:
        fetched(reference, **options)
    one_sentence(error)


def test_fetch_offline(fetched: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        fetched()
