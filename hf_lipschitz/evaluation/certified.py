"""Certified accuracy of a model on images: how many predictions are right and provably stay so within a radius.

The claim is about the *exact network*: the function that the stored weights define in real arithmetic. The model is
run once per image in float64, and what its rounding may have added to a margin (about 1e-9) is subtracted; see
radii.py. What the same weights do in a floating-point dtype at a perturbed image is another claim, made on request:
then the rounding error at every image of the ball is subtracted too; see deployed.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lipschitz.bounds.certificate import Certificate
from hf_lipschitz.bounds.rounding import U
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.deployed import DeployedErrors, deployed_margin_errors, deployment_of
from hf_lipschitz.evaluation.pixels import certified_labels, certified_pixels
from hf_lipschitz.evaluation.radii import (
    certified_accuracy,
    certified_radius,
    margin_errors,
    normalized_rows,
    pair_norms,
)

__all__ = ["CertifiedEvaluation", "certified_accuracy", "certified_radius", "evaluate_certified"]

CLAIM = "exact network"
_PIXELS = "pixels[0,1]"


@dataclass(frozen=True)
class CertifiedEvaluation:
    """What a model reached on one set of images.

    Attributes:
        clean_accuracy: fraction of correct predictions (a prediction with logits that are not finite is wrong).
        certified: l2 radius in pixel units -> fraction that is correct and has a larger certified radius.
        radii: (B,) float64, the certified l2 radius of each image's prediction, in pixel units, right or wrong.
        predictions: (B,) int64; -1 where the logits are not finite.
        labels: (B,) int64.
        lipschitz_bound: bound of the features' Lipschitz constant from pixels, as used.
        features_error: bound of the float64 features' rounding error, as used.
        claim: what is claimed to be robust.
        deployed_error: the largest bound of a deployed feature vector's rounding error in a ball, where the claim is of
            a deployed forward pass.
    """

    clean_accuracy: float
    certified: dict[float, float]
    radii: NDArray[np.float64]
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    lipschitz_bound: float
    features_error: float
    claim: str = CLAIM
    deployed_error: float | None = None

    @property
    def mean_radius(self) -> float:
        """The average certified radius: the mean over all images, a wrong prediction counting 0."""
        return float(np.mean(np.where(self.predictions == self.labels, self.radii, 0.0)))

    def as_dict(self) -> dict[str, Any]:
        """The figures without the arrays, for JSON; radii are keys with all their digits, an infinite mean is None."""
        mean = self.mean_radius
        deployed = {} if self.deployed_error is None else {"deployed_error": repr(self.deployed_error)}
        return {
            "claim": self.claim,
            "norm": "l2",
            "units": _PIXELS,
            "images": len(self.labels),
            "clean_accuracy": self.clean_accuracy,
            "certified": {repr(epsilon): accuracy for epsilon, accuracy in self.certified.items()},
            "mean_radius": mean if math.isfinite(mean) else None,
            "lipschitz_bound": self.lipschitz_bound,
            "features_error": self.features_error,
            **deployed,
        }


def evaluate_certified(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Any,
    *,
    certificate: Certificate,
    radii: Sequence[float] = (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0),
    batch_size: int = 256,
    progress: bool = False,
    claim: str = "exact",
) -> CertifiedEvaluation:
    """Run a float64 copy of the model and certify each prediction.

    Args:
        model: an image classifier with ``base_model(pixel_values).pooler_output`` (B, D) and a linear ``classifier``.
        pixel_values: (B, C, H, W), uint8 (divided by 255 in float32: that tensor is what is certified) or floats in
            [0, 1].
        labels: (B,) integers.
        certificate: of the weights that the model holds; the caller has checked that it is (``model.certificate``).
        radii: l2 radii in pixel units at which certified accuracy is reported.
        batch_size: images at a time. progress: show a progress bar.
        claim: ``exact`` (the exact network), or a forward pass that keeps its prediction: ``float64``, ``float32``,
            ``bfloat16``, or ``float32+float64`` (float32 inside ``products_in(torch.float64)``).

    Returns:
        The evaluation; the model itself is left as it was.

    Raises:
        UserError: images, labels, radii, claim or a certificate that do not fit; one sentence each.

    Source: radii.py.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    for epsilon in radii:
        if not (math.isfinite(epsilon) and epsilon >= 0.0):
            raise UserError(f"radius {epsilon!r} is not a finite number of at least 0: give radii in pixel units")
    lipschitz, features_error = certified_numbers(certificate)
    pixels_BCHW = certified_pixels(pixel_values)
    deployment = deployment_of(claim)
    deployed = None if deployment is None else DeployedErrors(certificate, _tensors(model), deployment)
    certifier = _Certifier.of(model, lipschitz, features_error, deployed)
    labels_B = certified_labels(labels, len(pixels_BCHW), len(certifier.head.weight)).numpy()
    parts = tqdm(torch.split(pixels_BCHW, batch_size), desc="certify", unit="batch", disable=not progress)
    results = [certifier.certify(part) for part in parts]
    radii_B, predictions_B, errors_B = (np.concatenate(column) for column in zip(*results, strict=True))
    correct_B = predictions_B == labels_B
    return CertifiedEvaluation(
        clean_accuracy=float(np.mean(correct_B)),
        certified={float(epsilon): certified_accuracy(radii_B, correct_B, epsilon) for epsilon in radii},
        radii=radii_B,
        predictions=predictions_B,
        labels=labels_B,
        lipschitz_bound=lipschitz,
        features_error=features_error,
        claim=CLAIM if deployment is None else deployment.claim,
        deployed_error=None if deployment is None else float(np.max(errors_B)),
    )


