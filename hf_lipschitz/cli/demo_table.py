"""The demo's last word: one small table of what was measured and proved."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from hf_lipschitz.cli.demo_steps import Outcome


def table(outcome: Outcome) -> Table:
    """Two models, a column each."""
    from hf_lipschitz.model_card import percent, radius_label

    digits, tuned = outcome.evaluation, outcome.fine_tuned
    assert digits is not None
    bound = outcome.reload["verification"]["bound"]["decimal"]
    odd_even, certificate = tuned["evaluation"], tuned["certificate"]
    made = Table("", "digits", "odd / even", title=f"{len(digits.labels)} held-out images, {digits.claim}")
    made.add_row("clean accuracy", percent(digits.clean_accuracy), percent(odd_even.clean_accuracy))
    for radius, value in digits.certified.items():
        label = f"certified at l2 radius {radius_label(radius)}"
        made.add_row(label, percent(value), percent(odd_even.certified[radius]))
    for dtype in ("float32", "float64"):
        made.add_row(f"changed by the attack inside, {dtype}", _counts(outcome.attacks[dtype]), "")
    control = outcome.attacks["control"]
    made.add_row(f"changed at {control['factor']:g} times the radius", _counts(control), "")
    made.add_row("bound to the logits", bound, certificate.bound.to_json()["decimal"])
    features = outcome.reload["verification"]["bound_features"]["decimal"]
    made.add_row("bound to the features", features, certificate.bound_features.to_json()["decimal"])
    made.add_row(
        "training", *(f"{t['step']:,} steps, {t['seconds']:.0f} s" for t in (outcome.training, tuned["training"]))
    )
    return made


def _counts(attack: dict[str, Any]) -> str:
    return f"{attack['changed']} of {attack['attacked']}"
