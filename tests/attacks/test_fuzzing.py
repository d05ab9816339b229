"""Random damage with all digests made right: the answer is a verdict, whatever is read, and no lie is believed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
from hf_lipschitz.bounds.check import check_folder
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.weights import SINGLE, read_weights
from hf_lipschitz.verification import verify
from tests.attacks.forging import CONFIG, copied, honest_folder, rehash, sealed

_JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 7, 2**31, 2**53, 1e-320, 1e308, 0.5, -0.0),
    *("", "x", "0x1p+0", "inf", "nan", "0x1.fffffffffffffp+1023", "0x1p-1074", "l2", "\u0000", "a|abs"),
    *("\x1b[2J", "\ud800", "é", [], {}, [[]], [0], [1, 2, 3], {"a": 1}, ["tensor", "classifier.bias"], ["exp", 1e6]),
]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return honest_folder(tmp_path_factory.mktemp("honest") / "folder")


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return copied(honest, tmp_path / "folder")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _places(child, (*path, key))


def _damaged(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy with one place replaced, deleted, doubled or renamed; and what was done."""
    result = copy.deepcopy(value)
    path = rng.choice(list(_places(value)))
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.choice(["replace", "replace", "delete", "double", "rename"])
    if kind == "replace":
        parent[path[-1]] = copy.deepcopy(rng.choice(_JUNK))
    elif kind == "delete":
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[path[-1]]))
    elif kind == "double":
        parent[f"{path[-1]}2"] = copy.deepcopy(parent[path[-1]])
    else:
        parent[str(rng.choice(_JUNK[14:20]))] = parent.pop(path[-1])
    return result, f"{kind} {'/'.join(map(str, path))}"


def _check(folder: Path, what: str, honest_bound: float) -> None:
    report = check_folder(folder, BUILT_IN)
    if report.claims["bound"] == "ok":
        assert report.certificate is not None and report.derived is not None
        assert report.certificate.bound.value >= report.derived.bound.value, what
        assert report.certificate.bound.value >= honest_bound * (1.0 - 1e-6), what
    else:
        assert report.reasons and all(report.reasons), what
        assert all(reason.isprintable() for reason in report.reasons), what


def _certificates(folder: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    content = json.loads((folder / FILE_NAME).read_bytes())
    bound = Certificate.from_bytes((folder / FILE_NAME).read_bytes()).bound.value
    for _ in range(count):
        damaged, what = _damaged(content, rng)
        (folder / FILE_NAME).write_bytes(sealed(damaged))
        _check(folder, what, bound)


def test_certificates(folder: Path) -> None:
    _certificates(folder, 400, seed=0)


@pytest.mark.slow_ci
def test_many_certificates(folder: Path) -> None:
    _certificates(folder, 4000, seed=1)


def test_headers_of_weights(folder: Path) -> None:
    """Another header over the same data: refused, or the same tensors under other names."""
    rng = random.Random(0)
    data = (folder / SINGLE).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    reference = read_weights(folder)
    for _ in range(400):
        damaged, what = _damaged(header, rng)
        text = json.dumps(damaged).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
        try:
            found = read_weights(folder)
        except KernelError as error:
            assert str(error).isprintable(), what
        else:
            assert sum(array.nbytes for array in found.values()) == sum(a.nbytes for a in reference.values()), what


def test_configurations(folder: Path) -> None:
    """Whatever config.json says, the answer is a verdict; it is good only if the program is still the certified one."""
    rng = random.Random(0)
    original = (folder / CONFIG).read_text()
    content = json.loads(original)
    for _ in range(60):
        damaged, what = _damaged(content, rng)
        (folder / CONFIG).write_text(json.dumps(damaged))
        rehash(folder)
        verdict = verify(folder)
        assert verdict.ok or verdict.reasons, what
        assert all("\n" not in reason for reason in verdict.reasons), what
