"""Radii against exact rational arithmetic, mpmath, and linear models whose decision boundary has a closed form."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_lipschitz.evaluation.radii import (
    certified_accuracy,
    certified_radius,
    margin_errors,
    normalized_rows,
    pair_norms,
)

HUGE, TINY = 1.7e308, 5e-324


def exact_radius(logits: list[float], norms: np.ndarray, lipschitz: float, errors: list[float]) -> Fraction | None:
    """The formula in exact rationals; None for infinity."""
    top = int(np.argmax(logits))
    limits = []
    for j, value in enumerate(logits):
        if j == top:
            continue
        surplus = Fraction(logits[top]) - Fraction(value) - Fraction(errors[j])
        if surplus <= 0:
            return Fraction(0)
        if norms[top, j] > 0:
            limits.append(surplus / (Fraction(lipschitz) * Fraction(float(norms[top, j]))))
    return min(limits) if limits else None


# logits, margin error, pair norm, what comes out: a lower bound of the exact radius, exactly so where a number is given
CASES = {
    "plain": ([1.0, 0.5, -2.0], 0.0, 1.3, None),
    "tie": ([1.0, 1.0, 0.0], 0.0, 1.0, 0.0),
    "tie of the losers": ([1.0, 0.25, 0.25], 0.0, 1.0, None),
    "all tie": ([0.0, 0.0, 0.0], 0.0, 1.0, 0.0),
    "signed zeros tie": ([0.0, -0.0, -1.0], 0.0, 1.0, 0.0),
    "one step above a tie": ([math.nextafter(1.0, 2.0), 1.0, 0.0], 0.0, 1.0, None),
    "margin below the error": ([1.0, 1.0 - 1e-9, 0.0], 1e-8, 1.0, 0.0),
    "margin equal to the error": ([1.0, 0.5, 0.0], 0.5, 1.0, 0.0),
    "error not representable in the margin": ([1e16, 0.0, 0.0], 1.0 + 2**-30, 1.0, None),
    "huge": ([HUGE, -HUGE, -HUGE], 0.0, 1.0, None),
    "huge over tiny": ([HUGE, -HUGE, -HUGE], 0.0, 1e-300, None),
    "subnormal margin": ([TINY, 0.0, -1.0], 0.0, 1.0, None),
    "quotient underflows": ([2e-300, 1e-300, 0.0], 0.0, 1e300, None),
    "product overflows": ([1.0, 0.0, 0.0], 0.0, HUGE, None),
    "subnormal denominator": ([1e-320, 0.0, -1.0], 0.0, 2e-323, None),
    "nan": ([math.nan, 0.0, 1.0], 0.0, 1.0, 0.0),
    "nan loser": ([2.0, 1.0, math.nan], 0.0, 1.0, 0.0),
    "plus infinity": ([math.inf, 0.0, 0.0], 0.0, 1.0, 0.0),
    "minus infinity": ([1.0, 0.0, -math.inf], 0.0, 1.0, 0.0),
    "nan error": ([1.0, 0.0, 0.0], math.nan, 1.0, 0.0),
    "infinite error": ([1.0, 0.0, 0.0], math.inf, 1.0, 0.0),
    "infinite pair norm": ([1.0, 0.0, 0.0], 0.0, math.inf, 0.0),
    "equal rows, positive margin": ([1.0, 0.0, 0.0], 0.25, 0.0, math.inf),
    "equal rows, tie": ([1.0, 1.0, 0.0], 0.0, 0.0, 0.0),
    "equal rows, margin within the error": ([1.0, 0.9, 0.0], 0.2, 0.0, 0.0),
}


@pytest.mark.parametrize("lipschitz", [1.0, 1 / 3, 4.0373])
@pytest.mark.parametrize("name", CASES)
def test_radius_of_hard_logits(name: str, lipschitz: float) -> None:
    logits, error, norm, expected = CASES[name]
    norms = np.full((3, 3), norm)
    (radius,) = certified_radius([logits], norms, lipschitz, error)
    assert radius >= 0.0
    if expected is not None:
        assert radius == expected
        return
    exact = exact_radius(logits, norms, lipschitz, [error] * 3)
    assert exact is not None and Fraction(float(radius)) <= exact
    if norm > 1e-290 and Fraction(1, 10**290) < exact < 10**300:
        assert Fraction(float(radius)) >= exact * (1 - Fraction(1, 10**7))  # the radius gives nothing else away


floats = st.floats(-1e6, 1e6, allow_nan=False)


@settings(max_examples=150)
@given(
    st.lists(floats, min_size=2, max_size=5),
    st.floats(1e-3, 1e3),
    st.floats(0.0, 1.0),
    st.lists(st.floats(0.0, 3.0), min_size=25, max_size=25),
)
@example([0.0, 2.0**-1074], 1.0, 0.0, [0.0] * 25)
def test_radius_never_exceeds_the_exact_one(logits: list[float], lipschitz: float, error: float, sizes: list[float]):
    count = len(logits)
    norms = np.array(sizes[: count * count]).reshape(count, count)
    (radius,) = certified_radius([logits], norms, lipschitz, error)
    exact = exact_radius(logits, norms, lipschitz, [error] * count)
    if exact is None:
        # A margin is rounded down by one neighbour, so the smallest of all becomes a tie.
        first, second = sorted(logits, reverse=True)[:2]
        assert radius == math.inf or (radius == 0.0 and first - second == 2.0**-1074)
    else:
        assert math.isfinite(radius) and Fraction(float(radius)) <= exact


def test_one_class_cannot_change() -> None:
    assert certified_radius([[3.0]], [[0.0]], 1.0)[0] == math.inf


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lipschitz": 0.0}, "Lipschitz"),
        ({"lipschitz": -1.0}, "Lipschitz"),
        ({"lipschitz": math.inf}, "Lipschitz"),
        ({"lipschitz": math.nan}, "Lipschitz"),
        ({"pair_norms": [[0.0, -1.0], [1.0, 0.0]]}, "pair norm"),
        ({"pair_norms": [[0.0, math.nan], [1.0, 0.0]]}, "pair norm"),
        ({"pair_norms": [[0.0]]}, "do not fit"),
        ({"logits": [1.0, 0.0]}, "do not fit"),
        ({"margin_error": -1e-9}, "negative"),
    ],
)
def test_senseless_arguments_are_refused(options: dict, words: str) -> None:
    arguments = {"logits": [[1.0, 0.0]], "pair_norms": [[0.0, 1.0], [1.0, 0.0]], "lipschitz": 1.0} | options
    with pytest.raises(ValueError, match=words):
        certified_radius(**arguments)


def linear_case(seed: int, classes: int = 4, width: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(classes, width)), rng.normal(size=classes) * 0.1, rng.normal(size=width)


def flips(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, radius: float) -> bool:
    """Whether some point at this distance of x has another class: a linear model's worst points, in 200 bits."""
    logits = weight @ x + bias
    top = int(np.argmax(logits))
    for j in range(len(bias)):
        if j == top:
            continue
        down = weight[j] - weight[top]
        margin = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(-down, x, strict=True))
        margin += Fraction(float(bias[top])) - Fraction(float(bias[j]))
        length = mpmath.sqrt(mpmath.fsum(mpmath.mpf(float(d)) ** 2 for d in down))
        if mpmath.mpf(margin.numerator) / margin.denominator - radius * length < 0:
            return True
    return False


