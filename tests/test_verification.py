"""verify: pins, what is required, what it rests on, and what it needs to be installed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_lipschitz import trust_base, verification
from hf_lipschitz.bounds import check, trust
from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rule import Call, Rule
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.strict_json import sha256
from hf_lipschitz.errors import UserError
from hf_lipschitz.verification import verify
from tests.architecture import process
from tests.attacks.forging import flip, honest_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return honest_folder(tmp_path_factory.mktemp("honest") / "folder")


def _stated(folder: Path) -> Certificate:
    return Certificate.from_bytes((folder / FILE_NAME).read_bytes())


def test_verdict(folder: Path) -> None:
    verdict = verify(str(folder))
    assert verdict and verdict.ok and verdict.exit_status == 0
    assert verdict.certificate == _stated(folder)
    assert (verdict.source, verdict.commit, verdict.foreign_rules, verdict.notes) == (str(folder), None, (), ())
    assert {"numpy", "blas", "processor", "flush_to_zero", "matrix_product_self_test"} <= set(verdict.trust_base)
    text = json.loads(json.dumps(verdict.to_json()))
    assert text["ok"] is True and text["claims"] == {"bound": "ok", "program": "ok", "rounding": "ok"}
    assert text["bound"] == _stated(folder).bound.to_json()


def test_a_bad_folder_is_no_exception(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    verdict = verify(tmp_path / "empty")
    assert not verdict and verdict.exit_status == 1 and verdict.certificate is None
    assert verdict.claims == {"bound": "failed", "program": "not_checked", "rounding": "not_checked"}
    assert verdict.to_json()["bound"] is None and verdict.to_json()["reasons"]


def test_pins_that_hold(folder: Path) -> None:
    stated = _stated(folder).bound.value
    digest = sha256((folder / FILE_NAME).read_bytes())
    for pins in (
        {"max_bound": stated},
        {"max_bound": float("inf"), "norm": "l2", "origin": "pixels[0,1]"},
        {"sha256": digest},
        {"sha256": digest.upper()},
    ):
        assert verify(folder, require="bound", **pins).ok


_PINS: list[tuple[dict[str, Any], str]] = [
    ({"max_bound": 0.5}, "states a bound of .* to the logits, above the pinned 0.5"),
    ({"norm": "token_max"}, "speaks of the norm 'l2', the pin of 'token_max'"),
    ({"origin": "model_input"}, r"speaks of inputs in 'pixels\[0,1\]', the pin of 'model_input'"),
    ({"sha256": "0" * 64}, "the certificate file is not the pinned one"),
]


@pytest.mark.parametrize(("pins", "message"), _PINS, ids=[str(row[0]) for row in _PINS])
def test_pins_that_do_not(folder: Path, pins: dict[str, Any], message: str) -> None:
    for require in ("bound", "program"):
        verdict = verify(folder, require=require, **pins)
        assert not verdict.ok and verdict.claims["bound"] == "failed"
        assert any(re.search(message, reason) for reason in verdict.reasons)


def test_the_bound_alone_says_nothing_of_the_program(folder: Path) -> None:
    verdict = verify(folder, require="bound")
    assert verdict.ok and verdict.claims == {"bound": "ok", "program": "not_checked", "rounding": "ok"}
    assert "claim 1 only" in str(verdict)


def test_usage_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="require is 'everything': choose 'bound'"):
        verify(folder, require="everything")
    for pin in ({"max_bound": float("nan")}, {"max_bound": -1.0}, {"sha256": ""}, {"sha256": "xyz"}):
        with pytest.raises(UserError, match="pin "):
            verify(folder, require="bound", **pin)
    with pytest.raises(UserError, match="is not a folder: give a checkpoint folder or org/name@revision"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere' is not a folder"):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no installed distribution 'acme' offers rules"):
        verify(folder, trust=("acme",))


# A machine that cannot verify says so instead of giving a verdict.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("products_are_exact", False, "BLAS computes wrong matrix products"),
        ("flushes_to_zero", True, "flushes subnormal"),
    ],
)
def test_machines_that_cannot_verify(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: bool, message: str
) -> None:
    monkeypatch.setattr(trust, name, lambda: value)
    with pytest.raises(KernelError, match=message):
        verify(folder)


def test_the_self_test_of_products_finds_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.products_are_exact() and not trust.flushes_to_zero()
    monkeypatch.setattr(trust.np, "array_equal", lambda a, b: False)
    assert not trust.products_are_exact.__wrapped__()


# Third-party rules


class _Louder(Rule):
    op = "acme::louder@1"
    source = "none"

    def gains(self, call: Call, geometry: Any) -> tuple[float, ...]:
        return (1.0,)


def _offered(monkeypatch: pytest.MonkeyPatch, rules: tuple[Rule, ...]) -> list[str]:
    """Let the distribution ``acme`` offer rules; the list says when they are loaded."""
    loaded: list[str] = []

    def load() -> tuple[Rule, ...]:
        loaded.append("acme")
        return rules

    point = SimpleNamespace(dist=SimpleNamespace(name="acme"), load=load)
    monkeypatch.setattr(trust_base, "entry_points", lambda group: [point] if group == "hf_lipschitz.rules" else [])
    return loaded


def test_foreign_rules_are_loaded_only_if_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _offered(monkeypatch, (_Louder(),))
    assert verify(folder, require="bound").ok and loaded == []
    verdict = verify(folder, require="bound", trust=("acme",))
    assert verdict.ok and verdict.foreign_rules == ("acme::louder@1",) and loaded == ["acme"]
    assert "foreign rules: acme::louder@1" in str(verdict)


@pytest.mark.parametrize("op", ["linear@1", "louder@1", "acme::louder"])
def test_foreign_rules_cannot_take_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    _offered(monkeypatch, (type("_Named", (_Louder,), {"op": op})(),))
    with pytest.raises(KernelError, match="a third-party rule is named"):
        verify(folder, require="bound", trust=("acme",))
    assert type(BUILT_IN["linear@1"]).__module__ == "hf_lipschitz.bounds.rules.affine"


def test_only_the_entry_points_of_this_package_are_asked() -> None:
    assert trust_base.entry_points is importlib.metadata.entry_points


# What the kernel-only mode needs

_ALONE = """
from hf_lipschitz import verify
verdict = verify({folder!r}, require={require!r})
print(verdict.ok, sorted(verdict.claims.items()))
"""


def _alone(folder: Path, require: str) -> subprocess.CompletedProcess[str]:
    """verify in a process that can import NumPy and this package, and nothing else that is not Python's own."""
    return process.run(_ALONE.format(folder=str(folder), require=require), ["numpy", "hf_lipschitz"])


