"""Losses that train for certified margins, and the adapter that hands one to the Trainer's ``compute_loss_func``.

A prediction is certified at radius e where every margin y_j - y_i exceeds e * n_ji, n_ji = L ||w_j - w_i|| being the
Lipschitz bound of that margin. The losses differ in how they ask for it:

* ``emma`` (Hu, Leino, Wang, Fredrikson 2023): every rival's logit is raised by just what a worst perturbation could
add to
  it, at most e * n_ji, so that only radii up to e are paid for.
* ``offset_cross_entropy`` (Prach, Lampert 2022): the true logit is lowered by a constant before the cross entropy.
* ``gloro`` (Leino, Wang, Fredrikson 2021): one more class, "not certified at e", takes part in the cross entropy.
* ``cross_entropy``: no margin asked for; the baseline.

Each maps logits (B, K), labels (B,), pair norms (K, K) of the head's rows and L, a float in the units of the radius
(for images 1 / min(std) of the normalisation), to a loss for every example, (B,). ``scale`` multiplies the logits
inside the softmax: the outputs of a network with a small bound are small, and this inverse temperature trades clean
accuracy (large) for certified accuracy (small).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lipschitz.errors import UserError

IGNORED = -100  # the label of an example that counts for nothing, as everywhere in transformers
_LEAST_SHARE = 0.01  # of its full shift, for a rival that is not beaten yet


def pair_norms(rows_KD: Tensor) -> Tensor:
    """||w_i - w_j|| for every two rows, (K, K), differentiable; 0 with gradient 0 on the diagonal and for equal rows.

    A training-time number in the rows' own precision: certificates use ``evaluation.radii.pair_norms``.
    """
    squares_K = rows_KD.square().sum(dim=1)
    squared_KK = squares_K[:, None] + squares_K[None, :] - 2.0 * rows_KD @ rows_KD.T
    floor = 16.0 * torch.finfo(rows_KD.dtype).eps * squares_K.detach().amax()  # below it only rounding is left
    apart_KK = (squared_KK > floor) & ~torch.eye(len(rows_KD), dtype=torch.bool, device=rows_KD.device)
    return torch.where(apart_KK, torch.where(apart_KK, squared_KK, 1.0).sqrt(), 0.0)  # inner where: no root of 0


def cross_entropy(
    logits_BK: Tensor, labels_B: Tensor, norms_KK: Tensor, lipschitz: float, *, epsilon: float, scale: float
) -> Tensor:
    """-log softmax(scale * y)_j; the pair norms, the bound and the radius play no part. Returns (B,)."""
    return F.cross_entropy(scale * logits_BK, labels_B, reduction="none")


def emma(
    logits_BK: Tensor, labels_B: Tensor, norms_KK: Tensor, lipschitz: float, *, epsilon: float, scale: float
) -> Tensor:
    """Cross entropy of y_i + s_i * epsilon * n_ji, with s_i = clip((y_j - y_i) / (epsilon n_ji), 0.01, 1) held fixed.

    A rival that epsilon cannot lift to the true class gets its full shift (s = 1); one that a smaller radius lifts
    gets what makes it a tie; one that already wins gets next to nothing. No gradient flows through s. Returns (B,).
    """
    shift_BK = epsilon * lipschitz * norms_KK[labels_B]
    with torch.no_grad():
        margin_BK = logits_BK.gather(1, labels_B[:, None]) - logits_BK
        share_BK = torch.where(shift_BK > 0.0, margin_BK / shift_BK.clamp_min(1e-30), 1.0).clamp(_LEAST_SHARE, 1.0)
    return F.cross_entropy(scale * (logits_BK + share_BK * shift_BK), labels_B, reduction="none")


def offset_cross_entropy(
    logits_BK: Tensor, labels_B: Tensor, norms_KK: Tensor, lipschitz: float, *, epsilon: float, scale: float
) -> Tensor:
    """Cross entropy of scale * (y - u 1_j), divided by scale, with the offset u = sqrt(2) * L * epsilon.

    u is the margin that epsilon needs where the head's rows are orthonormal. Returns (B,).
    """
    offset_BK = F.one_hot(labels_B, logits_BK.shape[1]).to(logits_BK.dtype) * (math.sqrt(2.0) * lipschitz * epsilon)
    return F.cross_entropy(scale * (logits_BK - offset_BK), labels_B, reduction="none") / scale


def gloro(
    logits_BK: Tensor, labels_B: Tensor, norms_KK: Tensor, lipschitz: float, *, epsilon: float, scale: float
) -> Tensor:
    """Cross entropy with the further logit max over i != j* of (y_i + epsilon * n_j*i), j* being the predicted class.

    That logit is the largest exactly where the prediction is not certified at epsilon. Returns (B,).
    """
    top_B1 = logits_BK.detach().argmax(dim=1, keepdim=True)
    raised_BK = logits_BK + epsilon * lipschitz * norms_KK[top_B1[:, 0]]
    bottom_B1 = raised_BK.scatter(1, top_B1, -math.inf).amax(dim=1, keepdim=True)
    return F.cross_entropy(scale * torch.cat([logits_BK, bottom_B1], dim=1), labels_B, reduction="none")


@dataclass(frozen=True)
class LossSpec:
    """A loss as recipes name it.

    Attributes:
        function: (logits, labels, pair norms, lipschitz, *, epsilon, scale) -> (B,).
        epsilon: default radius, in pixel units. scale: default factor of the logits.
        start, end: the radius grows from ``start * epsilon`` to ``end * epsilon`` over the first part of the training.
    """

    function: Callable[..., Tensor]
    epsilon: float = 36 / 255
    scale: float = 3.0
    start: float = 1.0
    end: float = 1.0


LOSSES: dict[str, LossSpec] = {
    "cross_entropy": LossSpec(cross_entropy),
    "emma": LossSpec(emma, start=0.1, end=3.0),
    "gloro": LossSpec(gloro),
    "offset_cross_entropy": LossSpec(offset_cross_entropy, epsilon=72 / 255, scale=4.0),
}


class CertifiedLoss:
    """A loss in the form that ``Trainer(compute_loss_func=...)`` calls.

    Attributes:
        progress: how much of the training is done, in [0, 1]; a callback sets it to ``state.global_step /
            state.max_steps``.
        epsilon: the radius asked for at this point of the training, in pixel units.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "emma",
        *,
        lipschitz: float,
        epsilon: float | None = None,
        scale: float | None = None,
        growth: tuple[float, float] | None = None,
        growth_share: float = 0.5,
    ) -> None:
        """Look the loss up and check the numbers.

        Args:
            model: has a ``classifier`` whose ``normalized_weight()`` gives the head's unit rows (K, D), differentiably.
            name: one of ``LOSSES``.
            lipschitz: the features' bound per unit of the radius, for images 1 / min(std).
            epsilon: the radius that the growth multiplies, in pixel units; by default the loss's own.
            scale: factor of the logits inside the softmax; by default the loss's own.
            growth: (start, end) factors of epsilon; by default the loss's own (EMMA: 0.1 to 3).
            growth_share: the part of the training over which epsilon grows linearly; 0 means that it is ``end`` at
                once.

        Raises:
            UserError: an unknown name, or a number that makes no sense.
        """
        if name not in LOSSES:
            raise UserError(f"there is no loss named {name!r}: choose one of {', '.join(sorted(LOSSES))}")
        spec = LOSSES[name]
        self.name, self.function = name, spec.function
        self._classifier: Any = model.classifier
        self.lipschitz = _positive("lipschitz", lipschitz)
        self.base_epsilon = _positive("epsilon", spec.epsilon if epsilon is None else epsilon)
        self.scale = _positive("scale", spec.scale if scale is None else scale)
        start, end = (spec.start, spec.end) if growth is None else growth
        self.growth = _positive("growth (start)", start), _positive("growth (end)", end)
        if not 0.0 <= growth_share <= 1.0:
            raise UserError(f"growth_share is {growth_share!r}: it is a part of the training, between 0 and 1")
        self.growth_share = growth_share
        self.progress = 0.0

    @property
    def progress(self) -> float:
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"progress is {value!r}: it is the part of the training that is done, between 0 and 1")
        self._progress = float(value)

    @property
    def epsilon(self) -> float:
        done = 1.0 if self.growth_share == 0.0 else min(self.progress / self.growth_share, 1.0)
        start, end = self.growth
        return self.base_epsilon * (start + (end - start) * done)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The sum over the examples at hand, divided by the number of examples of the whole optimizer step.

        Args:
            outputs: has ``.logits`` (B, K), or is a mapping with that key.
            labels: (B,) class numbers; -100 marks an example that does not count.
            num_items_in_batch: labelled examples in all micro-batches of the step and on all processes, as the Trainer
                passes it. The Trainer adds up what is returned here without dividing, so that dividing by this number
                makes accumulated gradients those of one large batch, micro-batches of unequal size included. None
                means that this batch is the whole step.

        Returns:
            A scalar, float32 (float64 for float64 logits).

        Raises:
            UserError: there are no labels.
        """
        if labels is None:
            raise UserError("the batch has no labels: name the column that holds them, a certified loss needs it")
        logits_BK = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        with torch.autocast(logits_BK.device.type, enabled=False):
            logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
            counted_B = labels != IGNORED
            norms_KK = pair_norms(self._classifier.normalized_weight().to(logits_BK.dtype))
            losses_B = self.function(
                logits_BK[counted_B],
                labels[counted_B],
                norms_KK,
                self.lipschitz,
                epsilon=self.epsilon,
                scale=self.scale,
            )
            if num_items_in_batch is None:
                return losses_B.sum() / max(len(losses_B), 1)
            return losses_B.sum() / torch.as_tensor(num_items_in_batch, device=losses_B.device).flatten()[0]


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise UserError(f"{name} of the loss is {value!r}: it must be a finite number greater than 0")
    return float(value)
