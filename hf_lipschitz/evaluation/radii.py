"""From logits and a Lipschitz bound to a radius around each input inside which the prediction cannot change.

For features z that are L-Lipschitz in l2 and logits f = W z + b, the difference f_i - f_j is L ||w_i -
w_j||-Lipschitz, so the top class i survives every change of the input that is shorter than min_j (f_i - f_j) / (L
||w_i - w_j||). The logits at hand were computed in floating point: what their rounding may have added to a margin is
subtracted first, and every number here is rounded in the direction that makes the radius smaller.

Shape suffixes: B images, K classes, D features. Everything is NumPy float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lipschitz.bounds.rounding import UNIT_ROUNDOFF, U, gamma

Array = NDArray[np.float64]

_SLACK = 1.0 + 32.0 * U  # covers the few scalar roundings of one formula (1 + U itself is 1 in float64)
_FLUSHED = 2.0**-126  # below this, float32 and bfloat16 products may be flushed to zero; far below what float64 loses
_SAFE_EXPONENT = {2.0**-53: 200, 2.0**-24: 40, 2.0**-8: 40}  # row sizes whose squares neither overflow nor vanish


def normalized_rows(weight: ArrayLike, eps: float) -> tuple[Array, Array]:
    """The head's unit rows w_i = v_i / max(||v_i||, eps), and how far each computed row may be from the exact one.

    Args:
        weight: stored rows v, (K, D), any float dtype that float64 holds exactly.
        eps: the floor of the row norm in the model's forward pass, > 0; a zero row stays zero.

    Returns:
        rows (K, D) and, for each, a bound (K,) of the l2 distance to the exact row. The bound is infinite for a row
        whose entries are so large or small (beyond 2**200 or 2**-200) that the forward pass may over- or underflow.

    Raises:
        ValueError: a weight that is not a finite matrix, or an eps that is not positive and finite.

    Source: D products and their sum carry gamma_D (Higham, section 3.1), the root and the division one rounding each; a
    quotient of two such factors stays within gamma_{2D+8}, and max(., eps) keeps a relative error.
    """
    rows_KD, weight_KD = _normalize(weight, eps)
    relative = _row_error(weight_KD.shape[1], U)
    size_K = np.sqrt(np.einsum("kd,kd->k", rows_KD, rows_KD)) * (1.0 + 2.0 * gamma(weight_KD.shape[1] + 4))
    error_K = (size_K * relative + weight_KD.shape[1] * 2.0**-1022) * _SLACK
    error_K[~np.any(weight_KD, axis=1)] = 0.0
    error_K[out_of_range(weight_KD, U)] = math.inf
    return rows_KD, error_K


def pair_norms(weight: ArrayLike, eps: float = 1e-12, *, normalize: bool = True) -> Array:
    """Upper bounds of ||w_i - w_j|| for every two rows of the head, (K, K); exactly 0 where stored rows are equal.

    Args:
        weight: stored rows, (K, D). eps: see :func:`normalized_rows`. normalize: False for a plain linear head.

    Raises:
        ValueError: as :func:`normalized_rows`.

    Source: the difference, D squares and their sum carry gamma_{D+2}; the rows' own errors add by the triangle
    inequality.
    """
    if normalize:
        rows_KD, error_K = normalized_rows(weight, eps)
        weight_KD = _matrix(weight)
    else:
        rows_KD = weight_KD = _matrix(weight)
        error_K = np.zeros(len(rows_KD))
    count, width = rows_KD.shape
    norms_KK = np.zeros((count, count))
    growth = 1.0 + 2.0 * gamma(width + 8)
    for i in range(count - 1):
        later = slice(i + 1, count)
        with np.errstate(over="ignore"):  # an infinite norm certifies nothing, which is right
            difference = rows_KD[later] - rows_KD[i]
            length = np.sqrt(np.einsum("kd,kd->k", difference, difference)) * growth + width * 2.0**-500
            bound = (length + error_K[i] + error_K[later]) * _SLACK
        bound[np.all(weight_KD[later] == weight_KD[i], axis=1)] = 0.0
        norms_KK[i, later] = norms_KK[later, i] = bound
    return norms_KK


def margin_errors(
    features: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    features_error: ArrayLike,
    unit_roundoff: float = U,
    *,
    predictions: ArrayLike,
    eps: float = 1e-12,
    normalize: bool = True,
    norms: ArrayLike | None = None,
) -> Array:
    """How far each computed margin f_i - f_j may be from the exact network's, i the predicted class: (B, K).

    Args:
        features: computed features z^, (B, D). weight, bias: the head's stored rows (K, D) and bias (K,) or None.
        features_error: bound of ||z^ - z||, a number or (B,).
        unit_roundoff: of the dtype the head ran in: 2**-53, 2**-24 or 2**-8.
        predictions: the class i of each image, (B,). eps, normalize: see :func:`pair_norms`.
        norms: what :func:`pair_norms` returned, where it is at hand.

    Raises:
        ValueError: wrong shapes, a negative or NaN features_error, an unknown unit roundoff, or a width for which the
            dot-product model says nothing in that precision (bfloat16 beyond about 120 features).

    Source: with w^ the computed rows and d_l the rounding of logit l, the error of the margin is exactly
    (w_i - w_j)(z^ - z) + (w^_i - w_i) z^ - (w^_j - w_j) z^ + d_i - d_j. The first term is at most
    ||w_i - w_j|| features_error; |w^ - w| <= rho |w| entry by entry; and a sum of D products and a bias, *in any
    order*, has |d_l| <= gamma_{D+1} (|w^_l| |z^| + |b_l|). (A bias taken as the first summand collects as many
    roundings as the products do, so 2u|b| would not do for every library.)
    """
    weight_KD, features_BD = _matrix(weight), np.asarray(features, dtype=np.float64)
    count, width = weight_KD.shape
    top_B = np.asarray(predictions, dtype=np.int64)
    error_B = np.broadcast_to(np.asarray(features_error, dtype=np.float64), top_B.shape)
    bias_K = np.zeros(count) if bias is None else np.asarray(bias, dtype=np.float64)
    if features_BD.shape != (len(top_B), width) or bias_K.shape != (count,):
        raise ValueError(
            f"features {features_BD.shape}, weight {weight_KD.shape}, bias {bias_K.shape}, predictions {top_B.shape}:"
            " expected (B, D), (K, D), (K,) and (B,)"
        )
    if not np.all(error_B >= 0.0):
        raise ValueError("features_error holds a negative or NaN value: pass the bound that the certificate states")
    per_class_BK = _logit_errors(features_BD, weight_KD, bias_K, unit_roundoff, eps, normalize)
    norms_KK = pair_norms(weight_KD, eps, normalize=normalize) if norms is None else np.asarray(norms, dtype=np.float64)
    rows_BK = norms_KK[top_B]
    with np.errstate(invalid="ignore", over="ignore"):  # 0 * inf: equal rows do not feel the features' error
        moved_BK = np.where(rows_BK == 0.0, 0.0, rows_BK * error_B[:, None])
        errors_BK = (moved_BK + per_class_BK + np.take_along_axis(per_class_BK, top_B[:, None], axis=1)) * _SLACK
    np.put_along_axis(errors_BK, top_B[:, None], 0.0, axis=1)
    return errors_BK


def certified_radius(
    logits: ArrayLike, pair_norms: ArrayLike, lipschitz: float, margin_error: ArrayLike = 0.0
) -> Array:
    """The l2 radius, in the units of the input of ``lipschitz``, inside which each prediction cannot change: (B,).

    Args:
        logits: (B, K). pair_norms: upper bounds of ||w_i - w_j||, (K, K), row i for top class i.
        lipschitz: upper bound of the *features'* Lipschitz constant, finite and > 0 (not of the logits').
        margin_error: bound of the error of the computed f_i - f_j, anything that broadcasts to (B, K).

    Returns:
        min over j != i of (f_i - f_j - e_ij) / (L ||w_i - w_j||), denominator rounded up, numerator and quotient down,
        never negative. 0 for a tie and for an image whose logits or errors are not finite. Where w_i = w_j the
        features cannot change the margin: that j limits nothing if the margin is positive, and the radius is 0 if it
        is not. So the radius can be infinite.

    Raises:
        ValueError: lipschitz not finite or not positive; pair norms or margin errors negative, norms NaN; wrong shapes.
    """
    if not (math.isfinite(lipschitz) and lipschitz > 0.0):
        raise ValueError(f"the Lipschitz bound is {lipschitz!r}: a radius needs a finite bound greater than 0")
    logits_BK = np.asarray(logits, dtype=np.float64)
    norms_KK = np.asarray(pair_norms, dtype=np.float64)
    if logits_BK.ndim != 2 or logits_BK.shape[1] == 0 or norms_KK.shape != (logits_BK.shape[1],) * 2:
        raise ValueError(
            f"logits {logits_BK.shape} and pair norms {norms_KK.shape} do not fit: expected (B, K) and (K, K)"
        )
    if not np.all(norms_KK >= 0.0):
        raise ValueError("a pair norm is negative or NaN: compute them with pair_norms(weight, eps)")
    error_BK = np.broadcast_to(np.asarray(margin_error, dtype=np.float64), logits_BK.shape)
    if np.any(error_BK < 0.0):
        raise ValueError("a margin error is negative: it bounds the size of an error")
    with np.errstate(all="ignore"):
        return _radii(logits_BK, norms_KK, float(lipschitz), error_BK)


def certified_accuracy(radii: ArrayLike, correct: ArrayLike, epsilon: float) -> float:
    """The fraction of images that are classified correctly and whose radius exceeds ``epsilon``.

    Args:
        radii: (B,). correct: (B,) booleans. epsilon: in the radii's units, >= 0; at 0 an image counts if its radius is
            > 0.

    Raises:
        ValueError: no images, different lengths, or an epsilon that is negative, infinite or NaN.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise ValueError(f"epsilon is {epsilon!r}: give a finite radius of at least 0, in pixel units")
    radii_B, correct_B = np.asarray(radii, dtype=np.float64), np.asarray(correct, dtype=bool)
    if radii_B.ndim != 1 or radii_B.shape != correct_B.shape or radii_B.size == 0:
        raise ValueError(
            f"radii {radii_B.shape} and correct {correct_B.shape} must be vectors of one length, at least 1"
        )
    return float(np.mean(correct_B & (radii_B > epsilon)))


