"""JSON as certificates use it: read strictly, written in one canonical form.

Strict reading refuses what two readers could understand differently (duplicate keys, NaN and Infinity literals, other
encodings than UTF-8) and what could exhaust a reader (size, depth).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import KernelError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64


def parse(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON bytes; ``where`` names the file in errors.

    Raises:
        KernelError: not JSON, not UTF-8, duplicate keys, NaN or Infinity, over 64 MiB or nested deeper than 64.
    """
    if len(data) > MAX_BYTES:
        raise KernelError(f"{where}: {len(data)} bytes of JSON exceed the limit of {MAX_BYTES}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except KernelError as error:
        raise KernelError(f"{where}: {error}") from None
    except RecursionError:
        raise KernelError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise KernelError(f"{where}: not valid JSON ({error})") from None
    _check_depth(value, where)
    return value


def canonical(value: Any) -> bytes:
    """The one serialisation of a JSON value: sorted keys, two-space indent, ASCII, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def sha256(data: bytes) -> str:
    """The hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a plain file (no symbolic link) of at most ``limit`` bytes; KernelError otherwise."""
    if path.is_symlink() or not path.is_file():
        raise KernelError(f"{path.name}: missing, or not a plain file, in {path.parent.name or '.'}")
    if path.stat().st_size > limit:
        raise KernelError(f"{path.name}: {path.stat().st_size} bytes exceed the limit of {limit}")
    return path.read_bytes()


def fields(value: Any, expected: tuple[str, ...], where: str) -> dict[str, Any]:
    """Check that ``value`` is an object with exactly the expected keys and return it; KernelError names the difference."""
    if not isinstance(value, dict):
        raise KernelError(f"{where}: expected an object with the keys {', '.join(expected)}")
    for key in value:
        if key not in expected:
            raise KernelError(f"{where}: unknown key {key!r}; known: {', '.join(expected)}")
    for key in expected:
        if key not in value:
            raise KernelError(f"{where}: the key {key!r} is missing")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KernelError(f"the key {key!r} stands twice in one object")
        result[key] = value
    return result


def _no_constants(name: str) -> Any:
    raise KernelError(f"{name} is not a JSON number")


def _check_depth(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise KernelError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
