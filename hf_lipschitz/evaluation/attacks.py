"""Projected gradient descent in an l2 ball of its own size around each image, which must fail inside certified radii.

Written here because no library that was looked at attacks each image at its own radius, in float64, and keeps to the
ball as floating point adds it (docs/decisions/0003-own-pgd.md). By default perturbed images are *not* clipped to [0,
1]: a certificate covers every x' of the ball, so the attack without that restriction is the stronger test.

What is certified is the exact network. A float64 model follows it to about 1e-12, a float32 model only to about 1e-6
of its logits, which moves its boundary by as much: an image whose radius is 1e-5 may change in float32 just inside. So
the attack keeps a further absolute distance from the radius in float32, which :class:`AttackResult` states.

An attack that never succeeds shows nothing unless it can succeed: :func:`attack_control` runs the same one at a radius
many times larger, where predictions must change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.ball import distance_up, expand, norms, project, random_point
from hf_lipschitz.evaluation.pixels import certified_pixels

_CANDIDATES = 9  # so many of the strongest other classes are measured for the distance of their boundary
_RIVALS = 3  # so many of the nearest are pursued, one a restart
_SLACK = {torch.float64: 0.0, torch.float32: 1e-5}  # pixel units; see pgd_attack


@dataclass(frozen=True)
class AttackResult:
    """What the attack found, image by image.

    Attributes:
        limits: (B,) float64, how far each image may be moved: ``(1 - inside) * radius - slack``.
        changed: (B,) bool, some visited point has another prediction, or logits that are not finite.
        worst_margin: (B,) float64, the smallest margin of the attacked prediction over its rivals at any visited
            point; NaN where there was nothing to attack.
        distance: (B,) float64, upper bound of the l2 norm of ``adversarial - image`` as added; at most the radius.
        adversarial: the images with the smallest margins, in the model's dtype, on the CPU.
        steps, restarts, slack: of the attack.
    """

    limits: NDArray[np.float64]
    changed: NDArray[np.bool_]
    worst_margin: NDArray[np.float64]
    distance: NDArray[np.float64]
    adversarial: Tensor
    steps: int
    restarts: int
    slack: float

    @classmethod
    def untouched(
        cls, images: Tensor, limits_B: NDArray[np.float64], steps: int, restarts: int, slack: float
    ) -> AttackResult:
        """The result of an attack that has not begun, on images in the model's dtype."""
        changed, margins, distances = np.zeros(len(images), bool), np.full(len(images), np.nan), np.zeros(len(images))
        adversarial = images.detach().to("cpu", copy=True)
        return cls(limits_B, changed, margins, distances, adversarial, steps, restarts, slack)

    @property
    def attacked(self) -> NDArray[np.bool_]:
        """(B,): there was something to attack."""
        return self.limits > 0.0

    @property
    def dtype(self) -> str:
        """The dtype in which the model ran."""
        return str(self.adversarial.dtype).removeprefix("torch.")

    def fill(self, part: Tensor, search: _Search, own_B: NDArray[np.int64]) -> None:
        """Attack the images with these numbers and write down what was found."""
        device = next(search.model.parameters()).device
        limit_B, target_B = (torch.from_numpy(values)[part].to(device) for values in (self.limits, own_B))
        image = self.adversarial[part].to(device)
        track = search.attack(image, limit_B, target_B)
        self.changed[part], self.worst_margin[part] = track.changed_B.cpu().numpy(), track.margin_B.cpu().numpy()
        self.distance[part], self.adversarial[part] = distance_up(image, track.worst).cpu().numpy(), track.worst.cpu()

    def as_dict(self) -> dict[str, Any]:
        """Counts, for JSON."""
        return {
            "attack": "l2 PGD",
            "dtype": self.dtype,
            "steps": self.steps,
            "restarts": self.restarts,
            "slack": self.slack,
            "images": len(self.changed),
            "attacked": int(self.attacked.sum()),
            "changed": int(self.changed.sum()),
        }


