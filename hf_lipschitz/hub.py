"""Checkpoints on the Hub: fetch one at one commit, push one in one commit.

A certificate speaks of exactly the files beside it, so a checkpoint must never be a mixture of two moments. Fetching
therefore resolves the revision to a commit first and downloads at that commit only; pushing refuses a folder whose
certificate is of other files, and sends everything, deletions of old weights included, in a single commit on top of the
commit it looked at. (`HfApi.upload_folder` may split an upload into several commits, so it is not used.)

`huggingface_hub` is imported inside the functions, so that reading a reference costs nothing.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_lipschitz.checkpoint_folder import (
    CERTIFICATE_FILE,
    PICKLE_SUFFIXES,
    CheckpointError,
    certified_digests,
    checkpoint_files,
    matches,
)
from hf_lipschitz.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

# What a repository may hold from an earlier push that must not stay beside new weights (in its root folder only).
_STALE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin.index.json",
    CERTIFICATE_FILE,
    *(f"*{p}" for p in PICKLE_SUFFIXES),
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class HubError(UserError):
    """The Hub cannot be reached, or refuses; the message says what to do."""


@dataclass(frozen=True)
class LocalFolder:
    """A checkpoint in a folder of this machine."""

    path: Path


@dataclass(frozen=True)
class HubReference:
    """A checkpoint in a repository; `revision` is a branch, tag or commit, None the default branch."""

    repo_id: str
    revision: str | None = None


Reference = LocalFolder | HubReference


@dataclass(frozen=True)
class FetchedFolder:
    """A folder of plain files; repository and commit they came from, None for a local folder."""

    path: Path
    repo_id: str | None
    commit: str | None


@dataclass(frozen=True)
class PushedCommit:
    """What a push made: the repository, the commit (40 hexadecimal digits), and the page that shows it."""

    repo_id: str
    commit: str
    url: str


def parse_reference(text: str) -> Reference:
    """The folder or repository that a user means by `./folder`, `org/name` or `org/name@revision`.

    A path that exists is a folder, and so is anything that starts with `.`, `/` or `~`.

    Raises:
        UserError: it is neither, or the folder does not exist.
    """
    path = Path(text).expanduser()
    if text.startswith((".", "~")) or path.is_absolute() or (text and path.exists()):
        if not path.is_dir():
            raise UserError(f"'{text}' is not a folder: give the folder of a checkpoint, or org/name on the Hub.")
        return LocalFolder(path)
    repo_id, at, revision = text.partition("@")
    if not _REPO_ID.fullmatch(repo_id) or (at and not revision):
        raise UserError(f"'{text}' is neither a folder here nor written org/name or org/name@revision: correct it.")
    return HubReference(repo_id, revision or None)


def fetch(
    reference: str | Reference,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    files: Collection[str] | None = None,
) -> FetchedFolder:
    """A checkpoint as a folder of plain files (no symlinks), all of one commit; a local folder is handed back as it is.

    Args:
        reference: see `parse_reference`.
        endpoint: address of the Hub (default: `HF_ENDPOINT` or the public one).
        token: access token, for private repositories (default: the one of `hf auth login`).
        cache_dir: folder to keep downloads in (default: the assets cache of huggingface_hub). What is there is used
            again only if it has the Hub's digests of that commit.
        files: names of the only files wanted (default: all).

    Raises:
        UserError: the reference cannot be read.
        HubError: repository or revision not found, or the Hub cannot be reached.
        CheckpointError: a wanted file is not in the repository at that commit.
    """
    reference = parse_reference(reference) if isinstance(reference, str) else reference
    if isinstance(reference, LocalFolder):
        return FetchedFolder(reference.path, None, None)
    from huggingface_hub import HfApi, cached_assets_path

    api, repo_id = HfApi(endpoint=endpoint, token=token, library_name="hf-lipschitz"), reference.repo_id
    with _in_plain_words(api, repo_id, reference.revision):
        info = api.model_info(repo_id, revision=reference.revision)
        commit, present = str(info.sha), {sibling.rfilename for sibling in info.siblings or ()}
        wanted = present if files is None else set(files)
        if absent := sorted(wanted - present):
            raise CheckpointError(f"{repo_id} at commit {commit} has no file '{absent[0]}': choose another revision.")
        if not wanted:
            raise CheckpointError(
                f"No file of {repo_id} at commit {commit} was asked for or is there: name another one."
            )
        store = cached_assets_path(
            "hf_lipschitz", repo_id, "snapshots", assets_dir=None if cache_dir is None else Path(cache_dir)
        )
        name = commit if files is None else f"{commit}-{hashlib.sha256(repr(sorted(wanted)).encode()).hexdigest()[:12]}"
        return FetchedFolder(_snapshot(api, repo_id, commit, wanted, store / name), repo_id, commit)


def _snapshot(api: HfApi, repo_id: str, commit: str, wanted: set[str], target: Path) -> Path:
    """Fill `target` with the wanted files of a commit, unless it holds exactly them already."""
    from filelock import FileLock

    partial = target.with_name(f"{target.name}.partial")
    with FileLock(target.with_name(f"{target.name}.lock")):
        if target.is_dir() and _is_exact(api, repo_id, commit, wanted, target):
            return target
        shutil.rmtree(target, ignore_errors=True)
        # A download into a folder makes real files, where the client's own cache would make symlinks.
        patterns = [glob.escape(name) for name in wanted]
        api.snapshot_download(repo_id, revision=commit, local_dir=partial, allow_patterns=patterns)
        shutil.rmtree(partial / ".cache" / "huggingface")  # the client's notes about the download
        if not any((partial / ".cache").iterdir()):
            (partial / ".cache").rmdir()
        if not _is_exact(api, repo_id, commit, wanted, partial):
            shutil.rmtree(partial)
            raise HubError(
                f"What arrived of {repo_id} at commit {commit} is not what the Hub announced: fetch it again."
            )
        os.replace(partial, target)
        return target


def _is_exact(api: HfApi, repo_id: str, commit: str, wanted: set[str], folder: Path) -> bool:
    """Whether a folder holds exactly the wanted files, with the digests the Hub has for them, and no symlink."""
    if any(path.is_symlink() for path in folder.rglob("*")):
        return False
    found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    return not (found.mismatches or found.extra_paths or wanted.intersection(found.missing_paths))


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = False,
    revision: str = "main",
    commit_message: str | None = None,
    create_pr: bool = False,
) -> PushedCommit:
    """Push a certified checkpoint folder in one commit; make the repository if it does not exist.

    Leftovers of training (`checkpoint-*`, optimizer states, logs) stay behind. Weights, shard indices, pickles and
    certificates that the repository holds and the folder does not are deleted in the same commit. If someone else
    commits meanwhile, nothing is written. Afterwards the Hub's digests are compared with the certificate's.

    Args:
        folder: a checkpoint folder; see `checkpoint_files` for what it must hold.
        repo_id: `org/name`.
        endpoint: address of the Hub (default: `HF_ENDPOINT` or the public one).
        token: access token with write permission (default: the one of `hf auth login` or `HF_TOKEN`).
        private: make a new repository private; a public one that exists is then refused.
        revision: an existing branch to commit to.
        commit_message: default "Upload a certified checkpoint".
        create_pr: open a pull request with the commit and leave the branch alone.

    Raises:
        CheckpointError: the folder is not a complete checkpoint with a certificate of exactly its files.
        HubError: no token, no permission, no such branch, the branch has moved on, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    files = checkpoint_files(folder)
    if not (token := token or get_token()):
        raise HubError("There is no access token to push with: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi(endpoint=endpoint, token=token, library_name="hf-lipschitz")
    with _in_plain_words(api, repo_id, revision), ExitStack() as open_files:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        head = api.model_info(repo_id, revision=revision)
        if private and not head.private:
            raise HubError(f"{repo_id} exists and is public: make it private on the Hub, or push without 'private'.")
        operations = [
            *_deletions((sibling.rfilename for sibling in head.siblings or ()), files),
            *_additions(files, open_files if _needs_streams(api, repo_id, revision) else None),
        ]
        made = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload a certified checkpoint",
            revision=revision,
            parent_commit=head.sha,
            create_pr=create_pr,
        )
        _confirm(api, repo_id, made.oid, files)
    return PushedCommit(repo_id, made.oid, made.pr_url or made.commit_url)


