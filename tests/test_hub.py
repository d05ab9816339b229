"""Pushing and fetching checkpoints through the loopback Hub"""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hf_lipschitz import hub
from hf_lipschitz.checkpoint_folder import REMOTE_CODE_FILE, CheckpointError, checkpoint_files
from hf_lipschitz.hub import FetchedFolder, HubError, fetch, push
from hf_lipschitz.remote_code import REMOTE_FILE_NAME
from hf_lipschitz.testing.loopback_hub import LoopbackHub
from tests.fixtures_hub import (  # noqa: F401
    REPO,
    Fetch,
    MakeCheckpoint,
    api,
    fetched,
    login,
    loopback_hub,
    make_checkpoint,
    one_sentence,
)


def names(client: HfApi, revision: str = "main") -> set[str]:
    return set(client.list_repo_files(REPO, revision=revision))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_local_folder_is_handed_back(tmp_path: Path) -> None:
    assert fetch(str(tmp_path)) == FetchedFolder(tmp_path, None, None)


# Push, fetch


@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip(
    shards: int,
    make_checkpoint: MakeCheckpoint,
    login: dict[str, str],
    fetched: Fetch,
    api: HfApi,
) -> None:
    folder = make_checkpoint(shards=shards)
    pushed = push(folder, REPO, **login, commit_message="hello")
    assert pushed.repo_id == REPO and pushed.commit in pushed.url
    assert [c.title for c in api.list_repo_commits(REPO)] == ["hello", "initial commit"]
    assert {path.name for path in map(Path, names(api))} == {*checkpoint_files(folder), ".gitattributes"}
    back = fetched()
    assert (back.repo_id, back.commit) == (REPO, pushed.commit)
    assert {k: v for k, v in contents(back.path).items() if k != ".gitattributes"} == contents(folder)
    assert not any(path.is_symlink() for path in back.path.rglob("*"))


def test_leftovers_of_training_stay_behind(make_checkpoint: MakeCheckpoint, login: dict[str, str], api: HfApi) -> None:
    folder = make_checkpoint()
    expected = {*checkpoint_files(folder), ".gitattributes"}
    leftovers = [
        "checkpoint-5/pytorch_model.bin",
        "runs/x/events",
        ".git/config",
        ".gitignore",
        ".cache/a.pkl",
        "x.lock",
    ]
    leftovers += [
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "trainer_state.json",
    ]
    for name in leftovers:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left")
    push(folder, REPO, **login)
    assert names(api) == expected


def test_nothing_old_stays_beside_new_weights(
    make_checkpoint: MakeCheckpoint, login: dict[str, str], api: HfApi
) -> None:
    first = push(make_checkpoint("sharded", shards=3), REPO, **login)
    stray = ["pytorch_model.bin", "training_args.bin", "notes.md", "pictures/a.png", "handler.py"]
    api.create_commit(REPO, [CommitOperationAdd(name, b"x") for name in stray], commit_message="strays")
    second = push(make_checkpoint("single"), REPO, **login)
    kept = {"notes.md", "pictures/a.png", "handler.py", ".gitattributes", "README.md"}
    assert names(api) == kept | {"config.json", "model.safetensors", "lipschitz_certificate.json"}
    assert len(api.list_repo_commits(REPO)) == 4  # initial, sharded, strays, single: deletions were part of the last
    assert "model.safetensors.index.json" in names(api, first.commit) and second.commit != first.commit


def test_push_to_a_branch_and_as_a_pull_request(
    make_checkpoint: MakeCheckpoint, login: dict[str, str], api: HfApi, fetched: Fetch
) -> None:
    first = push(make_checkpoint(), REPO, **login)
    api.create_branch(REPO, branch="team/try")
    on_branch = push(make_checkpoint("other", seed=1), REPO, **login, revision="team/try")
    asked = push(make_checkpoint("third", seed=2), REPO, **login, create_pr=True)
    assert asked.url.endswith("/discussions/1")
    assert fetched().commit == first.commit
    assert fetched(f"{REPO}@team/try").commit == on_branch.commit
    assert fetched(f"{REPO}@refs/pr/1").commit == asked.commit == fetched(f"{REPO}@{asked.commit}").commit


def test_pushing_the_same_again_makes_no_commit(
    make_checkpoint: MakeCheckpoint, login: dict[str, str], api: HfApi
) -> None:
    folder = make_checkpoint()
    assert push(folder, REPO, **login).commit == push(folder, REPO, **login).commit
    assert len(api.list_repo_commits(REPO)) == 2


