"""Tampered folders: none verifies, and each is refused by the claim that it breaks.

An attacker may write any bytes and recompute every digest. Damage is found by digests, lies by recomputation (claims
``bound`` and ``rounding``) or by rebuilding the program (claim ``program``); what redirects a loader, by its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lipschitz.certify import write_certificate
from hf_lipschitz.models.certified_model import CertifiedModel
from hf_lipschitz.verification import verify
from tests.attacks.attacks_files import FILES, HARMLESS
from tests.attacks.attacks_lies import LIES
from tests.attacks.forging import Attack, copied, edit_config, honest_folder, written

ATTACKS = (*LIES, *FILES)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return honest_folder(tmp_path_factory.mktemp("honest") / "folder")


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return copied(honest, tmp_path / "folder")


def test_the_honest_folder_verifies(honest: Path) -> None:
    verdict = verify(honest)
    assert verdict.ok and verdict.exit_status == 0
    assert verdict.claims == {"bound": "ok", "program": "ok", "rounding": "ok"} and not verdict.reasons


def test_attacks_have_different_names() -> None:
    assert len({name for name, *_ in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize(("attack", "claim", "message"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS])
def test_attack(folder: Path, attack: Attack, claim: str, message: str) -> None:
    attack(folder)
    verdict = verify(folder)
    assert not verdict.ok and verdict.exit_status == 1
    assert verdict.claims[claim] == "failed", verdict.reasons
    assert any(_found(message, reason) for reason in verdict.reasons), verdict.reasons
    assert all(reason and "\n" not in reason for reason in verdict.reasons)
    if claim == "program":
        assert verdict.claims["bound"] == "ok", verdict.reasons


def _found(message: str, reason: str) -> bool:
    return re.search(message, reason, flags=re.DOTALL) is not None


# What changes nothing, or only weakens what is claimed


@pytest.mark.parametrize("change", [row[1] for row in HARMLESS], ids=[row[0] for row in HARMLESS])
def test_what_is_still_true_verifies(folder: Path, change: Attack) -> None:
    change(folder)
    verdict = verify(folder)
    assert verdict.ok, verdict.reasons


def test_training_state_is_mentioned(folder: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth"):
        written(name)(folder)
    verdict = verify(folder)
    assert verdict.ok and len(verdict.notes) == 3 and all("training state" in note for note in verdict.notes)


def test_a_model_that_loads_other_tensors_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the outputs agree: a bias moved by less than the agreement that execution asks for."""
    original = CertifiedModel.from_pretrained.__func__

    def loads_another(cls: type, *args: Any, **kwargs: Any) -> Any:
        model, info = original(cls, *args, **kwargs)
        with torch.no_grad():
            model.classifier.bias[0] += 1e-14
        return model, info

    monkeypatch.setattr(CertifiedModel, "from_pretrained", classmethod(loads_another))
    verdict = verify(folder)
    assert verdict.claims["program"] == "failed"
    assert "loads another tensor 'classifier.bias'" in verdict.reasons[0]


def test_certifying_again_mends_what_is_honest(folder: Path) -> None:
    edit_config(folder, pool_eps=1e-3)
    assert not verify(folder).ok
    write_certificate(folder)
    assert verify(folder).ok
