"""Repositories, commits, refs and blobs of the loopback Hub, as plain files in one folder.

Nothing is kept in memory, so that a second process, or a person with a text editor, can read the same state:

    <root>/models/<namespace>/<name>/
        repository.json          {"private", "created"}
        refs.json                {"heads": {branch: commit}, "tags": {tag: commit}, "pulls": {number: commit}}
        commits/<commit>.json    one immutable commit with its whole tree: {path: {"size", "oid", "sha256"}}
        objects/git/<sha1>       content of a regular file, under its git blob id
        objects/lfs/<sha256>     content of a large file, under its digest

Every commit holds its complete tree, so that an old revision stays readable whatever happens to the branches.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_lipschitz.testing.loopback_objects import Blob, Objects, Refusal, git_blob_id, lfs_pointer, write_file

KINDS = ("models", "datasets")
DEFAULT_BRANCH = "main"
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?")
_REF = re.compile(r"\w(?:[\w./-]*\w)?")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# Suffixes that are always large files; a new repository starts with a `.gitattributes` that lists them, as on the Hub.
LFS_SUFFIXES = (
    ".bin",
    ".ckpt",
    ".gz",
    ".h5",
    ".npz",
    ".parquet",
    ".pkl",
    ".png",
    ".pt",
    ".pth",
    ".safetensors",
    ".zip",
)
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Commit:
    """One immutable state of a repository."""

    id: str
    parent: str | None
    title: str
    message: str
    date: str
    tree: dict[str, Blob]


def now() -> str:
    """The time of day as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _check_path(path: str) -> str:
    parts = path.split("/")
    if "\\" in path or any(part in {"", ".", "..", ".git"} for part in parts):
        raise Refusal(400, f"'{path}' is not a path inside a repository")
    return path