def _radii(logits_BK: Array, norms_KK: Array, lipschitz: float, error_BK: Array) -> Array:
    """The formula itself, each operation followed by a step to the neighbouring float on the safe side."""
    top_B1 = np.argmax(logits_BK, axis=1)[:, None]
    norms_BK = norms_KK[top_B1[:, 0]]
    margin_BK = _down(np.take_along_axis(logits_BK, top_B1, axis=1) - logits_BK)
    surplus_BK = np.where(error_BK == 0.0, margin_BK, _down(margin_BK - error_BK))
    quotient_BK = _down(surplus_BK / np.nextafter(lipschitz * norms_BK, np.inf))
    limit_BK = np.where(norms_BK == 0.0, np.inf, quotient_BK)
    limit_BK = np.where(surplus_BK > 0.0, limit_BK, 0.0)  # also where the error is NaN
    np.put_along_axis(limit_BK, top_B1, np.inf, axis=1)
    radii_B = np.maximum(np.min(limit_BK, axis=1), 0.0)
    return np.where(np.all(np.isfinite(logits_BK), axis=1), radii_B, 0.0)


def _down(values: Array) -> Array:
    return np.nextafter(values, -np.inf)


def _logit_errors(
    features_BD: Array, weight_KD: Array, bias_K: Array, unit_roundoff: float, eps: float, normalize: bool
) -> Array:
    """(B, K): bound of |(w^_l - w_l) z^| + |d_l|, the part of a logit's error that the head itself makes."""
    if unit_roundoff not in _SAFE_EXPONENT:
        raise ValueError(
            f"unit roundoff {unit_roundoff!r} is that of none of {', '.join(UNIT_ROUNDOFF)}: pass 2.0**-53 for float64"
        )
    width = weight_KD.shape[1]
    dot = gamma(width + 1, unit_roundoff)
    rows_KD = _normalize(weight_KD, eps)[0] if normalize else weight_KD
    row = _row_error(width, unit_roundoff) if normalize else 0.0
    if not math.isfinite(dot) or not math.isfinite(row):
        raise ValueError(
            f"{width} features are too many for a rounding bound at unit roundoff {unit_roundoff!r}: certify in float64"
        )
    growth = (1.0 + 2.0 * gamma(width + 4)) * (1.0 + (_row_error(width, U) if normalize else 0.0))
    size_BD = np.abs(features_BD)
    with np.errstate(invalid="ignore", over="ignore"):
        products_BK = size_BD @ np.abs(rows_KD).T * growth
        lost_B1 = (size_BD.sum(axis=1, keepdims=True) * growth + width + 4.0) * _FLUSHED
        errors_BK = ((row + dot * (1.0 + row)) * products_BK + dot * np.abs(bias_K) + lost_B1) * _SLACK
    if normalize:
        errors_BK[:, out_of_range(weight_KD, unit_roundoff)] = math.inf
    return errors_BK