@pytest.mark.parametrize("seed", range(20))
def test_linear_model_flips_just_outside_and_never_inside(seed: int) -> None:
    weight, bias, x = linear_case(seed)
    norms = pair_norms(weight, normalize=False)
    top = np.argmax(weight @ x + bias)
    errors = margin_errors(x[None], weight, bias, 0.0, predictions=[top], normalize=False, norms=norms)
    with mpmath.workprec(200):
        (radius,) = certified_radius((weight @ x + bias)[None], norms, 1.0, errors)
        assert not flips(weight, bias, x, radius)
        assert flips(weight, bias, x, radius * (1 + 1e-6))
        # planted mistakes: the maximum over rivals, and a bound 2 % too low
        logits = weight @ x + bias
        gaps = [(logits[top] - logits[j]) / norms[top, j] for j in range(len(bias)) if j != top]
        assert flips(weight, bias, x, max(gaps))
        assert flips(weight, bias, x, certified_radius(logits[None], norms, 0.98, errors)[0])


def mp_rows(weight: np.ndarray, eps: float) -> list[list[mpmath.mpf]]:
    rows = []
    for row in weight:
        values = [mpmath.mpf(float(v)) for v in row]
        size = max(mpmath.sqrt(mpmath.fsum(v * v for v in values)), mpmath.mpf(eps))
        rows.append([v / size for v in values])
    return rows