def test_a_commit_in_between_is_not_overwritten(
    make_checkpoint: MakeCheckpoint, login: dict[str, str], api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(make_checkpoint(), REPO, **login)
    needs_streams = hub._needs_streams

    def meanwhile(*args: object) -> bool:
        api.create_commit(REPO, [CommitOperationAdd("theirs.txt", b"x")], commit_message="theirs")
        return needs_streams(*args)  # pyright: ignore

    monkeypatch.setattr(hub, "_needs_streams", meanwhile)
    with pytest.raises(HubError, match="Someone else committed") as error:
        push(make_checkpoint("other", seed=1), REPO, **login)
    one_sentence(error)
    assert api.list_repo_commits(REPO)[0].title == "theirs"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changes_while_it_is_pushed_is_noticed(
    name: str, make_checkpoint: MakeCheckpoint, login: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint()

    def meanwhile(*args: object) -> bool:
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        return False

    monkeypatch.setattr(hub, "_needs_streams", meanwhile)
    with pytest.raises(CheckpointError, match=f"'{name}' changed while it was pushed"):
        push(folder, REPO, **login)


def test_a_client_with_xet_can_push_to_a_hub_without(
    make_checkpoint: MakeCheckpoint, login: dict[str, str], api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    push(make_checkpoint(), REPO, **login)
    (weights,) = api.get_paths_info(REPO, ["model.safetensors"])
    assert weights.lfs is not None  # pyright: ignore


# Fetch


def test_fetch_asks_for_everything_at_one_commit(
    make_checkpoint: MakeCheckpoint,
    login: dict[str, str],
    fetched: Fetch,
    loopback_hub: LoopbackHub,
) -> None:
    commit = push(make_checkpoint(), REPO, **login).commit
    before = len(loopback_hub.requests)
    fetched()
    asked = [path for _, path in loopback_hub.requests[before:] if "whoami" not in path]
    assert asked[0] == f"/api/models/{REPO}" and len(asked) > 5
    assert all(commit in path for path in asked[1:])


def test_a_branch_that_moves_is_fetched_anew(
    make_checkpoint: MakeCheckpoint, login: dict[str, str], fetched: Fetch
) -> None:
    push(make_checkpoint(), REPO, **login)
    first = fetched()
    push(make_checkpoint("other", seed=1), REPO, **login)
    second = fetched()
    assert first.commit != second.commit and contents(first.path) != contents(second.path)
    assert contents(fetched(f"{REPO}@{first.commit}").path) == contents(first.path)


def test_a_changed_download_is_replaced(
    make_checkpoint: MakeCheckpoint,
    login: dict[str, str],
    fetched: Fetch,
    loopback_hub: LoopbackHub,
) -> None:
    push(make_checkpoint(), REPO, **login)
    path = fetched().path
    expected = contents(path)

    def downloads() -> int:
        return sum(method == "GET" and "/resolve/" in where for method, where in loopback_hub.requests)

    once = downloads()
    assert fetched().path == path and downloads() == once  # untouched: nothing is downloaded again
    weights = path / "model.safetensors"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    assert contents(fetched().path) == expected
    (path / "extra.py").touch()
    assert contents(fetched().path) == expected
    weights.rename(path.parent / "moved")
    weights.symlink_to(path.parent / "moved")
    assert contents(fetched().path) == expected and not weights.is_symlink()


def test_fetch_some_files(make_checkpoint: MakeCheckpoint, login: dict[str, str], fetched: Fetch) -> None:
    push(make_checkpoint(), REPO, **login)
    some = fetched(files=["config.json", "lipschitz_certificate.json"])
    assert set(contents(some.path)) == {"config.json", "lipschitz_certificate.json"}
    assert "model.safetensors" in contents(fetched().path)
    with pytest.raises(CheckpointError, match=r"has no file 'none\.json'"):
        fetched(files=["none.json"])
    with pytest.raises(CheckpointError, match="No file of"):
        fetched(files=[])


def test_what_arrives_damaged_is_refused(
    make_checkpoint: MakeCheckpoint,
    login: dict[str, str],
    fetched: Fetch,
    loopback_hub: LoopbackHub,
) -> None:
    push(make_checkpoint(), REPO, **login)
    objects = loopback_hub.root / "hub" / "models" / REPO / "objects" / "lfs"
    (stored,) = objects.iterdir()
    stored.write_bytes(bytes(reversed(stored.read_bytes())))
    with pytest.raises(HubError, match="not what the Hub announced"):
        fetched()


def test_the_thin_file_has_one_name() -> None:
    assert REMOTE_CODE_FILE == REMOTE_FILE_NAME


def test_references_cost_no_heavy_import() -> None:
    code = "import sys, hf_lipschitz.hub as h; h.parse_reference('a/b'); print({'huggingface_hub'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "set()"