def _deletions(present: Iterable[str], files: Collection[str]) -> list[CommitOperationDelete]:
    """What must go from the repository so that nothing old lies beside the new weights."""
    from huggingface_hub import CommitOperationDelete

    stale = [name for name in present if "/" not in name and matches(name, _STALE) and name not in files]
    return [CommitOperationDelete(name, is_folder=False) for name in stale]


def _additions(files: dict[str, Path], streams: ExitStack | None) -> list[CommitOperationAdd]:
    """The files to commit, as paths, or as open files where `streams` is there to close them."""
    from huggingface_hub import CommitOperationAdd

    if streams is None:
        return [CommitOperationAdd(name, path) for name, path in files.items()]
    return [CommitOperationAdd(name, streams.enter_context(path.open("rb"))) for name, path in files.items()]


def _needs_streams(api: HfApi, repo_id: str, revision: str) -> bool:
    """Whether this Hub has no Xet storage, although the client would use it.

    The client sends large files through Xet whenever it can itself, and fails on a server that knows only git-lfs (the
    loopback Hub, some mirrors). Open files it always sends through git-lfs. A server without Xet has no such route, so
    it answers 404 without one of the Hub's error codes.
    """
    from urllib.parse import quote

    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_DISABLE_XET:
        return False
    address = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{quote(revision, safe='')}"
    answer = get_session().get(address, headers=build_hf_headers(token=api.token))
    return answer.status_code == 404 and "X-Error-Code" not in answer.headers


