"""A verdict as text for people, and what commands do that go on only with a good one.

What is printed is part of the guarantee, so it is plain and complete.
"""

from __future__ import annotations

import decimal
from typing import Any

import typer

from hf_lipschitz.cli.output import complain, note, print_json, quiet_transformers, working

_ABOUT = {
    "bound": "claim 1, the bound re-derived from the weights by the kernel",
    "program": "claim 2, the program rebuilt from class and config; both executed",
    "rounding": "claim 3, the allowances for floating-point forwards",
}


def verdict_lines(verdict: Any, *, require: str) -> list[str]:
    """The lines to print for a ``Verdict`` that was asked to check ``require``."""
    at = f" at commit {verdict.commit}" if verdict.commit else ""
    lines = [f"{'verified' if verdict.ok else 'NOT VERIFIED'}: {verdict.source}{at}"]
    for claim, state in verdict.claims.items():
        lines.append(f"  {claim:<9}{state.replace('_', ' '):<13}{_ABOUT[claim]}")
    if require == "bound":
        lines.append(
            "  claim 1 only: whether the model class computes this program was not checked (--require program)"
        )
    if verdict.certificate is not None:
        lines += [f"  {bound_text(b)}" for b in (verdict.certificate.bound, verdict.certificate.bound_features)]
    lines += [f"  failed: {reason}" for reason in verdict.reasons]
    lines += [f"  note: {line}" for line in verdict.notes]
    lines.append(f"  rests on {', '.join(f'{key} {value}' for key, value in verdict.trust_base.items())}")
    lines.append(f"  foreign rules: {', '.join(verdict.foreign_rules) or 'none'}")
    return lines


def bound_text(bound: Any) -> str:
    """A ``Bound`` in words, its value rounded up to six digits."""
    value = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING).create_decimal(decimal.Decimal(bound.value))
    log10 = bound.to_json()["log10"] + 0.0005  # rounded up too
    return f"Lipschitz bound {value} (log10 {log10:.3f}) in {bound.norm} from {bound.origin} to {bound.to}"


def verified_or_exit(source: str, *, as_json: bool, **options: Any) -> Any:
    """The verdict on a folder or repository if all claims hold; else say why on stderr and leave with status 1."""
    from hf_lipschitz.verification import verify

    with working():
        quiet_transformers()
        verdict = verify(source, **options)
    if verdict.ok:
        note(f"verified {source}")
        return verdict
    for reason in verdict.reasons or ("a claim could not be checked",):
        complain(f"{source} does not verify: {reason}")
    if as_json:
        print_json({"ok": False, "verification": verdict.to_json()})
    raise typer.Exit(1)