def hard_rows(seed: int, dtype: type) -> np.ndarray:
    """Rows that are equal, parallel, almost equal, zero, below eps, and of very different sizes."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=7)
    rows = [base, base, 2 * base, base * (1 + 1e-6), 0 * base, 0 * base, 1e-20 * base, 1e10 * rng.normal(size=7), -base]
    rows.append(base * np.where(np.arange(7) == 3, 1 + 2**-20, 1.0))
    return np.array(rows).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(5))
def test_rows_and_pair_norms_enclose_the_exact_ones(seed: int, dtype: type) -> None:
    weight, eps = hard_rows(seed, dtype), 1e-12
    rows, errors = normalized_rows(weight, eps)
    norms = pair_norms(weight, eps)
    plain = pair_norms(weight, normalize=False)
    with mpmath.workprec(300):
        exact = mp_rows(weight, eps)
        for i, row in enumerate(exact):
            off = mpmath.sqrt(mpmath.fsum((mpmath.mpf(float(a)) - b) ** 2 for a, b in zip(rows[i], row, strict=True)))
            assert off <= errors[i] < 1e-13
        for i in range(len(exact)):
            for j in range(len(exact)):
                true = mpmath.sqrt(mpmath.fsum((a - b) ** 2 for a, b in zip(exact[i], exact[j], strict=True)))
                assert true <= norms[i, j] <= true + mpmath.mpf("1e-13")
                raw = [mpmath.mpf(float(a)) - mpmath.mpf(float(b)) for a, b in zip(weight[i], weight[j], strict=True)]
                assert mpmath.sqrt(mpmath.fsum(r * r for r in raw)) <= plain[i, j]
    assert norms[0, 1] == 0.0 and norms[4, 5] == 0.0 and plain[0, 1] == 0.0  # equal rows are exactly equal
    assert 0.0 < norms[0, 2] < 1e-13  # parallel ones are not known to be


def test_rows_beyond_the_range_of_squares_certify_nothing() -> None:
    weight = np.array([[1e300, 0.0], [1e-300, 0.0], [1.0, 0.0]])
    _, errors = normalized_rows(weight, 1e-12)
    assert list(np.isinf(errors)) == [True, True, False]
    (radius,) = certified_radius([[5.0, 1.0, 1.0]], pair_norms(weight), 1.0)
    assert radius == 0.0


@pytest.mark.parametrize(
    ("weight", "eps", "words"),
    [
        ([[1.0, math.nan]], 1e-12, "NaN"),
        ([[1.0, math.inf]], 1e-12, "NaN"),
        ([1.0, 2.0], 1e-12, "shape"),
        ([[1.0, 2.0]], 0.0, "eps"),
        ([[1.0, 2.0]], math.nan, "eps"),
    ],
)
def test_weights_that_cannot_be_normalised_are_refused(weight: list, eps: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair_norms(weight, eps)


@pytest.mark.parametrize("order", ["bias last", "bias first", "shuffled"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cancelling", [False, True])
def test_margin_errors_cover_the_rounding_of_any_summation_order(order: str, dtype: str, cancelling: bool) -> None:
    """Logits summed sequentially in the dtype, also with a large bias that comes first, against exact arithmetic."""
    rng = np.random.default_rng(3)
    width, classes, eps = 24, 3, 1e-12
    kind = np.dtype(dtype).type
    weight = rng.normal(size=(classes, width)).astype(np.float32)
    features = rng.normal(size=width).astype(kind)
    bias = rng.normal(size=classes).astype(np.float32) * (100.0 if cancelling else 1.0)
    size = np.sqrt(np.sum(np.square(weight.astype(kind)), axis=1, dtype=kind))
    rows = (weight.astype(kind) / np.maximum(size, kind(eps))[:, None]).astype(kind)
    logits = [running_sum(rows[k], features, kind(bias[k]), order, rng) for k in range(classes)]
    moved = features.astype(np.float64) + 1e-7 * rng.normal(size=width)  # the exact features, some way off
    error = float(np.linalg.norm(moved - features)) * (1 + 1e-12)
    bound = margin_errors(
        features[None], weight, bias, error, 2.0**-24 if dtype == "float32" else 2.0**-53, predictions=[0], eps=eps
    )
    assert bound[0, 0] == 0.0
    with mpmath.workprec(200):
        exact = mp_rows(weight, eps)
        truth = [
            mpmath.fdot((w, mpmath.mpf(float(z))) for w, z in zip(exact[k], moved, strict=True))
            + mpmath.mpf(float(bias[k]))
            for k in range(classes)
        ]
        for j in range(1, classes):
            off = abs((mpmath.mpf(float(logits[0])) - mpmath.mpf(float(logits[j]))) - (truth[0] - truth[j]))
            assert off <= bound[0, j]
    assert np.all(bound[0, 1:] < (1e-2 if dtype == "float32" else 1e-6))


@pytest.mark.parametrize("normalize", [True, False])
def test_margin_errors_are_reached_by_features_that_err_towards_a_rival(normalize: bool) -> None:
    weight, _, features = linear_case(1)
    rows = normalized_rows(weight, 1e-12)[0] if normalize else weight
    bound = margin_errors(features[None], weight, None, 1e-3, predictions=[2], normalize=normalize)[0]
    for j in (0, 1, 3):
        towards = (rows[2] - rows[j]) / np.linalg.norm(rows[2] - rows[j])
        off = float((rows[2] - rows[j]) @ (1e-3 * towards))
        assert off * (1 - 1e-12) <= bound[j] <= off * (1 + 1e-9)


def running_sum(
    row: np.ndarray, features: np.ndarray, bias: np.floating, order: str, rng: np.random.Generator
) -> float:
    terms = [a * b for a, b in zip(row, features, strict=True)]
    terms = [bias, *terms] if order == "bias first" else [*terms, bias]
    if order == "shuffled":
        rng.shuffle(terms)
    total = type(bias)(0.0)
    for term in terms:
        total = total + term
    return float(total)


def test_a_bias_that_is_added_first_collects_a_rounding_at_every_step() -> None:
    """Terms just above half a unit in the last place of the running sum: each addition rounds up by almost u |b|."""
    width, u = 128, 2.0**-24
    term = np.float32(u * (1 + 2.0**-20))
    rows = np.stack([np.full(width, term), np.zeros(width)]).astype(np.float32)
    bias, features = np.array([1.0, 0.0], dtype=np.float32), np.ones(width, dtype=np.float32)
    total = running_sum(rows[0], features, bias[0], "bias first", np.random.default_rng(0))
    off = abs(Fraction(total) - (1 + width * Fraction(float(term))))
    bound = margin_errors(features[None], rows, bias, 0.0, u, predictions=[0], normalize=False)[0, 1]
    assert off <= bound
    assert off > 2 * u * 1.0 + width * u * width * float(term)  # what a fixed two roundings of the bias would allow


def test_margin_errors_of_equal_rows_ignore_the_features_error() -> None:
    weight = np.ones((2, 3))
    bound = margin_errors(np.ones((1, 3)), weight, np.zeros(2), math.inf, predictions=[0])
    assert bound[0, 1] < 1e-12
    other = margin_errors(np.ones((1, 3)), np.eye(2, 3), np.zeros(2), math.inf, predictions=[0])
    assert other[0, 1] == math.inf


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features_error": -1.0}, "features_error"),
        ({"features_error": math.nan}, "features_error"),
        ({"unit_roundoff": 1e-3}, "roundoff"),
        ({"features": np.ones((1, 300)), "weight": np.ones((2, 300)), "unit_roundoff": 2.0**-8}, "float64"),
        ({"features": np.ones((1, 4))}, "expected"),
        ({"bias": np.zeros(3)}, "expected"),
    ],
)
def test_margin_errors_refuse_what_they_do_not_cover(options: dict, words: str) -> None:
    arguments = {
        "features": np.ones((1, 3)),
        "weight": np.ones((2, 3)),
        "bias": None,
        "features_error": 0.0,
        "predictions": [0],
    } | options
    with pytest.raises(ValueError, match=words):
        margin_errors(**arguments)


def test_certified_accuracy_counts_correct_and_larger_radii() -> None:
    radii, correct = [0.0, 0.1, 0.2, math.inf, 0.3], [True, True, True, True, False]
    assert certified_accuracy(radii, correct, 0.0) == 0.6  # a tie is not certified at 0
    assert certified_accuracy(radii, correct, 0.1) == 0.4  # larger, not equal
    assert certified_accuracy(radii, correct, 1e9) == 0.2
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            certified_accuracy(radii, correct, bad)
    for pair in (([], []), ([0.1], [True, False])):
        with pytest.raises(ValueError, match="vectors"):
            certified_accuracy(*pair, 0.1)
