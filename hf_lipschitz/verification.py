"""``verify``: is a checkpoint what its certificate says? Three claims, each ``ok``, ``failed`` or ``not_checked``.

* ``bound``: the kernel re-derives the bound from the weights and the program, and finds at most what is claimed.
* ``program``: the program is rebuilt from the class and the config and is equal; program and model are both executed
  in float64 on random images and agree. Tested, not proved.
* ``rounding``: the allowances for floating-point forwards are at least what the program needs.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_lipschitz.bounds import strict_json
from hf_lipschitz.bounds.certificate import FILE_NAME, Certificate
from hf_lipschitz.bounds.check import Report, check_folder
from hf_lipschitz.bounds.engine import evaluate_program
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rule import Rule
from hf_lipschitz.bounds.weights import Weights
from hf_lipschitz.checkpoint_folder import findings
from hf_lipschitz.configuration_check import CONFIGURATIONS, check_dtype, check_processor, redirections
from hf_lipschitz.errors import UserError
from hf_lipschitz.remote_code import REMOTE_FILE_NAME, check_remote_file
from hf_lipschitz.trust_base import trust_base, trusted_rules
from hf_lipschitz.verdict import CLAIMS, Verdict

# A part of what the kernel says -> what its reader can do.
_ADVICE = {
    f"{FILE_NAME}: missing": "certify the folder with hf-lipschitz certify, or fetch all of it again",
    "truncated": "fetch or save the file again",
    "NaN or infinite": "the training has diverged, go back to an earlier checkpoint",
    "its SHA-256 is not": "fetch the folder again, or certify it anew with hf-lipschitz certify",
    "above the claimed": "do not rely on this certificate, certify the folder yourself with hf-lipschitz certify",
    "above the stated": "do not rely on this certificate, certify the folder yourself with hf-lipschitz certify",
    "rounding allowance": "certify the folder yourself with hf-lipschitz certify",
}
MAX_ENTRIES = 2**22  # of the images that program and model are executed on
AGREEMENT = 1e-9  # largest difference of executed program and model, relative to the largest feature or logit


@dataclass
class _State:
    """What a verification collects on its way."""

    claims: dict[str, str] = field(default_factory=lambda: dict.fromkeys(CLAIMS, "not_checked"))
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, claim: str, reason: str) -> None:
        self.claims[claim] = "failed"
        self.reasons.append(reason)


def verify(
    source: str | Path,
    *,
    require: str = "program",
    trust: tuple[str, ...] = (),
    endpoint: str | None = None,
    token: str | None = None,
    max_bound: float | None = None,
    norm: str | None = None,
    origin: str | None = None,
    sha256: str | None = None,
) -> Verdict:
    """Verify a checkpoint folder or a repository at one commit.

    Args:
        source: a folder, ``org/name`` or ``org/name@revision``.
        require: ``bound`` (kernel only: NumPy, no torch, no model code) or ``program`` (all claims).
        trust: distributions whose rules (entry-point group ``hf_lipschitz.rules``) may be used.
        endpoint, token: of the Hub to fetch from.
        max_bound, norm, origin, sha256: pins, what the certificate must state whoever wrote it: the largest bound to
            the logits, the norm, the space of the input (``pixels[0,1]``), the SHA-256 of the certificate file.

    Returns:
        Verdict; anything wrong with the content is in it, never raised.

    Raises:
        UserError: the folder or repository cannot be read at all (missing, no network), or a package is missing.
        KernelError: this machine cannot verify (wrong BLAS products, flushed subnormals).

    Source: docs/certificate_format.md.
    """
    _check_usage(require, max_bound, sha256)
    rules, foreign = trusted_rules(trust)
    folder, commit = _locate(source, endpoint, token)
    state = _State()
    report = check_folder(folder, rules)
    state.claims.update(report.claims)
    state.reasons.extend(_with_advice(reason) for reason in report.reasons)
    _check_listing(folder, report, state)
    if report.certificate is not None:
        _check_pins(folder, report.certificate, state, max_bound, norm, origin, sha256)
    if require == "program" and state.claims["bound"] == "ok":
        _check_program(folder, report, rules, state)
    required = _required(require, report.certificate, state)
    return Verdict(
        state.claims,
        tuple(state.reasons),
        tuple(state.notes),
        report.certificate,
        str(source),
        commit,
        trust_base(),
        foreign,
        required,
    )


def _required(require: str, certificate: Certificate | None, state: _State) -> tuple[str, ...]:
    """The claims that must hold; rounding is none where nothing can be said of it."""
    required = CLAIMS if require == "program" else ("bound", "rounding")
    if certificate is None:
        return required
    unbounded = not certificate.rounding and certificate.bound.origin != "pixels[0,1]"
    if certificate.bound.norm == "l2" and not certificate.rounding and not unbounded:
        state.fail("rounding", "the certificate states no rounding allowance for any dtype")
    elif certificate.bound.norm == "l2" and unbounded:
        state.notes.append(
            "inputs may be of any size, so nothing is claimed of rounding: the bound is exact arithmetic's"
        )
    if unbounded or certificate.bound.norm != "l2":  # the allowances are in l2
        return tuple(claim for claim in required if claim != "rounding")
    return required


def _with_advice(reason: str) -> str:
    """A reason of the kernel, which says what is wrong and where, with what to do about it."""
    return next((f"{reason}: {advice}" for found, advice in _ADVICE.items() if found in reason), reason)


def _check_usage(require: str, max_bound: float | None, sha256: str | None) -> None:
    if require not in ("bound", "program"):
        raise UserError(f"require is {require!r}: choose 'bound' (kernel only) or 'program'")
    if max_bound is not None and not max_bound > 0.0:
        raise UserError(f"max_bound is {max_bound!r}: pin a positive number")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError(f"sha256 is {sha256!r}: pin the 64 hexadecimal digits of the certificate file's SHA-256")


def _locate(source: str | Path, endpoint: str | None, token: str | None) -> tuple[Path, str | None]:
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser(), None
    if isinstance(source, Path):
        raise UserError(f"{source} is not a folder: give a checkpoint folder or org/name@revision")
    from hf_lipschitz.hub import fetch

    fetched = fetch(source, endpoint=endpoint, token=token)
    return Path(fetched.path), fetched.commit


def _check_listing(folder: Path, report: Report, state: _State) -> None:
    """Files that a loader might read instead of, or on top of, what was checked; only the thin file is opened."""
    refused, notes = findings(folder)
    state.notes.extend(notes)
    covered = report.certificate.files if report.certificate else {}
    for name in sorted(path.name for path in folder.glob("*.safetensors*")):
        if covered and name not in covered:
            refused.append(f"{name}: weights that the certificate does not cover; remove them")
    for name in CONFIGURATIONS:
        refused.extend(redirections(folder / name))
    for path in sorted(folder.rglob(REMOTE_FILE_NAME)):
        if path.is_file() and not path.is_symlink() and not check_remote_file(path.read_bytes()):
            refused.append(f"{path.relative_to(folder)}: not one of the published texts; it was not run")
    for reason in refused:
        state.fail("bound", reason)


def _check_pins(
    folder: Path,
    certificate: Certificate,
    state: _State,
    max_bound: float | None,
    norm: str | None,
    origin: str | None,
    sha256: str | None,
) -> None:
    bound = certificate.bound
    if max_bound is not None and not bound.value <= max_bound:
        state.fail(
            "bound", f"the certificate states a bound of {bound.value!r} to the logits, above the pinned {max_bound!r}"
        )
    if norm is not None and bound.norm != norm:
        state.fail("bound", f"the certificate speaks of the norm {bound.norm!r}, the pin of {norm!r}")
    if origin is not None and bound.origin != origin:
        state.fail("bound", f"the certificate speaks of inputs in {bound.origin!r}, the pin of {origin!r}")
    if sha256 is not None and strict_json.sha256(certificate.to_bytes()) != sha256.lower():
        state.fail("bound", "the certificate file is not the pinned one: its SHA-256 differs")


def _check_program(folder: Path, report: Report, rules: dict[str, Rule], state: _State) -> None:
    """Rebuild the program from class and config, then execute it and the model on random images."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            "torch and transformers are needed to check the claim 'program': pip install them, or use --require bound"
        ) from None
    from hf_lipschitz.certify import foreign_model, program_of_folder

    certificate, weights = report.certificate, report.weights
    assert certificate is not None and weights is not None
    try:
        foreign = foreign_model(folder)
        if foreign is not None:
            _check_foreign(foreign, certificate, weights, state)
            return
        check_processor(folder)
        check_dtype(folder / "config.json", weights.dtypes)
        _check_equal(program_of_folder(folder), certificate)
        shape = tuple(certificate.program.nodes[0].attrs["shape"])
        if math.prod(shape) > MAX_ENTRIES:
            raise KernelError(f"not executed: an input of shape {shape} is larger than {MAX_ENTRIES} entries")
        images = np.random.default_rng().random((min(4, MAX_ENTRIES // math.prod(shape)), *shape))
        executed = evaluate_program(certificate.program, weights, rules, images)
        for output, value in _model_outputs(folder, images, weights).items():
            scale = max(1.0, float(np.max(np.abs(executed[output]))))
            distance = float(np.max(np.abs(value - executed[output]))) / scale
            if not distance <= AGREEMENT:
                raise KernelError(
                    f"the model's {output} differ from the executed program's by {distance:.3g} relatively"
                )
    except (KernelError, UserError) as error:
        state.fail("program", str(error))
    except Exception as error:  # whatever transformers and torch raise at what the folder's author wrote
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        state.fail("program", f"the model cannot be rebuilt from this folder ({reason})")
    else:
        state.claims["program"] = "ok"
        if certificate.program.outputs["features"] == certificate.program.outputs["logits"]:
            state.notes.append("a model without head: a class with one adds weights that nothing here covers")


def _check_foreign(model: Any, certificate: Certificate, weights: Weights, state: _State) -> None:
    """Trace another library's model again, with these weights, which also executes it beside the traced program."""
    from hf_lipschitz.foreign import example, load_exactly
    from hf_lipschitz.lowering.lower import lower

    stated = certificate.program.nodes[0].attrs
    load_exactly(model, weights)
    _check_equal(lower(model, example(stated["shape"]), space=stated["space"]), certificate)
    state.claims["program"] = "ok"
    kind = type(model)
    state.notes.append(
        f"the program was traced from {kind.__module__}.{kind.__qualname__} as installed here, for inputs of shape "
        f"{tuple(stated['shape'])}; what processes images before it is not covered"
    )


def _check_equal(rebuilt: Program, certificate: Certificate) -> None:
    if rebuilt.canonical_bytes() != certificate.program.canonical_bytes():
        raise KernelError(
            f"the program is not the one that the class and config.json give: {_difference(rebuilt, certificate)}"
        )


def _model_outputs(folder: Path, images: np.ndarray, weights: Weights) -> dict[str, np.ndarray]:
    """Float64 features and logits of the class that config.json names, if it loads exactly the kernel's weights."""
    import torch
    from transformers import AutoConfig

    from hf_lipschitz.certify import model_class

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = model_class(config)
    loaded: Any = kind.from_pretrained(
        folder,
        config=config,
        dtype=torch.float64,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, info = loaded
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise KernelError(f"the model class does not load exactly these weights: {wrong}")
    for name, tensor in model.state_dict().items():
        if name not in weights or not np.array_equal(tensor.numpy(), weights[name]):
            raise KernelError(f"the model class loads another tensor {name!r} than the one that was bounded")
    with torch.no_grad():
        pixels = torch.from_numpy(images)
        if model.base_model is model:
            features = model(pixels).pooler_output.numpy()
            return {"features": features, "logits": features}
        return {"features": model.base_model(pixels).pooler_output.numpy(), "logits": model(pixels).logits.numpy()}


def _difference(rebuilt: Any, certificate: Certificate) -> str:
    """The first place where two programs differ, for the error message."""
    mine, theirs = rebuilt.canonical().nodes, certificate.program.nodes
    for index, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a.to_json() != b.to_json():
            return f"node {index} is {json.dumps(b.to_json())}, expected {json.dumps(a.to_json())}"
    return f"it has {len(theirs)} nodes and outputs {dict(certificate.program.outputs)}, expected {len(mine)} nodes"
