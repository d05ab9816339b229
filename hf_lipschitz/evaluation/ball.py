"""Points of l2 balls around images that are inside as floating point adds them, not only in real arithmetic.

A perturbation that was scaled to the radius and then added and rounded may end outside the ball; an attack that steps
outside shows nothing about a certificate. So distances here are measured on the two stored points, in float64, and
rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lipschitz.bounds.rounding import gamma

_ATTEMPTS = 12


def distance_up(image: Tensor, other: Tensor) -> Tensor:
    """(B,) float64: an upper bound of the l2 distance between the rows of two batches that float64 holds exactly.

    Source: n differences, squares and their sum carry gamma_{n+2}, the root one rounding more; 2**-500 covers
    underflow.
    """
    count = image.shape[1:].numel()
    distance_B = norms(other.double() - image.double()) * (1.0 + 2.0 * gamma(count + 8)) + count * 2.0**-500
    return torch.where((other == image).flatten(1).all(dim=1), 0.0, distance_B)


def project(image: Tensor, candidate: Tensor, limit_B: Tensor, clip: tuple[float, float] | None = None) -> Tensor:
    """The candidate, pulled towards the image until its distance, as added in floating point, is within the limit.

    Args:
        image: (B, ...), float32 or float64. candidate: (B, ...), float64. limit_B: (B,), float64.
        clip: a range that holds every entry of the image, so that clipping only shortens a perturbation.

    Returns:
        (B, ...) in the image's dtype; ``distance_up(image, result) <= limit_B`` holds for every row. Where no shortened
        perturbation survives the rounding (the ball holds hardly any other point of the dtype), the image itself.
    """
    exact = image.double()
    step = candidate - exact
    room = 1.0 - 4.0 * gamma(image.shape[1:].numel() + 8)
    scale_B = (limit_B / norms(step).clamp_min(torch.finfo(torch.float64).tiny) * room).clamp_max(1.0)
    for attempt in range(_ATTEMPTS):
        result = (exact + step * expand(scale_B, step)).to(image.dtype)
        if clip is not None:
            result = result.clamp(*clip)
        outside_B = ~(distance_up(image, result) <= limit_B)  # NaN counts as outside
        if not outside_B.any():
            return result
        scale_B = torch.where(outside_B, scale_B * (1.0 - 10.0 ** (attempt + 1 - _ATTEMPTS)), scale_B)
    return torch.where(expand(outside_B, image), image, result)


def random_point(image: Tensor, limit_B: Tensor, generator: torch.Generator) -> Tensor:
    """(B, ...) in float64: a random direction from each image, at a uniformly drawn share of its limit."""
    noise = torch.randn(image.shape, generator=generator, dtype=torch.float64).to(image.device)
    share_B = torch.rand(len(image), generator=generator, dtype=torch.float64).to(image.device)
    return image.double() + noise * expand(limit_B * share_B / norms(noise), noise)


def norms(values: Tensor) -> Tensor:
    """(B,): the l2 norm of each row of a batch."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def expand(values_B: Tensor, like: Tensor) -> Tensor:
    """One value a row, shaped to act on a whole batch."""
    return values_B.reshape(-1, *([1] * (like.ndim - 1)))
