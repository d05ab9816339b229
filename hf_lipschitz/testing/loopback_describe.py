"""How the Hub's API describes repositories, trees and cards in JSON: pure functions of a commit, no HTTP."""

from __future__ import annotations

import base64
import codecs
import hashlib
from typing import Any

import yaml

from hf_lipschitz.testing.loopback_objects import Blob, lfs_pointer
from hf_lipschitz.testing.loopback_store import LFS_SUFFIXES, Commit, Repository

# Above this size the Hub takes a file only as a large one, whatever is in it.
LARGE_FROM_BYTES = 10 * 1000 * 1000


def _large(blob: Blob, digest_key: str) -> dict[str, Any]:
    """The part of a description that only large files have."""
    if blob.sha256 is None:
        return {}
    pointer_size = len(lfs_pointer(blob.sha256, blob.size))
    return {"lfs": {digest_key: blob.sha256, "size": blob.size, "pointerSize": pointer_size}}


def _file(path: str, blob: Blob) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **_large(blob, "oid")}


def _folder(path: str, commit: Commit) -> dict[str, Any]:
    inside = "".join(f"{name} {blob.oid}\n" for name, blob in commit.tree.items() if name.startswith(f"{path}/"))
    oid = hashlib.sha1(inside.encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


def _folders(commit: Commit) -> set[str]:
    parts = [path.split("/") for path in commit.tree]
    return {"/".join(split[:depth]) for split in parts for depth in range(1, len(split))}


def tree(commit: Commit, under: str = "", *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders of a commit below a folder, as `GET .../tree/...` lists them."""
    prefix = f"{under}/" if under else ""
    names = sorted(name for name in {*commit.tree, *_folders(commit)} if name.startswith(prefix) and name != under)
    return paths(commit, [name for name in names if recursive or "/" not in name.removeprefix(prefix)])


def paths(commit: Commit, names: list[str]) -> list[dict[str, Any]]:
    """The named files and folders, leaving out what does not exist, as `POST .../paths-info/...` answers."""
    folders = _folders(commit)
    found = [name for name in names if name in commit.tree or name in folders]
    return [_file(name, commit.tree[name]) if name in commit.tree else _folder(name, commit) for name in found]


def card(text: str) -> dict[str, Any] | None:
    """The metadata block of a model card; None if it has none; `yaml.YAMLError` or `ValueError` if it is broken."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return None
    end = next(number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---")
    data = yaml.safe_load("\n".join(lines[1:end]))
    if data is not None and not isinstance(data, dict):
        raise ValueError("the metadata block is not a mapping")
    return data


def validate_card(text: str) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to `POST /api/validate-yaml`."""
    try:
        data = card(text)
    except (yaml.YAMLError, ValueError) as error:
        return 400, {"errors": [{"message": " ".join(str(error).split())}], "warnings": []}
    warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
    return 200, {"errors": [], "warnings": warnings}


def _card_of(repository: Repository, commit: Commit) -> dict[str, Any]:
    readme = commit.tree.get("README.md")
    if readme is None:
        return {}
    try:
        return card(repository.objects.blob_path(readme).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError):
        return {}  # the Hub, too, shows a repository whose card was broken by a git push


def repository(repo: Repository, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    """A repository at a commit, as `GET /api/models/...` describes it; sizes and digests only with `blobs`."""
    data, settings = _card_of(repo, commit), repo.info
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.tree.items()):
        details = {"size": blob.size, "blobId": blob.oid, **_large(blob, "sha256")} if blobs else {}
        siblings.append({"rfilename": path, **details})
    tags = data.get("tags")
    body = {
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.id,
        "private": settings["private"],
        "createdAt": settings["created"],
        "lastModified": commit.date,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags if isinstance(tags, list) else [],
        "cardData": data,
        "siblings": siblings,
    }
    if repo.kind == "models":
        body |= {key: data[key] for key in ("pipeline_tag", "library_name") if isinstance(data.get(key), str)}
    return body


def upload_plan(commit: Commit, file: dict[str, Any]) -> dict[str, Any]:
    """Whether a file is to be uploaded as a large or a regular one, and the digest of what is there already."""
    path, size, sample = file["path"], file["size"], base64.b64decode(file.get("sample", ""))
    large = path.lower().endswith(LFS_SUFFIXES) or size > LARGE_FROM_BYTES or _is_binary(sample)
    plan = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if path in commit.tree:
        plan["oid"] = commit.tree[path].etag
    return plan


def _is_binary(sample: bytes) -> bool:
    if b"\0" in sample:
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # the sample may end inside a character
    except UnicodeDecodeError:
        return True
    return False


def history(commit: Commit, author: str) -> dict[str, Any]:
    """One line of `GET .../commits/...`."""
    return {
        "id": commit.id,
        "title": commit.title,
        "message": commit.message,
        "date": commit.date,
        "authors": [{"user": author}],
    }


def references(refs: dict[str, dict[str, str]], *, pull_requests: bool) -> dict[str, list[dict[str, str]]]:
    """Branches, tags and (on request) pull requests, as `GET .../refs` lists them."""

    def listed(kind: str, prefix: str, *, full: bool = False) -> list[dict[str, str]]:
        items = sorted(refs[kind].items())
        return [{"name": prefix + n if full else n, "ref": prefix + n, "targetCommit": c} for n, c in items]

    body = {"branches": listed("heads", "refs/heads/"), "converts": [], "tags": listed("tags", "refs/tags/")}
    if pull_requests:
        body["pullRequests"] = listed("pulls", "refs/pr/", full=True)
    return body
