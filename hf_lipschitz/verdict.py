"""The outcome of a verification. What it prints is part of the guarantee, so it is plain and complete."""

from __future__ import annotations

import decimal
from dataclasses import dataclass
from typing import Any

from hf_lipschitz.bounds.certificate import Bound, Certificate

CLAIMS = ("bound", "program", "rounding")
_ABOUT = {
    "bound": "claim 1, the bound re-derived from the weights by the kernel",
    "program": "claim 2, the program rebuilt from class and config; both executed",
    "rounding": "claim 3, the allowances for floating-point forwards",
}


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification.

    Attributes:
        claims: ``bound``, ``program``, ``rounding`` -> ``ok``, ``failed`` or ``not_checked``.
        reasons: one sentence for each thing that failed.
        notes: worth knowing, no failure.
        certificate: the certificate, where it could be read.
        source: what was verified; ``commit`` the Hub commit, if it came from one.
        trust_base: what the verdict rests on (NumPy, BLAS, processor, self-test).
        foreign_rules: third-party rules that the caller chose to trust.
    """

    claims: dict[str, str]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    certificate: Certificate | None
    source: str
    commit: str | None
    trust_base: dict[str, Any]
    foreign_rules: tuple[str, ...] = ()
    required: tuple[str, ...] = CLAIMS

    @property
    def ok(self) -> bool:
        """Whether every required claim was checked and holds."""
        return not self.reasons and all(self.claims[claim] == "ok" for claim in self.required)

    @property
    def exit_status(self) -> int:
        """0 if all required claims hold, 1 otherwise."""
        return 0 if self.ok else 1

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """JSON values, as ``hf-lipschitz verify --json`` prints them."""
        certificate = self.certificate
        return {
            "ok": self.ok,
            "claims": self.claims,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "bound": certificate.bound.to_json() if certificate else None,
            "bound_features": certificate.bound_features.to_json() if certificate else None,
            "source": self.source,
            "commit": self.commit,
            "trust_base": self.trust_base,
            "foreign_rules": list(self.foreign_rules),
        }

    def __str__(self) -> str:
        """What a person must know of the outcome, complete and plain; what a terminal would act on is escaped."""
        at = f" at commit {self.commit}" if self.commit else ""
        lines = [f"{'verified' if self.ok else 'NOT VERIFIED'}: {self.source}{at}"]
        lines += [f"  {claim:<9}{state.replace('_', ' '):<13}{_ABOUT[claim]}" for claim, state in self.claims.items()]
        if "program" not in self.required:
            lines.append("  claim 1 only: whether the model class computes this program was not checked")
        if self.certificate is not None:
            lines += [f"  {bound_text(bound)}" for bound in (self.certificate.bound, self.certificate.bound_features)]
        lines += [f"  failed: {reason}" for reason in self.reasons]
        lines += [f"  note: {line}" for line in self.notes]
        lines.append(f"  rests on {', '.join(f'{key} {value}' for key, value in self.trust_base.items())}")
        lines.append(f"  foreign rules: {', '.join(self.foreign_rules) or 'none'}")
        return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def bound_text(bound: Bound) -> str:
    """A bound in words, its value rounded up to six digits."""
    value = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING).create_decimal(decimal.Decimal(bound.value))
    log10 = bound.to_json()["log10"] + 0.0005  # rounded up too
    return f"Lipschitz bound {value} (log10 {log10:.3f}) in {bound.norm} from {bound.origin} to {bound.to}"
