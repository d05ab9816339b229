"""What a client does with a Hub: one function an operation, given a client and a folder, asserting what must hold.

The repository `REPO` holds a card, a configuration in a subfolder, and weights when an operation starts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, hf_hub_download, snapshot_download
from safetensors.numpy import save

REPO = "someone/model"
WEIGHTS = save({"w": np.arange(16, dtype=np.float32).reshape(4, 4), "b": np.ones(3, dtype=np.float32)})


def head(client: HfApi, revision: str = "main") -> str:
    return str(client.model_info(REPO, revision=revision).sha)


def commit(client: HfApi, name: str, content: bytes, **options: object) -> str:
    """One commit of one file; its id."""
    made = client.create_commit(REPO, [CommitOperationAdd(name, content)], commit_message=f"put {name}", **options)  # pyright: ignore
    return made.oid


def read(client: HfApi, name: str, revision: str, folder: Path) -> bytes:
    path = hf_hub_download(
        REPO, name, revision=revision, endpoint=client.endpoint, token=client.token, cache_dir=folder / "cache"
    )
    return Path(path).read_bytes()


def create_twice(client: HfApi, folder: Path) -> None:
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        client.create_repo(REPO)
    url = client.create_repo(REPO, exist_ok=True)
    assert (url.repo_id, url.repo_type) == (REPO, "model")
    assert client.create_repo("mine").repo_id == "loopback/mine"


def create_dataset(client: HfApi, folder: Path) -> None:
    url = client.create_repo("someone/data", repo_type="dataset")
    assert (url.repo_id, url.repo_type) == ("someone/data", "dataset")
    client.upload_file(
        path_or_fileobj=b"a,b\n", path_in_repo="t.csv", repo_id="someone/data", repo_type="dataset", commit_message="x"
    )
    assert [s.rfilename for s in client.dataset_info("someone/data").siblings or ()] == [".gitattributes", "t.csv"]
    path = hf_hub_download(
        "someone/data", "t.csv", repo_type="dataset", endpoint=client.endpoint, cache_dir=folder / "cache"
    )
    assert Path(path).read_bytes() == b"a,b\n"


def who_am_i(client: HfApi, folder: Path) -> None:
    assert client.whoami()["name"] == "loopback"


def describe(client: HfApi, folder: Path) -> None:
    info = client.model_info(REPO, files_metadata=True)
    weights = next(s for s in info.siblings or () if s.rfilename == "model.safetensors")
    assert weights.lfs is not None and weights.lfs["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.size == len(WEIGHTS)
    assert info.pipeline_tag == "image-classification" and info.tags == ["lipschitz"]
    assert all(s.size is None for s in client.model_info(REPO).siblings or ())


def every_kind_of_revision(client: HfApi, folder: Path) -> None:
    first = head(client)
    client.create_tag(REPO, tag="v1")
    commit(client, "sub/config.json", b'{"a": 2}')
    for revision in ("v1", first, first[:8], "refs/tags/v1"):
        assert head(client, revision) == first
    assert head(client) != first == client.list_repo_commits(REPO)[1].commit_id


def list_tree(client: HfApi, folder: Path) -> None:
    assert {f.path for f in client.list_repo_tree(REPO)} == {".gitattributes", "README.md", "model.safetensors", "sub"}
    assert [f.path for f in client.list_repo_tree(REPO, "sub")] == ["sub/config.json"]
    assert "sub/config.json" in {f.path for f in client.list_repo_tree(REPO, recursive=True)}
    with pytest.raises(errors.EntryNotFoundError):
        list(client.list_repo_tree(REPO, "none"))


def paths_info(client: HfApi, folder: Path) -> None:
    weights, config, sub = client.get_paths_info(REPO, ["model.safetensors", "sub/config.json", "sub", "missing"])
    assert weights.lfs is not None and weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()  # pyright: ignore
    assert config.lfs is None and config.blob_id == hashlib.sha1(b'blob 8\0{"a": 1}').hexdigest()  # pyright: ignore
    assert sub.path == "sub" and not hasattr(sub, "lfs")


def download_at_a_revision(client: HfApi, folder: Path) -> None:
    first = head(client)
    second = commit(client, "sub/config.json", b'{"a": 2}')
    assert read(client, "sub/config.json", first, folder) == b'{"a": 1}'
    assert read(client, "sub/config.json", second, folder) == b'{"a": 2}'
    assert read(client, "model.safetensors", "main", folder) == WEIGHTS


def download_the_snapshot(client: HfApi, folder: Path) -> None:
    first = head(client)
    client.create_commit(REPO, [CommitOperationDelete("sub/", is_folder=True)], commit_message="less")
    for revision, names in ((first, {"README.md", "config.json"}), ("main", {"README.md"})):
        path = snapshot_download(
            REPO, revision=revision, endpoint=client.endpoint, token=client.token, cache_dir=folder / "cache"
        )
        assert {p.name for p in Path(path).rglob("*") if p.is_file()} == names | {".gitattributes", "model.safetensors"}


def read_the_header_of_the_weights(client: HfApi, folder: Path) -> None:
    metadata = client.get_safetensors_metadata(REPO)
    assert metadata.files_metadata["model.safetensors"].tensors["w"].shape == [4, 4]


def upload_a_folder(client: HfApi, folder: Path) -> None:
    source = folder / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "note.txt").write_text("hello", encoding="utf-8")
    (source / "picture.png").write_bytes(b"\x89PNG")
    client.upload_folder(repo_id=REPO, folder_path=source, commit_message="folder", delete_patterns=["sub/*"])
    info = client.get_paths_info(REPO, ["deep/note.txt", "picture.png", "sub/config.json"])
    assert [(f.path, f.lfs is not None) for f in info] == [("deep/note.txt", False), ("picture.png", True)]  # pyright: ignore


def large_or_regular(client: HfApi, folder: Path) -> None:
    contents = {"a.txt": "é".encode() * 400, "b.dat": b"\0\1", "c.dat": b"\xff\xfe", "d.bin": b"text", "empty.bin": b""}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    client.create_commit(REPO, operations, commit_message="kinds")
    found = {f.path: f.lfs is not None for f in client.get_paths_info(REPO, list(contents))}  # pyright: ignore
    assert found == {"a.txt": False, "b.dat": True, "c.dat": True, "d.bin": True, "empty.bin": False}
    assert read(client, "a.txt", "main", folder) == contents["a.txt"]


def nothing_changed(client: HfApi, folder: Path) -> None:
    before = head(client)
    assert commit(client, "model.safetensors", WEIGHTS) == before == head(client)


def branches_and_tags(client: HfApi, folder: Path) -> None:
    client.create_branch(REPO, branch="team/try-1", revision=head(client))
    on_branch = commit(client, "new.txt", b"x", revision="team/try-1")
    assert head(client, "team/try-1") == on_branch != head(client)
    client.create_tag(REPO, tag="v1", revision="team/try-1")
    refs = client.list_repo_refs(REPO)
    assert {b.name for b in refs.branches} == {"main", "team/try-1"}
    assert [(t.ref, t.target_commit) for t in refs.tags] == [("refs/tags/v1", on_branch)]
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        client.create_branch(REPO, branch="team/try-1")
    with pytest.raises(errors.BadRequestError):
        client.create_branch(REPO, branch="refs/pr/7")
    client.delete_branch(REPO, branch="team/try-1")
    client.delete_tag(REPO, tag="v1")
    with pytest.raises(errors.RevisionNotFoundError):
        head(client, "v1")
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        client.delete_branch(REPO, branch="main")


def conflicting_commits(client: HfApi, folder: Path) -> None:
    seen = head(client)
    moved = commit(client, "one.txt", b"1", parent_commit=seen)
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        commit(client, "two.txt", b"2", parent_commit=seen)
    assert head(client) == moved and not client.file_exists(REPO, "two.txt")


def pull_request(client: HfApi, folder: Path) -> None:
    before = head(client)
    made = client.create_commit(
        REPO, [CommitOperationAdd("new.txt", b"x")], commit_message="please", create_pr=True, parent_commit=before
    )
    assert made.pr_revision == "refs/pr/1" and made.pr_num == 1
    assert head(client) == before and head(client, "refs/pr/1") == head(client, made.oid) == made.oid
    refs = client.list_repo_refs(REPO, include_pull_requests=True)
    assert [r.ref for r in refs.pull_requests or ()] == ["refs/pr/1"]
    assert commit(client, "more.txt", b"y", revision="refs/pr/1") == head(client, "refs/pr/1")


def delete_a_file(client: HfApi, folder: Path) -> None:
    client.delete_file("sub/config.json", REPO)
    assert not client.file_exists(REPO, "sub/config.json")
    with pytest.raises(errors.EntryNotFoundError):
        client.delete_file("sub/config.json", REPO)
    with pytest.raises(errors.EntryNotFoundError):
        client.delete_folder("sub", REPO)


def delete_the_repository(client: HfApi, folder: Path) -> None:
    client.delete_repo(REPO)
    with pytest.raises(errors.RepositoryNotFoundError):
        client.model_info(REPO)
    client.create_repo(REPO)
    assert [s.rfilename for s in client.model_info(REPO).siblings or ()] == [".gitattributes"]


def checksums(client: HfApi, folder: Path) -> None:
    local = client.snapshot_download(REPO, local_dir=folder / "local")
    assert not client.verify_repo_checksums(REPO, local_dir=local).mismatches
    (Path(local) / "sub" / "config.json").write_bytes(b'{"a": 3}')
    assert [m["path"] for m in client.verify_repo_checksums(REPO, local_dir=local).mismatches] == ["sub/config.json"]


def broken_card(client: HfApi, folder: Path) -> None:
    for text in (b"---\ntags: [\n---\n", b"---\n- a\n---\n"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            commit(client, "README.md", text)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(client, "README.md", b"no metadata")


OPERATIONS = [
    create_twice,
    create_dataset,
    who_am_i,
    describe,
    every_kind_of_revision,
    list_tree,
    paths_info,
    download_at_a_revision,
    download_the_snapshot,
    read_the_header_of_the_weights,
    upload_a_folder,
    large_or_regular,
    nothing_changed,
    branches_and_tags,
    conflicting_commits,
    pull_request,
    delete_a_file,
    delete_the_repository,
    checksums,
    broken_card,
]
