"""JSON as certificates use it: read strictly, written in one canonical form.

Strict reading refuses what two readers could understand differently (duplicate keys, NaN and Infinity literals, numbers
that no float64 holds, other encodings than UTF-8) and what could exhaust a reader (size, depth).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, cast

from .errors import KernelError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64


def parse(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON bytes; ``where`` names the file in errors.

    Raises:
        KernelError: not JSON, not UTF-8, duplicate keys, NaN or Infinity, a number out of range, over 64 MiB or nested
            deeper than 64.
    """
    if len(data) > MAX_BYTES:
        raise KernelError(f"{where}: {len(data)} bytes of JSON exceed the limit of {MAX_BYTES}")
    try:
        hooks: dict[str, Any] = {"parse_int": _number, "parse_float": _number, "parse_constant": _number}
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, **hooks)
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
        raise KernelError(f"{path.name}: missing from {path.parent.name or '.'}, or not a plain file")
    if path.stat().st_size > limit:
        raise KernelError(f"{path.name}: {path.stat().st_size} bytes exceed the limit of {limit}")
    return path.read_bytes()


def object_of(value: Any, where: str) -> dict[str, Any]:
    """The value, if it is a JSON object; KernelError otherwise."""
    if not isinstance(value, dict):
        raise KernelError(f"{where}: expected an object, got {str(value)[:40]!r}")
    return cast("dict[str, Any]", value)


def list_of(value: Any, where: str) -> list[Any]:
    """The value, if it is a JSON array; KernelError otherwise."""
    if not isinstance(value, list):
        raise KernelError(f"{where}: expected a list, got {str(value)[:40]!r}")
    return cast("list[Any]", value)


def strings_of(value: Any, where: str) -> dict[str, str]:
    """The value, if it is a JSON object of strings; KernelError otherwise."""
    if any(not isinstance(item, str) for item in object_of(value, where).values()):
        raise KernelError(f"{where}: every value must be a string")
    return cast("dict[str, str]", value)


def integers_of(value: Any, where: str, least: int, most: int) -> list[int]:
    """The value, if it is a JSON array of integers in a range; KernelError otherwise."""
    if any(type(item) is not int or not least <= item <= most for item in list_of(value, where)):
        raise KernelError(f"{where}: expected integers from {least} to {most}, got {str(value)[:40]}")
    return cast("list[int]", value)


def fields(value: Any, expected: tuple[str, ...], where: str) -> dict[str, Any]:
    """The value, if it is a JSON object with exactly the expected keys; KernelError names the difference."""
    found = object_of(value, where)
    for key in found:
        if key not in expected:
            raise KernelError(f"{where}: unknown key {key!r}; known: {', '.join(expected)}")
    for key in expected:
        if key not in found:
            raise KernelError(f"{where}: the key {key!r} is missing")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KernelError(f"the key {key!r} stands twice in one object")
        result[key] = value
    return result


def _number(text: str) -> float | int:
    value = int(text) if text.lstrip("-").isdigit() else float(text)
    if not abs(value) < (2**53 + 1 if isinstance(value, int) else math.inf):
        raise KernelError(f"{text[:40]} is not a number that every reader holds")
    return value


def _check_depth(value: Any, where: str, depth: int = 1) -> None:
    if depth > MAX_DEPTH:
        raise KernelError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    children = cast("dict[str, Any]", value).values() if isinstance(value, dict) else value
    for child in cast("list[Any]", children) if isinstance(value, dict | list) else ():
        _check_depth(child, where, depth + 1)