def _confirm(api: HfApi, repo_id: str, commit: str, files: dict[str, Path]) -> None:
    """Compare what the Hub holds now with the certificate: a file may have changed while it was read."""
    digests = certified_digests(files)
    for remote in api.get_paths_info(repo_id, list(digests), revision=commit):
        if not _is_same(remote, files[remote.path], digests.pop(remote.path)):  # pyright: ignore[reportArgumentType]
            raise CheckpointError(f"'{remote.path}' changed while it was pushed: push again when nothing writes to it.")
    if digests:
        raise HubError(f"The Hub did not keep '{next(iter(digests))}' of {repo_id}: push again.")


def _is_same(remote: RepoFile, path: Path, sha256: str) -> bool:
    if remote.lfs is not None:
        return remote.lfs.sha256 == sha256
    content = path.read_bytes()  # the Hub has only git's own digest of a small file
    blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return remote.blob_id == blob_id and hashlib.sha256(content).hexdigest() == sha256


@contextmanager
def _in_plain_words(api: HfApi, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into one sentence each; errors that are not the Hub's pass unchanged."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        explained = _explain(error, api.endpoint, repo_id, revision)
        if explained is None:
            raise
        raise explained from error


def _explain(error: BaseException, hub: str, repo_id: str, revision: str | None) -> UserError | None:
    """The error a user sees for a failure of the client; None for a failure that is not the Hub's."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
        return _explain(error.__cause__, hub, repo_id, revision)
    if isinstance(error, UnicodeDecodeError) or (isinstance(error, ValueError) and "in README.md" in str(error)):
        said = " ".join(str(error).split())
        return CheckpointError(f"README.md is not UTF-8 text with a valid metadata block: correct it ({said}).")
    sentence = _sentence(error, hub, repo_id, revision)
    return None if sentence is None else HubError(sentence)


def _sentence(error: BaseException, hub: str, repo_id: str, revision: str | None) -> str | None:
    """What a failure of the client means for a user; None for a failure that is not the Hub's."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {hub}/{repo_id}, then try again."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"There is no {repo_id} at {hub} that you may read: check the name, or log in with `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit '{revision}': choose one of {hub}/{repo_id}, or leave it out."
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error.response.status_code, error.server_message, hub, repo_id, revision)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so {hub} is not asked: unset it, or give a local folder."
    if isinstance(error, errors.HFValidationError):
        return f"'{repo_id}' is not the name of a repository: write org/name."
    if isinstance(error, (errors.HTTPError, errors.LocalEntryNotFoundError)):  # pyright: ignore
        return f"{hub} cannot be reached: check the network connection, HF_ENDPOINT and any proxy, then try again."
    return None


def _refusal(status: int, message: str | None, hub: str, repo_id: str, revision: str | None) -> str:
    """What a status code of the Hub means for a user."""
    if status == 401:
        return f"{hub} does not accept this access token: make one at {hub}/settings/tokens, then `hf auth login`."
    if status == 403:
        return f"This access token may not write to {repo_id}: use one with write permission for it."
    if status in (409, 412):
        return f"Someone else committed to '{revision}' of {repo_id} meanwhile: look at it, then push again."
    said = " ".join((message or "no reason given").split()).rstrip(".")
    return f"{hub} refused with status {status} ({said}): correct that, or try again later."
