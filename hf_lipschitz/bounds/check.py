"""Claims 1 and 3 of a checkpoint folder, re-derived from its files: digests, recomputation, one comparison.

Damage is found by digests; lies are found by recomputation, since anyone can rewrite a digest. The comparison is
``recomputed <= claimed``: a tighter rule never breaks an old certificate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import strict_json
from .certificate import FILE_NAME, Bound, Certificate
from .engine import ProgramBound, RoundingBound, bound_program, rounding_error
from .errors import KernelError
from .program import Program
from .rounding import UNIT_ROUNDOFF, Array, mul_up
from .rule import Geometry, Rule
from .spectral import NormBound
from .trust import require_sound_arithmetic
from .weights import Weights, read_weights

CONFIG = "config.json"
# Claims are written this much above what was computed, so that another BLAS, which rounds differently, can confirm
# them.
SLACK = 1.0 + 1e-9
CLAIMED_DTYPES = tuple(UNIT_ROUNDOFF)  # as far as a finite allowance exists: bfloat16 where the weights are exact in it


@dataclass(frozen=True)
class Derived:
    """What the kernel derives from a program and weights: the two bounds, the roundings and the norms used."""

    bound: Bound
    bound_features: Bound
    rounding: Mapping[str, RoundingBound]
    matrices: Mapping[str, NormBound]


@dataclass
class Report:
    """The outcome for one folder.

    ``claims`` maps ``bound`` and ``rounding`` to ``ok``, ``failed`` or ``not_checked``; ``reasons`` says why, one
    sentence each; ``notes`` lists what is worth knowing but no failure.
    """

    claims: dict[str, str] = field(default_factory=lambda: {"bound": "not_checked", "rounding": "not_checked"})
    reasons: list[str] = field(default_factory=list[str])
    certificate: Certificate | None = None
    derived: Derived | None = None
    weights: Weights | None = None

    def fail(self, claim: str, reason: str) -> None:
        """Record a failed claim."""
        self.claims[claim] = "failed"
        self.reasons.append(reason)


def derive(
    program: Program,
    weights: Mapping[str, Array],
    rules: Mapping[str, Rule],
    *,
    geometry: Geometry = "l2",
    witnesses: Mapping[str, float] | None = None,
    dtypes: tuple[str, ...] = CLAIMED_DTYPES,
) -> Derived:
    """Bound a program with weights and, in ``l2``, the rounding error of its forward pass for each dtype."""
    require_sound_arithmetic()
    computed = bound_program(program, weights, rules, geometry=geometry, witnesses=witnesses)
    rounding: dict[str, RoundingBound] = {}
    if geometry == "l2":
        rounding = {dtype: rounding_error(program, weights, rules, dtype, computed) for dtype in dtypes}
    matrices = computed.norms.bounds
    return Derived(_bound(program, computed, "logits"), _bound(program, computed, "features"), rounding, matrices)


def _bound(program: Program, computed: ProgramBound, output: str) -> Bound:
    origin = next((str(n.attrs["space"]) for n in program.nodes if "space" in n.attrs), "model_input")
    return Bound(computed.outputs[output].lipschitz, computed.geometry, origin, output)


def check_folder(folder: Path, rules: Mapping[str, Rule]) -> Report:
    """Check a folder's files, re-derive its bounds from its weights, and compare them with what its certificate claims.

    Args:
        folder: a checkpoint folder; nothing in it is executed, imported or unpickled.
        rules: the rule table that the verifier trusts.

    Returns:
        Report; claim ``program`` is not the kernel's business (verification.py).

    Raises:
        KernelError: only where this machine cannot verify at all (wrong BLAS products, flushed subnormals).
    """
    require_sound_arithmetic()
    report = Report()
    try:
        report.certificate = Certificate.from_bytes(strict_json.read_bytes(folder / FILE_NAME))
        report.weights = read_weights(folder)
        _check_digests(folder, report.certificate, report.weights)
        compare(report, report.certificate, report.weights, rules)
    except KernelError as error:
        report.fail("bound", str(error))
    return report


def _check_digests(folder: Path, certificate: Certificate, weights: Weights) -> None:
    actual = {**weights.digests, CONFIG: strict_json.sha256(strict_json.read_bytes(folder / CONFIG))}
    for name in sorted(set(actual) | set(certificate.files)):
        if name not in certificate.files:
            raise KernelError(f"{name}: the certificate does not cover this file")
        if name not in actual:
            raise KernelError(f"{name}: named in the certificate's digests but not read as weights or configuration")
        if actual[name] != certificate.files[name]:
            raise KernelError(
                f"{name}: its SHA-256 is not the certificate's; this certificate is of other weights or config"
            )


def compare(report: Report, certificate: Certificate, weights: Mapping[str, Array], rules: Mapping[str, Rule]) -> None:
    """Re-derive what a certificate claims of weights and record in the report what is less than it takes."""
    geometry: Geometry = "l2" if certificate.bound.norm == "l2" else "token_max"
    derived = derive(
        certificate.program,
        weights,
        rules,
        geometry=geometry,
        witnesses=certificate.witnesses(),
        dtypes=tuple(d for d in UNIT_ROUNDOFF if d in certificate.rounding),
    )
    report.derived, report.claims["bound"] = derived, "ok"
    for mine, theirs in ((derived.bound, certificate.bound), (derived.bound_features, certificate.bound_features)):
        if (mine.norm, mine.origin, mine.to) != (theirs.norm, theirs.origin, theirs.to):
            stated = f"{theirs.norm} from {theirs.origin!r}"
            report.fail("bound", f"the bound to {theirs.to} speaks of {stated}, the program does not")
        elif not mine.value <= theirs.value:
            report.fail(
                "bound",
                f"the bound to {theirs.to} is {mine.value!r} from the weights, above the claimed {theirs.value!r}",
            )
    if certificate.rounding:
        report.claims["rounding"] = "ok"
    for dtype, theirs in certificate.rounding.items():
        mine = derived.rounding.get(dtype)
        if mine is None or not (
            mine.features_error <= theirs.features_error
            and mine.features_norm <= theirs.features_norm
            and mine.logits_error <= theirs.logits_error
        ):
            report.fail("rounding", f"the rounding allowance for {dtype} is smaller than what the program needs")
    for label in sorted({*derived.matrices, *certificate.matrices}):
        mine, stated = derived.matrices.get(label), certificate.matrices.get(label)
        if mine is None or stated is None:
            report.fail("bound", f"matrix {label!r}: a norm is stated for it that is not used, or used but not stated")
        elif not mine.value <= mul_up(stated.value, SLACK):
            report.fail("bound", f"matrix {label!r}: its norm is {mine.value!r}, above the stated {stated.value!r}")
