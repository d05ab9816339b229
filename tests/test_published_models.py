"""Every checkpoint in model_cards/ verifies, and its card states the bound of its certificate."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_lipschitz.model_card import rounded_up
from hf_lipschitz.verification import verify

_FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/config.json"))


def test_there_is_one() -> None:
    assert _FOLDERS


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda path: path.name)
def test_a_published_model_verifies(folder: Path) -> None:
    verdict = verify(folder)
    assert verdict.ok, str(verdict)
    assert verdict.certificate is not None
    assert rounded_up(verdict.certificate.bound.value, 10) in (folder / "README.md").read_text()