def pgd_attack(
    model: nn.Module,
    pixel_values: Tensor,
    radii: ArrayLike,
    *,
    predictions: ArrayLike | None = None,
    inside: float = 1e-6,
    slack: float | None = None,
    steps: int = 50,
    restarts: int = 3,
    clip: tuple[float, float] | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> AttackResult:
    """Try to change each prediction by a perturbation of at most ``(1 - inside) * radius - slack``.

    Args:
        model: gives logits, or an output with ``.logits``; it runs in its own dtype (float32 or float64), in eval mode.
        pixel_values: (B, C, H, W), uint8 or floats in [0, 1] that the model's dtype holds exactly.
        radii: (B,) l2 radii in pixel units; 0 means nothing to attack. Radii beyond the diagonal of the pixel cube
            (infinite ones too) are cut to it.
        predictions: (B,) the classes to change, by default those that the model gives the images; -1 says the same.
        inside: how far inside the radius to stay, relative to it. slack: and in pixel units; by default 0 in float64
            and 1e-5 in float32, which the certificate of the exact network does not speak of.
        steps: gradient steps a restart.
        restarts: the first starts at the image and pursues the class whose boundary looks nearest (margin over
            gradient); each further one starts at a random point of the ball and pursues the nearest, the second, the
            third in turn.
        clip: keep perturbed pixels in this range, or None for the stronger attack.
        batch_size: images at a time. seed: of the random starts. progress: show a progress bar.

    Raises:
        UserError: images that do not fit, radii that are negative, NaN or not one an image, steps or restarts below 1.
    """
    pixels_BCHW, radii_B = _checked(model, pixel_values, radii, clip)
    if steps < 1 or restarts < 1 or batch_size < 1:
        raise UserError(
            f"steps, restarts and batch_size are {steps}, {restarts}, {batch_size}: each must be at least 1"
        )
    own_B = np.full(len(radii_B), -1) if predictions is None else np.asarray(predictions, dtype=np.int64)
    if own_B.shape != radii_B.shape:
        raise UserError(f"there are {len(radii_B)} images and predictions of shape {own_B.shape}: pass one an image")
    dtype = next(model.parameters()).dtype
    slack = _SLACK[dtype] if slack is None else slack
    result = AttackResult.untouched(pixels_BCHW.to(dtype), radii_B * (1.0 - inside) - slack, steps, restarts, slack)
    search = _Search(model, steps, restarts, clip, torch.Generator().manual_seed(seed))
    parts = torch.from_numpy(np.flatnonzero(result.attacked)).split(batch_size)
    with _evaluation_mode(model):
        for part in tqdm(parts, desc="attack", unit="batch", disable=not progress):
            result.fill(part, search, own_B)
    return result


def attack_control(
    model: nn.Module, pixel_values: Tensor, radii: ArrayLike, *, factor: float = 20.0, **options: Any
) -> AttackResult:
    """The same attack at ``factor`` times the radii: where this changes nothing, a failed attack says nothing.

    Args:
        model, pixel_values, radii, options: as for :func:`pgd_attack`. factor: how much larger the balls are.
    """
    return pgd_attack(model, pixel_values, np.asarray(radii, dtype=np.float64) * factor, **options)


@dataclass(frozen=True)
class _Search:
    """The attack on one batch, on the model's device."""

    model: nn.Module
    steps: int
    restarts: int
    clip: tuple[float, float] | None
    generator: torch.Generator

    def attack(self, image: Tensor, limit_B: Tensor, own_B: Tensor) -> _Track:
        """All restarts; a negative own class stands for the one that the model gives."""
        with torch.no_grad():
            clean_BK = _logits(self.model, image)
        own_B = torch.where(own_B < 0, clean_BK.argmax(dim=1), own_B)
        track = _Track(own_B, image)
        track.see(image, clean_BK)
        rivals_BR = _nearest_rivals(self.model, image, own_B, clean_BK)
        for restart in range(self.restarts if rivals_BR.shape[1] else 0):
            point, rank = image, max(restart - 1, 0) % rivals_BR.shape[1]
            if restart > 0:
                point = project(image, random_point(image, limit_B, self.generator), limit_B, self.clip)
            for step in range(self.steps):
                point, logits_BK, uphill, _ = _uphill(self.model, point, own_B, rivals_BR[:, rank])
                track.see(point, logits_BK)
                length_B = limit_B * (10.0 / self.steps) * (1.0 - step / self.steps)  # together about five radii
                point = project(image, point.double() + uphill * expand(length_B, uphill), limit_B, self.clip)
            with torch.no_grad():
                track.see(point, _logits(self.model, point))
        return track


class _Track:
    """The worst of all points seen so far, image by image."""

    def __init__(self, own_B: Tensor, image: Tensor) -> None:
        self.own_B1 = own_B[:, None]
        self.changed_B = torch.zeros_like(own_B, dtype=torch.bool)
        self.margin_B = torch.full(own_B.shape, math.inf, dtype=torch.float64, device=own_B.device)
        self.worst = image.clone()

    def see(self, point: Tensor, logits_BK: Tensor) -> None:
        """Judge a point by its logits; logits that are not finite count as a change."""
        logits_BK = logits_BK.double()
        broken_B = ~logits_BK.isfinite().all(dim=1)
        rival_B = logits_BK.scatter(1, self.own_B1, -math.inf).amax(dim=1)
        margin_B = (logits_BK.gather(1, self.own_B1)[:, 0] - rival_B).masked_fill(broken_B, -math.inf)
        self.changed_B |= (logits_BK.argmax(dim=1) != self.own_B1[:, 0]) | broken_B
        worse_B = margin_B < self.margin_B
        self.margin_B = torch.where(worse_B, margin_B, self.margin_B)
        self.worst = torch.where(expand(worse_B, point), point, self.worst)


def _nearest_rivals(model: nn.Module, image: Tensor, own_B: Tensor, clean_BK: Tensor) -> Tensor:
    """(B, R): other classes, the one with the smallest margin over the gradient of the margin first."""
    others_BC = clean_BK.scatter(1, own_B[:, None], -math.inf).argsort(dim=1, descending=True)[:, :-1][:, :_CANDIDATES]
    if others_BC.shape[1] < 2:
        return others_BC
    margins_BC = (clean_BK.gather(1, own_B[:, None]) - clean_BK.gather(1, others_BC)).double()
    slopes_BC = torch.stack([_uphill(model, image, own_B, rival_B)[3] for rival_B in others_BC.T], dim=1)
    order_BC = torch.argsort(margins_BC / slopes_BC.clamp_min(1e-300), dim=1)
    return others_BC.gather(1, order_BC)[:, :_RIVALS]


def _uphill(model: nn.Module, point: Tensor, own_B: Tensor, rival_B: Tensor) -> tuple[Tensor, ...]:
    """The point, its logits, the float64 unit direction of steepest growth of f_rival - f_own, and its slope."""
    point = point.detach().requires_grad_(True)
    with torch.enable_grad():
        logits_BK = _logits(model, point)
        gain_B1 = logits_BK.gather(1, rival_B[:, None]) - logits_BK.gather(1, own_B[:, None])
        gradient = torch.autograd.grad(gain_B1.sum(), point)[0]
    uphill = torch.nan_to_num(gradient.double(), nan=0.0, posinf=0.0, neginf=0.0)
    slope_B = norms(uphill)
    return point.detach(), logits_BK.detach(), uphill / expand(slope_B.clamp_min(1e-300), uphill), slope_B


def _checked(
    model: nn.Module, pixel_values: Tensor, radii: ArrayLike, clip: tuple[float, float] | None
) -> tuple[Tensor, NDArray[np.float64]]:
    """The images and the radii, cut to the diagonal of the pixel cube."""
    pixels_BCHW, dtype = certified_pixels(pixel_values), next(model.parameters()).dtype
    radii_B = np.asarray(radii, dtype=np.float64)
    if radii_B.shape != (len(pixels_BCHW),) or not np.all(radii_B >= 0.0):
        raise UserError(
            f"there are {len(pixels_BCHW)} images and radii of shape {radii_B.shape}: pass one an image, at least 0"
        )
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"the model is {dtype}: attack it in float32 or float64 (model.float())")
    if not torch.equal(pixels_BCHW.to(dtype).double(), pixels_BCHW.double()):
        raise UserError(f"the images are {pixels_BCHW.dtype}, which {dtype} does not hold exactly: round them first")
    if clip is not None and not (clip[0] <= 0.0 and clip[1] >= 1.0):
        raise UserError(f"clip is {clip}: it must contain [0, 1], where the images are")
    return pixels_BCHW, np.minimum(radii_B, math.sqrt(pixels_BCHW[0].numel()))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every submodule, and each one's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return getattr(output, "logits", output)
