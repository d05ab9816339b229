"""What rounding may do to a deployed forward pass near an image: the second and third of the three rounding claims.

*Exact network*: the radius of the function that the stored weights define in real arithmetic. *Deployed in float64,
float32 or bfloat16*: the prediction of a forward pass in that dtype, at every input of the ball that the dtype holds.
For the latter the rounding error at every such input is subtracted from the margin. A bound over the whole domain would
be far too large (0.7 where the truth is 3e-6), so the error is bounded for each image, from the norms that its own
activations have, enlarged by how far they can move inside the ball.

Let z_l(x) be the exact value of node l and L_l its Lipschitz bound. Then |z_l(x')| <= |z_l(x)| + L_l rho for every x'
at distance at most rho, in the token norm too, and |z_l(x)| <= |z^_l| + e_l, where z^_l is evaluated in float64 and e_l
its rounding error over the domain. From these sizes the engine bounds the error of every node
(:func:`~hf_lipschitz.bounds.engine.node_errors`).

Not covered, as in every rounding claim: TF32, products that a library computes by FFT, Winograd or Strassen, sums in
reduced precision. Sums in bfloat16 products are taken to be accumulated in float32.

Shape suffixes: B images, K classes, C x H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_lipschitz.bounds.certificate import Certificate
from hf_lipschitz.bounds.engine import ProgramBound, bound_program, node_errors, node_values
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rounding import ARITHMETIC, Arithmetic, add_up, array_norm_up, gamma, mul_up, up
from hf_lipschitz.bounds.rule import Size, tightened
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.errors import UserError
from hf_lipschitz.evaluation.radii import out_of_range

Array = NDArray[np.float64]

_IMAGES_AT_ONCE = 16  # the values of all nodes are held for so many images
_FLUSHED = 2.0**-126


@dataclass(frozen=True)
class Deployment:
    """A forward pass that a radius may speak of: its name, its dtype, and how it accumulates sums."""

    name: str
    dtype: str
    arithmetic: Arithmetic

    @property
    def claim(self) -> str:
        """What is claimed to be robust, as it stands beside every figure."""
        return f"deployed in {self.name}"


_U32 = 2.0**-24
DEPLOYMENTS: dict[str, Deployment] = {
    "float64": Deployment("float64", "float64", ARITHMETIC["float64"]),
    "float32": Deployment("float32", "float32", ARITHMETIC["float32"]),
    "bfloat16": Deployment("bfloat16", "bfloat16", ARITHMETIC["bfloat16"]),
    "float32+float64": Deployment("float32 with float64 products", "float32", Arithmetic(_U32, _U32, 2.0**-53)),
}


def deployment_of(claim: str) -> Deployment | None:
    """The deployment that a claim names (``exact``: none).

    Raises:
        UserError: another name.
    """
    if claim == "exact":
        return None
    if claim not in DEPLOYMENTS:
        raise UserError(f"no claim is named {claim!r}: choose exact, {', '.join(DEPLOYMENTS)}")
    return DEPLOYMENTS[claim]


class DeployedErrors:
    """Bounds of the rounding error of a deployed forward pass, image by image.

    Args:
        certificate: of the weights; its program is bounded again here, with its witnesses.
        weights: the tensors by name, as the deployed model holds them (float64 holds each exactly).
        deployment: which forward pass.

    Raises:
        UserError: the weights are not exact in the dtype, so that what is deployed there is another network.
        KernelError: weights that do not fit the program.
    """

    def __init__(self, certificate: Certificate, weights: Mapping[str, Array], deployment: Deployment) -> None:
        self.deployment = deployment
        self._program: Program = certificate.program
        self._weights = weights
        self._bound: ProgramBound = bound_program(self._program, weights, BUILT_IN, witnesses=certificate.witnesses())
        domain = [[node.size] for node in self._bound.nodes]
        self._exact = [e for (e,) in node_errors(self._program, weights, BUILT_IN, "float64", self._bound, domain)]
        if not all(_held(array, deployment.dtype) for array in weights.values() if array.dtype.kind == "f"):
            raise UserError(
                f"the weights are not exact in {deployment.dtype}: certify the copy that is deployed "
                f"(hf-lipschitz certify --cast {deployment.dtype})"
            )

    def features(self, pixels_BCHW: Array, radii_B: Array) -> tuple[Array, Array]:
        """For every image: a bound of the features' error, and one of their norm, both in all of its ball.

        Args:
            pixels_BCHW: float64 images in [0, 1]. radii_B: the radius of each ball (l2, pixel units), >= 0.

        Returns:
            errors (B,): at least ``|z^(x') - z(x')|`` for every x' of the ball that lies in [0, 1] and that the dtype
            holds, z^ the deployed features; infinite where something may overflow. norms (B,): at least ``|z^(x')|``.

        Source: module docstring.
        """
        errors, norms = [], []
        for start in range(0, len(pixels_BCHW), _IMAGES_AT_ONCE):
            part = slice(start, start + _IMAGES_AT_ONCE)
            sizes = self._sizes(pixels_BCHW[part], radii_B[part])
            found = node_errors(
                self._program,
                self._weights,
                BUILT_IN,
                self.deployment.dtype,
                self._bound,
                sizes,
                self.deployment.arithmetic,
            )
            index = self._program.outputs["features"]
            errors += found[index]
            norms += [add_up(size.total, e) for size, e in zip(sizes[index], found[index], strict=True)]
        return np.asarray(errors), np.asarray(norms)

    def _sizes(self, pixels_BCHW: Array, radii_B: Array) -> list[list[Size]]:
        """For every node and image, how large the node's exact value can be in the ball."""
        values = node_values(self._program, self._weights, BUILT_IN, pixels_BCHW)
        sizes: list[list[Size]] = []
        for value, node, shape, error in zip(values, self._bound.nodes, self._bound.shapes, self._exact, strict=True):
            row: list[Size] = []
            for sample, radius in zip(value, radii_B, strict=True):
                moved = add_up(error, mul_up(node.lipschitz, float(radius)))
                near = tightened(Size(add_up(_token(sample), moved), add_up(array_norm_up(sample), moved)), shape)
                row.append(Size(min(near.token, node.size.token), min(near.total, node.size.total)))
            sizes.append(row)
        return sizes


def deployed_margin_errors(
    errors_B: Array, norms_B: Array, head: tuple[Array, Array, bool], pair_norms_BK: Array, arithmetic: Arithmetic
) -> Array:
    """How far a deployed margin may be from the exact network's, for every pair (top class, j): (B, K).

    Args:
        errors_B, norms_B: from :meth:`DeployedErrors.features`.
        head: stored rows (K, D), bias (K,), and whether the forward divides rows by their norm.
        pair_norms_BK: upper bounds of ``|w_i - w_j|`` for the top class i of each image.
        arithmetic: of the deployed forward pass.

    Source: with w^ the computed rows and z^ the computed features, the error of logit l beyond w_l (z^ - z) is at most
    (rho + dot (1 + rho)) |w_l| |z^| + dot |b_l|: rho the relative error of a row's entries, dot that of a sum of D
    products and a bias in any order. Of two logits of one image: the larger such term twice.
    """
    weight_KD, bias_K, normalized = head
    width = weight_KD.shape[1]
    dot = arithmetic.dot(width + 1)
    row = add_up(arithmetic.total(width), gamma(8, arithmetic.roundoff)) if normalized else 0.0
    rows_K = [1.0 if normalized else array_norm_up(each) for each in weight_KD]  # a unit row, or what is stored
    longest, largest_bias = up(max(rows_K)), float(np.max(np.abs(bias_K), initial=0.0))
    factor = mul_up(add_up(row, mul_up(dot, up(1.0 + row))), longest)
    lost = mul_up(_FLUSHED, float(width + 4))
    each_B = np.asarray(
        [add_up(mul_up(factor, n), mul_up(dot, largest_bias), mul_up(lost, up(n + 1.0))) for n in norms_B.tolist()]
    )
    if normalized and np.any(out_of_range(weight_KD, arithmetic.roundoff)):
        each_B[:] = math.inf
    with np.errstate(invalid="ignore", over="ignore"):
        moved_BK = np.where(pair_norms_BK == 0.0, 0.0, pair_norms_BK * errors_B[:, None])
        total_BK = (moved_BK + 2.0 * each_B[:, None]) * (1.0 + 2.0**-40)
    return np.where(np.isnan(total_BK), np.inf, total_BK)


def _token(sample: Array) -> float:
    """An upper bound of the largest token norm of one sample."""
    if sample.ndim == 1:
        return array_norm_up(sample)
    width = sample.shape[0] if sample.ndim == 3 else sample.shape[-1]
    squares = np.sum(np.square(sample), axis=0 if sample.ndim == 3 else -1)
    largest = float(np.max(squares, initial=0.0))
    if not 2.0**-400 < largest < 2.0**400:  # squares may have vanished or overflowed: the whole sample bounds a token
        return array_norm_up(sample)
    return up(math.sqrt(largest) * (1.0 + 2.0 * gamma(width + 2)))


def _held(array: Array, dtype: str) -> bool:
    """Whether a dtype holds every entry exactly."""
    if dtype == "float64":
        return True
    single = array.astype(np.float32)
    cut = dtype == "bfloat16" and bool(np.any(np.ascontiguousarray(single).view(np.uint32) & 0xFFFF))
    return bool(np.array_equal(single.astype(np.float64), array.astype(np.float64))) and not cut