def test_numpy_is_enough_for_the_bound(folder: Path, tmp_path: Path) -> None:
    run = _alone(folder, "bound")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(" ", 1)[0] == "True" and "('program', 'not_checked')" in run.stdout
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in folder.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    flip(bad / "model.safetensors", 8 * (bad / "model.safetensors").stat().st_size - 7)
    run = _alone(bad, "bound")
    assert run.stdout.split(" ", 1)[0] == "False", run.stderr


def test_the_program_needs_torch(folder: Path) -> None:
    run = _alone(folder, "program")
    assert run.returncode == 1
    assert "torch and transformers are needed to check the claim 'program': pip install them" in run.stderr


def test_claims_are_compared_the_right_way_round(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tighter rule of a later release confirms an old certificate; a looser one (a repaired bug) rightly does not."""
    rule = BUILT_IN["l2_pool@1"]

    def scaled(factor: float) -> dict[str, Rule]:
        class Scaled(type(rule)):  # type: ignore[misc]
            def gains(self, call: Call, geometry: Any) -> tuple[float, ...]:
                return tuple(factor * gain for gain in super().gains(call, geometry))

        return {**BUILT_IN, rule.op: Scaled()}

    assert check.check_folder(folder, scaled(0.9)).claims["bound"] == "ok"
    assert check.check_folder(folder, scaled(1.001)).claims["bound"] == "failed"
    assert verification.AGREEMENT <= 1e-9


def test_the_bound_is_verified_where_imports_are_blocked(folder: Path) -> None:
    """A blocked import is a None in sys.modules, not an absent key; the trust base must not stumble over it."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'safetensors', 'huggingface_hub')));"
        f"from hf_lipschitz.verification import verify; verdict = verify({str(folder)!r}, require='bound');"
        "assert verdict.ok and 'torch' not in verdict.trust_base, str(verdict)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("file", "keep", "advice"),
    [(FILE_NAME, 0, "hf-lipschitz certify"), ("model.safetensors", 300, "fetch or save the file again")],
)
def test_a_reason_says_what_to_do(folder: Path, tmp_path: Path, file: str, keep: int, advice: str) -> None:
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    data = (folder / file).read_bytes()[:keep]
    (spoilt / file).unlink()
    if data:
        (spoilt / file).write_bytes(data)
    assert advice in verify(spoilt, require="bound").reasons[0]