class Repository:
    """One repository on disk."""

    def __init__(self, root: Path, kind: str, repo_id: str) -> None:
        self.folder, self.kind, self.id = root / kind / repo_id, kind, repo_id
        self.objects = Objects(self.folder / "objects")
        self._lock = threading.Lock()

    @property
    def info(self) -> dict[str, Any]:
        """The repository's own settings: private, created."""
        return json.loads((self.folder / "repository.json").read_bytes())

    @property
    def refs(self) -> dict[str, dict[str, str]]:
        """Branches, tags and pull requests with the commit each one points at."""
        return json.loads((self.folder / "refs.json").read_bytes())

    def _set_ref(self, kind: str, name: str, commit: str | None) -> None:
        refs = self.refs
        refs[kind].pop(name, None)
        if commit is not None:
            refs[kind][name] = commit
        write_file(self.folder / "refs.json", json.dumps(refs, indent=1).encode())

    def initialise(self, private: bool) -> None:
        """Write the settings and the first commit, which holds `.gitattributes`, as on the Hub."""
        write_file(self.folder / "refs.json", b'{"heads": {}, "tags": {}, "pulls": {}}')
        first = self._write_commit(
            None, "initial commit", "", {".gitattributes": self.objects.add_regular(_ATTRIBUTES)}
        )
        self._set_ref("heads", DEFAULT_BRANCH, first.id)
        # Last, because its presence is what makes the folder a repository.
        write_file(self.folder / "repository.json", json.dumps({"private": private, "created": now()}).encode())

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag, `refs/pr/N` or (abbreviated) commit id names; otherwise `Refusal` 404."""
        refs = self.refs
        for kind, name in (("heads", revision), ("tags", revision), *_full_ref(revision)):
            if name in refs[kind]:
                return refs[kind][name]
        if _COMMIT.fullmatch(revision):
            found = [path.stem for path in (self.folder / "commits").glob(f"{revision}*.json")]
            if len(found) == 1:
                return found[0]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, revision: str) -> Commit:
        """The commit with its whole tree that a revision names."""
        raw = json.loads((self.folder / "commits" / f"{self.resolve(revision)}.json").read_bytes())
        return Commit(**{**raw, "tree": {path: Blob(**blob) for path, blob in raw["tree"].items()}})

    def history(self, revision: str) -> Iterator[Commit]:
        """The commits from a revision back to the first one."""
        parent: str | None = self.resolve(revision)
        while parent is not None:
            commit = self.commit(parent)
            yield commit
            parent = commit.parent

    def _write_commit(self, parent: str | None, title: str, message: str, tree: dict[str, Blob]) -> Commit:
        body = {"parent": parent, "title": title, "message": message, "date": now()}
        body["tree"] = {path: asdict(tree[path]) for path in sorted(tree)}
        commit_id = hashlib.sha1(json.dumps(body).encode(), usedforsecurity=False).hexdigest()
        write_file(
            self.folder / "commits" / f"{commit_id}.json", json.dumps({"id": commit_id, **body}, indent=1).encode()
        )
        return Commit(**{**body, "id": commit_id, "tree": tree})

    def _apply(self, tree: dict[str, Blob], operation: dict[str, Any]) -> None:
        """Carry out one line of a commit on a tree."""
        key, path = operation["key"], _check_path(operation["path"].rstrip("/"))
        if key == "file":
            tree[path] = self.objects.add_regular(operation["content"])
        elif key == "lfsFile":
            stored = self.objects.lfs_path(operation["oid"])
            if not stored.is_file():
                raise Refusal(400, f"the large file '{path}' was never uploaded")
            size = stored.stat().st_size
            tree[path] = Blob(size, git_blob_id(lfs_pointer(operation["oid"], size)), operation["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [path] if key == "deletedFile" else [name for name in tree if name.startswith(f"{path}/")]
            if not gone or any(name not in tree for name in gone):
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
        else:
            raise Refusal(400, f"unknown operation '{key}' in a commit")

    def add_commit(
        self,
        revision: str,
        title: str,
        message: str,
        operations: Iterable[dict[str, Any]],
        *,
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[Commit, str | None]:
        """Commit to a branch, or as a new pull request; the commit and the pull request's number.

        `parent` is the commit the author saw: on a branch that has moved on, `Refusal` 412.
        """
        with self._lock:
            head = self.resolve(revision)
            kind, name = self._writable(revision)
            if parent is not None and not head.startswith(parent):
                if not pull_request:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                head = self.resolve(parent)
            tree = dict(self.commit(head).tree)
            for operation in operations:
                self._apply(tree, operation)
            commit = self._write_commit(head, title, message, tree)
            if pull_request:
                kind, name = "pulls", str(len(self.refs["pulls"]) + 1)
            self._set_ref(kind, name, commit.id)
            return commit, name if pull_request else None

    def _writable(self, revision: str) -> tuple[str, str]:
        for kind, name in (("heads", revision), *_full_ref(revision)):
            if kind != "tags" and name in self.refs[kind]:
                return kind, name
        raise Refusal(404, f"'{revision}' is not a branch, so nothing can be committed to it", "RevisionNotFound")

    def add_ref(self, kind: str, name: str, revision: str) -> None:
        """Create a branch (`heads`) or tag (`tags`); 409 if it exists, 400 if the name is not allowed."""
        if not _REF.fullmatch(name) or ".." in name or name.startswith("refs/"):
            raise Refusal(400, f"'{name}' is not an allowed name for a reference")
        with self._lock:
            if name in self.refs[kind]:
                raise Refusal(409, f"Reference already exists: {name}")
            self._set_ref(kind, name, self.resolve(revision))

    def delete_ref(self, kind: str, name: str) -> None:
        """Delete a branch or tag; 404 if there is none of that name, 403 for the default branch."""
        if (kind, name) == ("heads", DEFAULT_BRANCH):
            raise Refusal(403, f"the branch '{DEFAULT_BRANCH}' cannot be deleted")
        with self._lock:
            if name not in self.refs[kind]:
                raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            self._set_ref(kind, name, None)


def _full_ref(revision: str) -> list[tuple[str, str]]:
    """The reference that a name like `refs/pr/1` or `refs/heads/main` spells out."""
    for prefix, kind in (("refs/pr/", "pulls"), ("refs/heads/", "heads"), ("refs/tags/", "tags")):
        if revision.startswith(prefix):
            return [(kind, revision.removeprefix(prefix))]
    return []


class Store:
    """All repositories under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._repositories: dict[tuple[str, str], Repository] = {}

    def _at(self, kind: str, repo_id: str) -> Repository:
        # One object a repository, because the object carries the lock for its commits.
        if kind not in KINDS or not all(_NAME.fullmatch(part) and ".." not in part for part in repo_id.split("/")):
            raise Refusal(400, f"'{repo_id}' is not an allowed repository name")
        return self._repositories.setdefault((kind, repo_id), Repository(self.root, kind, repo_id))

    def get(self, kind: str, repo_id: str) -> Repository:
        """An existing repository; `Refusal` 404 otherwise."""
        repository = self._at(kind, repo_id)
        if not (repository.folder / "repository.json").is_file():
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def create(self, kind: str, repo_id: str, private: bool) -> Repository:
        """A new repository; `Refusal` 409 if it exists."""
        with self._lock:
            repository = self._at(kind, repo_id)
            if (repository.folder / "repository.json").is_file():
                raise Refusal(409, f"You already created this {kind[:-1]} repo")
            repository.initialise(private)
            return repository

    def delete(self, kind: str, repo_id: str) -> None:
        """Remove a repository with everything in it."""
        with self._lock:
            shutil.rmtree(self.get(kind, repo_id).folder)