def certified_numbers(certificate: Certificate | None) -> tuple[float, float]:
    """What a radius needs of a certificate: the features' bound from pixels in l2, and the float64 features' error.

    Raises:
        UserError: no certificate, a certificate in another norm or from another input, or one that says nothing of
            float64.
    """
    if certificate is None:
        raise UserError(
            "the model has no certificate: save it with save_pretrained, or run hf-lipschitz certify on its folder"
        )
    bound = certificate.bound_features
    if bound.norm != "l2" or bound.origin != _PIXELS:
        raise UserError(
            f"the certificate bounds {bound.norm} from {bound.origin}: radii of images need l2 from {_PIXELS}"
        )
    rounding = certificate.rounding.get("float64")
    if rounding is None:
        raise UserError("the certificate has no rounding bound for float64: certify the folder again with this version")
    return float(bound.value), float(rounding.features_error)


@dataclass(frozen=True)
class _Certifier:
    """A float64 model and all that a radius needs besides its outputs."""

    model: nn.Module
    head: _Head
    norms_KK: NDArray[np.float64]
    lipschitz: float
    features_error: float
    deployed: DeployedErrors | None

    @classmethod
    def of(
        cls, model: nn.Module, lipschitz: float, features_error: float, deployed: DeployedErrors | None
    ) -> _Certifier:
        """Copy the model and measure its head."""
        exact = _float64_copy(model)
        head = _Head.of(exact)
        norms_KK = pair_norms(head.weight, head.eps, normalize=head.normalize)
        return cls(exact, head, norms_KK, lipschitz, features_error, deployed)

    def certify(self, pixels_BCHW: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Radii, predictions (-1 where logits are not finite) and deployed errors of one batch, (B,) each."""
        features_BD, logits_BK = _forward(self.model, pixels_BCHW)
        top_B = np.argmax(logits_BK, axis=1)
        errors_BK = margin_errors(
            features_BD,
            self.head.weight,
            self.head.bias,
            self.features_error,
            U,
            predictions=top_B,
            eps=self.head.eps,
            normalize=self.head.normalize,
            norms=self.norms_KK,
        )
        predictions_B = np.where(np.all(np.isfinite(logits_BK), axis=1), top_B, -1)
        radii_B = certified_radius(logits_BK, self.norms_KK, self.lipschitz, errors_BK)
        if self.deployed is None:
            return radii_B, predictions_B, np.zeros(len(radii_B))
        deployed_B, norms_B = self.deployed.features(_array(pixels_BCHW), radii_B)
        head = (self.head.weight, self.head.rounded_bias, self.head.normalize)
        pairs_BK, arithmetic = self.norms_KK[top_B], self.deployed.deployment.arithmetic
        errors_BK = errors_BK + deployed_margin_errors(deployed_B, norms_B, head, pairs_BK, arithmetic)
        return certified_radius(logits_BK, self.norms_KK, self.lipschitz, errors_BK), predictions_B, deployed_B


@dataclass(frozen=True)
class _Head:
    """The stored tensors of the classifier, float64, and how its forward pass divides the rows."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64] | None
    eps: float
    normalize: bool

    @property
    def rounded_bias(self) -> NDArray[np.float64]:
        """The bias, zeros where there is none."""
        return np.zeros(len(self.weight)) if self.bias is None else self.bias

    @classmethod
    def of(cls, model: nn.Module) -> _Head:
        """Read it off, and compare the rows that the module itself makes with the ones that the bounds assume."""
        head: Any = model.classifier
        weight, bias = _array(head.weight), None if head.bias is None else _array(head.bias)
        if not np.all(np.isfinite(weight)) or not (bias is None or np.all(np.isfinite(bias))):
            raise UserError(
                "the classifier holds NaN or infinite weights: train it again or load an earlier checkpoint"
            )
        if not hasattr(head, "normalized_weight"):
            if type(head) is not nn.Linear:
                raise UserError(
                    f"the classifier is a {type(head).__name__}: radii are known for (normalised) linear heads"
                )
            return cls(weight, bias, 1.0, False)
        rows, errors = normalized_rows(weight, head.eps)
        with torch.no_grad():
            strayed = np.linalg.norm(_array(head.normalized_weight()) - rows, axis=1)
        if not np.all(strayed <= 2.0 * errors):  # each is within `errors` of the exact row
            raise UserError(
                f"{type(head).__name__} does not divide its rows by max(norm, eps): its radii are not known"
            )
        return cls(weight, bias, float(head.eps), True)


def _float64_copy(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode; on the CPU where the device has no float64."""
    exact = copy.deepcopy(model)
    if _device(exact).type == "mps":
        exact = exact.cpu()
    return exact.double().eval()


def _forward(model: Any, pixels_BCHW: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features (B, D) and logits (B, K), without autocast and without convolution by FFT or Winograd."""
    device = _device(model)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=False):
        features_BD = model.base_model(pixels_BCHW.to(device=device, dtype=torch.float64)).pooler_output
        return _array(features_BD), _array(model.classifier(features_BD))


def _tensors(model: nn.Module) -> dict[str, NDArray[np.float64]]:
    """The state dict as float64 arrays; counters as they are."""
    return {
        name: _array(tensor) if tensor.is_floating_point() else tensor.cpu().numpy()
        for name, tensor in model.state_dict().items()
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()
