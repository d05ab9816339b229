"""The published test vectors verify, or fail by the claim that expected.json names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_lipschitz.verification import verify

_VECTORS = Path(__file__).resolve().parents[2] / "docs" / "vectors"
_EXPECTED: dict[str, dict[str, str]] = json.loads((_VECTORS / "expected.json").read_text())


def test_every_folder_is_listed() -> None:
    assert {path.name for path in _VECTORS.iterdir() if path.is_dir()} == set(_EXPECTED)
    assert [name for name, claims in _EXPECTED.items() if set(claims.values()) == {"ok"}] == ["good"]
    assert all("failed" in claims.values() for name, claims in _EXPECTED.items() if name != "good")


@pytest.mark.parametrize("name", _EXPECTED)
def test_vector(name: str) -> None:
    verdict = verify(_VECTORS / name)
    assert verdict.claims == _EXPECTED[name]
    assert verdict.ok == (name == "good")
    assert bool(verdict.reasons) == (name != "good")
