"""The attack that must fail: PGD just inside each image's certified radius, on the float32 and the float64 model.

It runs in parts, so that a progress display can move. A control, the same attack far outside, shows that it can
succeed: where it changes nothing, a failed attack says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from hf_lipschitz.evaluation.certified import CertifiedEvaluation

PART = 128  # images attacked at a time
CONTROL_FACTOR = 20.0


def attack_inside(
    model: Any,
    pixel_values: Tensor,
    evaluation: CertifiedEvaluation,
    *,
    steps: int = 50,
    restarts: int = 3,
    seed: int = 0,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, dict[str, Any]]:
    """Attack every prediction just inside its certified radius, and a control outside.

    Args:
        model: the classifier; copies of it run in float32 and float64.
        pixel_values: (B, C, H, W), as evaluated. evaluation: of these images.
        steps, restarts, seed: of the attack; the control has one restart.
        advance: called with the number of images attacked, ``3 * B`` in all.

    Returns:
        ``float32``, ``float64`` and ``control`` -> counts as ``AttackResult.as_dict`` gives them; ``control`` is the
        float32 model at ``CONTROL_FACTOR`` times the radii.
    """
    import torch

    single, double = (copy.deepcopy(model).to(dtype).eval() for dtype in (torch.float32, torch.float64))
    options: dict[str, Any] = {"steps": steps, "restarts": restarts, "seed": seed, "advance": advance}
    control = {**options, "restarts": 1}
    return {
        "float32": _attack(single, pixel_values, evaluation, 1.0, **options),
        "float64": _attack(double, pixel_values, evaluation, 1.0, **options),
        "control": {"factor": CONTROL_FACTOR, **_attack(single, pixel_values, evaluation, CONTROL_FACTOR, **control)},
    }


def _attack(
    model: Any,
    pixel_values: Tensor,
    evaluation: CertifiedEvaluation,
    factor: float,
    *,
    seed: int,
    advance: Callable[[int], None],
    **options: Any,
) -> dict[str, Any]:
    from hf_lipschitz.evaluation.attacks import pgd_attack

    total: dict[str, Any] = {}
    for part in _parts(len(pixel_values)):
        radii, own = factor * evaluation.radii[part], evaluation.predictions[part]
        found = pgd_attack(model, pixel_values[part], radii, predictions=own, seed=seed + part.start, **options)
        counts = found.as_dict()
        total = {**counts, **{key: counts[key] + total.get(key, 0) for key in ("images", "attacked", "changed")}}
        advance(part.stop - part.start)
    return total


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, PART):
        yield slice(start, min(start + PART, count))
