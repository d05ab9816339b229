"""Lower estimates beside the bounds of a model: how much of what is proved is real."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hf_lipschitz.evaluation.lower_bounds import LowerEstimate

IMAGES = 8
STEPS = 20


def search(model: Any, images: Tensor, norm: str = "l2") -> dict[str, LowerEstimate]:
    """Lower estimates to the logits and to the features of an image classifier, from its first few images.

    Args:
        model: the classifier; float64 copies of it run.
        images: (B, C, H, W), uint8 or in [0, 1]. norm: ``l2`` or ``token_max``.

    Cost: of each output, on ``IMAGES`` images at once in float64, about 10 * ``STEPS`` + 30 passes forward or backward:
    3 seconds for each output of a LipViT of 0.9 million parameters on one processor core.
    """
    from hf_lipschitz.evaluation.lower_bounds import classifier_estimates
    from hf_lipschitz.evaluation.pixels import certified_pixels

    pixels = certified_pixels(images[:IMAGES]).to(next(model.parameters()).device)
    return classifier_estimates(model, pixels, norm=norm, steps=STEPS, restarts=1)


def search_logits(model: Any, inputs: Tensor, norm: str, *, pixels: bool) -> LowerEstimate:
    """The same for the output of any model.

    Args:
        model: gives a tensor or ``.logits``. inputs: (B, ...) floats. norm: ``l2`` or ``token_max``.
        pixels: whether the bound speaks of inputs with entries in [0, 1] only, so that the search keeps to them.
    """
    from hf_lipschitz.evaluation.lower_bounds import lipschitz_lower_estimate

    geometry: Any = norm
    within = (0.0, 1.0) if pixels else None
    return lipschitz_lower_estimate(model, inputs[:IMAGES], norm=geometry, steps=STEPS, restarts=1, within=within)


def gaps(estimates: Mapping[str, LowerEstimate], bounds: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """For JSON: each estimate with the bound that it stands beside, and the ratio of the two (None if infinite)."""
    return {output: _gap(found, bounds[output]) for output, found in estimates.items()}


def sentence(found: LowerEstimate, bound: float) -> str:
    """An estimate in words, beside a bound."""
    gap = found.gap(bound)
    return f"lower estimate {found.value:.6g} ({found.norm}, searched), gap {gap:.4g}"


def _gap(found: LowerEstimate, bound: float) -> dict[str, Any]:
    gap = found.gap(bound)
    finite = gap if gap < float("inf") else None
    return {"value": found.value, "norm": found.norm, "gap": finite}