def _row_error(width: int, unit_roundoff: float) -> float:
    """The relative error of every entry of a normalised row, measured against the computed or the exact entry."""
    factor = gamma(2 * width + 8, unit_roundoff)
    return factor / (1.0 - factor) * _SLACK if factor < 0.5 else math.inf


def out_of_range(weight_KD: Array, unit_roundoff: float) -> NDArray[np.bool_]:
    """Rows, not zero, whose squares could overflow or vanish in the forward pass."""
    largest_K = np.max(np.abs(weight_KD), axis=1, initial=0.0)
    reach = 2.0 ** _SAFE_EXPONENT[unit_roundoff]
    return (largest_K > reach) | ((largest_K > 0.0) & (largest_K < 1.0 / reach))


def _normalize(weight: ArrayLike, eps: float) -> tuple[Array, Array]:
    """Rows divided as the forward pass divides them, and the weight itself in float64."""
    weight_KD = _matrix(weight)
    if not (math.isfinite(eps) and eps > 0.0):
        raise ValueError(f"the floor of the row norms is eps = {eps!r}: it must be finite and greater than 0")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norm_K = np.sqrt(np.einsum("kd,kd->k", weight_KD, weight_KD))
        return weight_KD / np.maximum(norm_K, eps)[:, None], weight_KD


def _matrix(weight: ArrayLike) -> Array:
    weight_KD = np.asarray(weight, dtype=np.float64)
    if weight_KD.ndim != 2 or weight_KD.size == 0:
        raise ValueError(f"the head's weight has shape {weight_KD.shape}: expected (classes, features)")
    if not np.all(np.isfinite(weight_KD)):
        raise ValueError("the head's weight holds NaN or infinite values: nothing can be certified with it")
    return weight_KD
