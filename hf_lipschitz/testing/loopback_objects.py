"""Contents of the loopback Hub: files stored by digest, and the one error by which the Hub refuses a request."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_CHUNK = 1 << 20


class Refusal(Exception):
    """A request that the Hub refuses: HTTP status, one sentence, and the Hub's own `X-Error-Code` where it has one."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit


@dataclass(frozen=True)
class Blob:
    """One file of a tree: size in bytes, git blob id (of its pointer, if the file is large), sha256 if it is large."""

    size: int
    oid: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """The digest by which clients recognise the content: sha256 of a large file, git blob id of a regular one."""
        return self.sha256 or self.oid


def git_blob_id(content: bytes) -> str:
    """The id git gives to a blob with this content (sha1, 40 hexadecimal digits)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The pointer file that git stores in the place of a large file (git-lfs pointer format, version 1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in its folder and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(temporary, path)


class Objects:
    """The contents of one repository, under their digests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def blob_path(self, blob: Blob) -> Path:
        """Where the content of a file lies on disk."""
        return self.folder / ("lfs" if blob.sha256 else "git") / blob.etag

    def lfs_path(self, sha256: str) -> Path:
        """Where the content of a large file lies, or would lie; `Refusal` 400 unless it is a sha256."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise Refusal(400, f"'{sha256}' is not a sha256")
        return self.folder / "lfs" / sha256

    def add_regular(self, content: bytes) -> Blob:
        """Store the content of a regular file."""
        blob = Blob(size=len(content), oid=git_blob_id(content))
        write_file(self.blob_path(blob), content)
        return blob

    def add_large(self, sha256: str, size: int, stream: IO[bytes]) -> None:
        """Store the body of an upload of the announced size and sha256; keep nothing of another one (`Refusal` 400)."""
        target = self.lfs_path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
        digest, received = hashlib.sha256(), 0
        try:
            with os.fdopen(handle, "wb") as file:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    received += len(chunk)
                    file.write(chunk)
            if received != size:
                raise Refusal(400, f"the body has {received} bytes, {size} were announced")
            if digest.hexdigest() != sha256:
                raise Refusal(400, f"the body has sha256 {digest.hexdigest()}, {sha256} was announced")
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
