"""`verify`: the exit status is the answer, and what is printed says which claims it rests on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Call, flip_a_bit

CERTIFICATE = "lipschitz_certificate.json"
KEYS = {
    *("ok", "claims", "reasons", "notes", "bound", "bound_features", "source", "commit"),
    *("trust_base", "foreign_rules", "require", "exit_status"),
}


def _flip(name: str, position: int) -> Callable[[Path], None]:
    return lambda folder: flip_a_bit(folder / name, position)


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def _add_code(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit(0)\n")


def _normalise(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_normalize": True}))


# What is done to the folder, the options, and a word of the reason.
WRONG: list[tuple[Callable[[Path], object], list[str], str]] = [
    (_flip("model.safetensors", -1), [], "model.safetensors"),
    (_flip("model.safetensors", -1), ["--require", "bound"], "model.safetensors"),
    (_flip("config.json", 5), ["--require", "bound"], "config.json"),
    (_flip(CERTIFICATE, 40), ["--require", "bound"], CERTIFICATE),
    (lambda folder: (folder / CERTIFICATE).unlink(), ["--require", "bound"], CERTIFICATE),
    (lambda folder: (folder / "model.safetensors").unlink(), ["--require", "bound"], "model.safetensors"),
    (_truncate, ["--require", "bound"], "model.safetensors"),
    (_add_code, ["--require", "bound"], "modeling.py"),
    (_normalise, [], "normalise"),
    (lambda folder: None, ["--require", "bound", "--max-bound", "0.5"], "0.5"),
    (lambda folder: None, ["--require", "bound", "--norm", "token_max"], "token_max"),
    (lambda folder: None, ["--require", "bound", "--from", "embeddings"], "embeddings"),
    (lambda folder: None, ["--require", "bound", "--sha256", "0" * 64], "SHA-256"),
]


@pytest.mark.parametrize(("spoil", "options", "says"), WRONG)
def test_wrong_content_is_status_1(
    call: Call, folder: Path, spoil: Callable[[Path], object], options: list[str], says: str
) -> None:
    spoil(folder)
    text = call("verify", folder, *options)
    assert text.status == 1
    assert text.out.startswith("NOT VERIFIED")
    assert any(says in line for line in text.out.splitlines() if line.startswith("  failed: "))
    value = call("verify", folder, *options, "--json").value
    assert (value["ok"], value["exit_status"]) == (False, 1)
    assert any(says in reason for reason in value["reasons"])


def test_a_good_folder(call: Call, made: Path) -> None:
    ran = call("verify", made)
    assert ran.status == 0 and not ran.err
    first, *rest = ran.out.splitlines()
    assert first == f"verified: {made}"
    assert sum(" ok " in line for line in rest) == 3
    assert "claim 1 only" not in ran.out
    assert "in l2 from pixels[0,1] to logits" in ran.out
    assert "numpy" in ran.out and "blas" in ran.out and "foreign rules: none" in ran.out


@pytest.mark.parametrize(("require", "program"), [("program", "ok"), ("bound", "not_checked")])
def test_json(call: Call, made: Path, require: str, program: str) -> None:
    ran = call("verify", made, "--json", "--require", require)
    value = ran.value
    assert set(value) == KEYS
    assert (ran.status, value["ok"], value["exit_status"], value["require"]) == (0, True, 0, require)
    assert value["claims"] == {"bound": "ok", "program": program, "rounding": "ok"}
    assert float.fromhex(value["bound"]["value"]) > 0.0


def test_the_kernel_alone_says_so(call: Call, made: Path) -> None:
    ran = call("verify", made, "--require", "bound")
    assert ran.status == 0
    assert "claim 1 only" in ran.out
    assert [line.split()[:3] for line in ran.out.splitlines() if line.startswith("  program")] == [
        ["program", "not", "checked"]
    ]


def test_pins_that_hold(call: Call, made: Path) -> None:
    digest = hashlib.sha256((made / CERTIFICATE).read_bytes()).hexdigest()
    pins = ["--max-bound", "10", "--norm", "l2", "--from", "pixels[0,1]", "--sha256", digest]
    assert call("verify", made, "--require", "bound", *pins).status == 0


def test_a_certificate_of_other_weights(call: Call, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    flip_a_bit(other / "model.safetensors", -3)
    assert call("certify", other).status == 0
    assert call("verify", other, "--require", "bound").status == 0
    shutil.copy(other / CERTIFICATE, folder / CERTIFICATE)
    ran = call("verify", folder, "--require", "bound")
    assert ran.status == 1 and "other weights" in ran.out
