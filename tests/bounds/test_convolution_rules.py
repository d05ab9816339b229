"""What the tables cannot say of convolutions, pools and normalisation layers: refusals, explicit operators of random
shapes, the folding of BatchNorm, bfloat16, and cases where rounding is the claim's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from hf_lipschitz.bounds.engine import bound_program
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import UNIT_ROUNDOFF, Array
from hf_lipschitz.bounds.rule import Size
from hf_lipschitz.bounds.rules.convolution import ConvolutionBatchNorm
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds import cases_convolution, cases_normalization, cases_pooling
from tests.bounds.row import Example, Row
from tests.bounds.search import ask, claimed_constant, execute, token_norms

_PLAIN = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}
_CIRCULAR = {**_PLAIN, "padding_mode": "circular"}
_POOL = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "ceil": False}
_MAX, _AVERAGE = {**_POOL, "dilation": [1, 1]}, {**_POOL, "count_padding": True}


def _example(op: str, attrs: Mapping[str, Any], shape: tuple[int, ...], **tensors: Array) -> Example:
    slots = {slot: slot for slot in tensors}
    return Example(Node(op, (0,), dict(attrs), slots), (shape,), tensors)


def _ones(*shape: int) -> Array:
    return np.ones(shape, dtype=np.float32)


def _operator(example: Example) -> Array:
    """(outputs, inputs): the linear part of an affine operation, column by column."""
    count = math.prod(example.shapes[0])
    basis = torch.eye(count, dtype=torch.float64).reshape(count, *example.shapes[0])
    values = execute(example, [torch.cat([basis, torch.zeros_like(basis[:1])])]).flatten(1)
    return (values[:-1] - values[-1]).T.numpy()


_REFUSED = [
    ("convolution@1", _PLAIN, (2, 3), {"weight": _ones(1, 2, 1, 1)}, "takes an image"),
    ("convolution@1", _PLAIN, (3, 3, 3), {"weight": _ones(1, 2, 1, 1)}, "does not fit"),
    ("convolution@1", _PLAIN, (2, 3, 3), {"weight": _ones(1, 2)}, "does not fit"),
    ("convolution@1", {**_PLAIN, "groups": 2}, (4, 3, 3), {"weight": _ones(3, 2, 1, 1)}, "does not fit"),
    ("convolution@1", {**_PLAIN, "groups": 2}, (2, 3, 3), {"weight": _ones(4, 2, 1, 1)}, "does not fit"),
    ("convolution@1", _PLAIN, (2, 3, 3), {"weight": _ones(1, 2, 1, 1), "bias": _ones(2)}, "'bias' has shape"),
    ("convolution@1", _PLAIN, (2, 3, 3), {"weight": _ones(1, 2, 2, 4)}, "spans 4 pixels exceeds 3"),
    ("convolution@1", {**_PLAIN, "dilation": [3, 1]}, (2, 3, 3), {"weight": _ones(1, 2, 2, 2)}, "spans 4 pixels"),
    ("convolution@1", {**_PLAIN, "stride": [0, 1]}, (2, 3, 3), {"weight": _ones(1, 2, 1, 1)}, "'stride'"),
    ("convolution@1", {**_PLAIN, "padding": [1]}, (2, 3, 3), {"weight": _ones(1, 2, 1, 1)}, "'padding'"),
    ("convolution@1", {**_PLAIN, "padding_mode": "reflect"}, (2, 3, 3), {"weight": _ones(1, 2, 1, 1)}, "padding_mode"),
    ("convolution@1", {**_PLAIN, "padding_mode": "replicate"}, (2, 3, 3), {"weight": _ones(1, 2, 1, 1)}, "_mode"),
    ("convolution@1", {**_CIRCULAR, "padding": [2, 0]}, (2, 4, 4), {"weight": _ones(1, 2, 4, 1)}, "use a pixel twice"),
    ("convolution@1", {**_CIRCULAR, "padding": [0, 1]}, (2, 4, 4), {"weight": _ones(1, 2, 2, 2)}, "use a pixel twice"),
    (
        "convolution@1",
        {**_CIRCULAR, "padding": [0, 1], "stride": [1, 2]},
        (1, 1, 5),
        {"weight": _ones(1, 1, 3)},
        "the stride 2 divides 5: pad with zeros",
    ),
    (
        "transposed_convolution@1",
        {**_CIRCULAR, "output_padding": [0, 0]},
        (1, 2, 2),
        {"weight": _ones(1, 1, 2, 2)},
        "'padding_mode'",
    ),
    (
        "transposed_convolution@1",
        {**_PLAIN, "output_padding": [0, 0], "padding": [1, 0]},
        (1, 1, 1),
        {"weight": _ones(1, 1, 2, 2)},
        "leaves nothing",
    ),
    (
        "transposed_convolution@1",
        {**_PLAIN, "output_padding": [0, 0]},
        (2, 2, 2),
        {"weight": _ones(1, 2, 1, 1)},
        "does not fit",
    ),
    ("max_pool@1", _MAX, (2, 3), {}, "takes an image"),
    ("max_pool@1", {**_MAX, "kernel": [4, 1]}, (2, 3, 3), {}, "spans 4 pixels exceeds 3"),
    ("max_pool@1", {**_MAX, "padding": [2, 0]}, (2, 3, 3), {}, "holds padding alone"),
    ("max_pool@1", {**_MAX, "dilation": [3, 1], "padding": [1, 0]}, (2, 2, 3), {}, "holds padding alone"),
    ("average_pool@1", {**_AVERAGE, "padding": [0, 3]}, (2, 3, 3), {}, "holds padding alone"),
    ("average_pool@1", {**_AVERAGE, "kernel": [4096, 1], "stride": [1, 1]}, (1, 9000, 1), {}, "too many"),
    ("mean_pool@1", {}, (3,), {}, "takes tokens or an image"),
    ("batch_norm@1", {"eps": 1e-5}, (2, 3), {"mean": _ones(2), "variance": _ones(3)}, "'mean' has shape"),
    ("batch_norm@1", {"eps": 1e-5}, (2, 3), {"mean": _ones(3), "variance": -_ones(3)}, "negative variance"),
    ("batch_norm@1", {"eps": 0.0}, (2, 3), {"mean": _ones(3), "variance": _ones(3)}, "'eps'"),
    ("batch_norm@1", {"eps": 1e-5}, (2, 3), {"mean": _ones(3)}, "'variance' is missing"),
    ("layer_norm@1", {"eps": 1e-5}, (2, 3, 3), {}, "last axis of tokens"),
    ("rms_norm@1", {"eps": 1e-5}, (2, 3), {"weight": _ones(2)}, "'weight' has shape"),
]


@pytest.mark.parametrize(("op", "attrs", "shape", "tensors", "message"), _REFUSED)
def test_refusals(op: str, attrs: Mapping[str, Any], shape: Any, tensors: Mapping[str, Array], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        rule, call = ask(_example(op, attrs, shape, **tensors))
        rule.shape(call)


def test_the_refused_paddings_do_exceed_the_norm_of_the_kernel() -> None:
    """Why they are refused: three ones at stride 2, and circular padding by more than the kernel covers."""
    for attrs, size, larger in (({"stride": [1, 2]}, 5, 6), ({"padding": [0, 2]}, 3, 300)):
        given = {**_CIRCULAR, "padding": [0, 1], **attrs}
        refused = _example("convolution@1", given, (1, 1, size), weight=_ones(1, 1, 3))
        accepted = _example("convolution@1", {**given, "padding": [0, 1]}, (1, 1, larger), weight=_ones(1, 1, 3))
        assert np.linalg.norm(_operator(refused), 2) > claimed_constant(accepted, "l2") * 1.05


def test_a_dilation_that_shares_a_factor_with_the_stride() -> None:
    """Stride 2 and dilation 2 read every second pixel: the norm is that at stride 1, not that at stride 2."""
    node = {"padding": [0, 2], "stride": [1, 2], "dilation": [1, 2]}
    both = _example("convolution@1", {**_CIRCULAR, **node}, (1, 1, 16), weight=_ones(1, 1, 3))
    stride = _example("convolution@1", {**_PLAIN, "stride": [1, 2]}, (1, 1, 16), weight=_ones(1, 1, 3))
    assert claimed_constant(both, "l2") >= np.linalg.norm(_operator(both), 2) > 1.3 * claimed_constant(stride, "l2")


def _random_convolution(seed: int) -> Example:
    """A convolution of any kind with shapes that the rule accepts or refuses."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2]))
    into, out = (groups * int(rng.integers(1, 3)) for _ in range(2))
    attrs = {key: rng.integers(low, high, 2).tolist() for key, low, high in _RANGES}
    attrs |= {"groups": groups, "padding_mode": str(rng.choice(["zeros", "circular"]))}
    kernel, size = rng.integers(1, 4, 2), rng.integers(1, 6, 2)
    op = str(rng.choice(["convolution@1", "convolution_batch_norm@1", "transposed_convolution@1"]))
    rows, columns = (into, out // groups) if op.startswith("transposed") else (out, into // groups)
    tensors = {"weight": rng.standard_normal((rows, columns, *kernel)), "bias": rng.standard_normal(out)}
    if op.startswith("transposed"):
        least = np.maximum(attrs["stride"], attrs["dilation"])
        attrs |= {"padding_mode": "zeros", "output_padding": rng.integers(0, least).tolist()}
    if op.endswith("norm@1"):
        attrs["eps"] = 1e-3
        tensors |= {slot: np.abs(rng.standard_normal(out)) for slot in ("mean", "variance", "gamma", "beta")}
    given = {slot: tensor.astype(np.float32) for slot, tensor in tensors.items()}
    return _example(op, attrs, (into, *size.tolist()), **given)


_RANGES = (("stride", 1, 4), ("padding", 0, 4), ("dilation", 1, 4))


def test_random_convolutions_against_their_explicit_operators() -> None:
    """Both constants, the norm with absolute values and the meaning, wherever the rule accepts."""
    accepted = 0
    for seed in range(240):
        example = _random_convolution(seed)
        rule, call = ask(example)
        try:
            shape = rule.shape(call)
        except KernelError:
            continue
        accepted += 1
        x = np.random.default_rng(seed).standard_normal((2, *example.shapes[0]))
        expected = execute(example, [torch.from_numpy(x)]).numpy()
        assert expected.shape[1:] == shape
        assert np.allclose(rule.apply(call, x), expected, rtol=1e-12, atol=1e-12)
        operator = _operator(example)
        assert np.linalg.norm(operator, 2) <= claimed_constant(example, "l2") * (1.0 + 1e-12)
        assert np.linalg.norm(np.abs(operator), 2) <= rule._absolute(call) * (1.0 + 1e-12)
        assert _token_gain_reached(operator, example.shapes[0], shape) <= claimed_constant(example, "token_max")
    assert accepted > 100


def _token_gain_reached(operator: Array, into: Any, out: Any) -> float:
    """A ratio in ``token_max``: for each output pixel, inputs aligned with its first singular vectors."""
    blocks = operator.reshape(out[0], -1, into[0], into[1] * into[2])
    reached = 0.0
    for pixel in range(blocks.shape[1]):
        taps = blocks[:, pixel]
        direction = np.linalg.svd(taps.reshape(out[0], -1), full_matrices=False)[0][:, 0]
        moved = np.einsum("o,oim->im", direction, taps)
        unit = moved / np.maximum(np.linalg.norm(moved, axis=0), 1e-300)
        reached = max(reached, float(np.linalg.norm(np.einsum("oim,im->o", taps, unit))))
    return reached * (1.0 - 1e-12)


def test_rounding_of_the_folded_kernel_is_counted() -> None:
    """The float64 kernel strays from the exact one, and by no more than what is added to its norms."""
    rng, worst = np.random.default_rng(3), 0.0
    for scale in (1.0, 1e-30, 1e-150, 1e120):
        tensors = {slot: rng.standard_normal(2) for slot in ("mean", "gamma", "beta")}
        example = _example(
            "convolution_batch_norm@1",
            {**_PLAIN, "eps": 1e-5},
            (2, 4, 4),
            weight=rng.standard_normal((2, 2, 3, 3)) * scale,
            variance=np.abs(rng.standard_normal(2)),
            **tensors,
        )
        rule, call = ask(example)
        assert isinstance(rule, ConvolutionBatchNorm)
        kernel, slip = rule._kernel(call)
        with mpmath.workdps(50):
            exact = [
                mpmath.mpf(float(w)) * mpmath.mpf(float(g)) / mpmath.sqrt(mpmath.mpf(float(v)) + mpmath.mpf(1e-5))
                for w, g, v in zip(
                    example.weights["weight"].ravel(),
                    np.repeat(example.weights["gamma"], 18),
                    np.repeat(example.weights["variance"], 18),
                    strict=True,
                )
            ]
            lacks = [float(abs(mpmath.mpf(float(k)) - e)) for k, e in zip(kernel.ravel(), exact, strict=True)]
        taps = np.asarray(lacks).reshape(kernel.shape).transpose(2, 3, 0, 1).reshape(9, -1)
        lost = sum(math.hypot(*tap) for tap in taps)
        assert 0.0 < lost <= slip <= 1e-13 * np.abs(kernel).sum()
        worst = max(worst, lost / slip)
    assert worst > 0.02  # counted in the right unit


def test_a_convolution_that_overflows_before_its_batch_norm_has_no_rounding_bound() -> None:
    statistics = {"mean": _ones(1), "variance": _ones(1), "gamma": _ones(1) * np.float32(2.0**-100)}
    example = _example(
        "convolution_batch_norm@1", {**_PLAIN, "eps": 1e-5}, (1, 1, 1), weight=_ones(1, 1, 1, 1), **statistics
    )
    rule, call = ask(example, roundoff=UNIT_ROUNDOFF["float32"])
    small, large = (rule.rounding(call, UNIT_ROUNDOFF["float32"], (Size(x, x),)) for x in (2.0**50, 2.0**61))
    assert small < 1.0 and large == math.inf


def test_zero_padding_that_only_pads() -> None:
    """A kernel that never meets the image gives the bias everywhere; the bound stays above zero and finite."""
    example = _example(
        "convolution@1", {**_PLAIN, "padding": [4, 4], "dilation": [3, 3]}, (1, 1, 1), weight=_ones(1, 1, 2, 2)
    )
    assert np.linalg.norm(_operator(example), 2) <= claimed_constant(example, "l2") < 10.0


_ROOMS = (*cases_convolution.ROWS, *cases_normalization.ROWS, *cases_pooling.ROWS)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in _ROOMS])
def test_rounding_in_bfloat16(row: Row) -> None:
    """bfloat16 execution with bfloat16 weights against float64 execution, within the local bound."""
    example = _in_bfloat16(row.example("gaussian"))
    rule, call = ask(example, roundoff=UNIT_ROUNDOFF["bfloat16"])
    rng = np.random.default_rng(5)
    values = torch.from_numpy(rng.standard_normal((4, *example.shapes[0]))).to(torch.bfloat16)
    errors = (execute(example, [values]).double() - execute(example, [values.double()])).flatten(1).norm(dim=1)
    for value, error in zip(values.double().numpy(), errors, strict=True):
        size = Size(float(token_norms(value[None]).max()), float(np.linalg.norm(value)))
        assert float(error) <= rule.rounding(call, UNIT_ROUNDOFF["bfloat16"], (size,))


def _in_bfloat16(example: Example) -> Example:
    weights = {name: torch.tensor(tensor).bfloat16().float().numpy() for name, tensor in example.weights.items()}
    return Example(example.node, example.shapes, weights)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("conv to one channel", 60),
        ("conv batch norm 1 x 1", 60),
        ("transposed conv of patches", 60),
        ("batch norm", 60),
        ("rms norm", 60),
        ("mean pool of an image", 60),
        ("average pool", 60),
    ],
)
def test_rounding_is_not_vacuous(name: str, factor: float) -> None:
    example = next(row for row in _ROOMS if row.name == name).example("gaussian")
    roundoff = UNIT_ROUNDOFF["float32"]
    rule, call = ask(example, roundoff=roundoff)
    values = torch.from_numpy(np.random.default_rng(6).standard_normal((64, *example.shapes[0]))).float()
    errors = (execute(example, [values]).double() - execute(example, [values.double()])).flatten(1).norm(dim=1)
    bounds = [
        rule.rounding(call, roundoff, (Size(float(token_norms(v[None]).max()), float(np.linalg.norm(v))),))
        for v in values.double().numpy()
    ]
    ratio = float((errors / torch.tensor(bounds)).max())
    assert 1.0 / factor < ratio <= 1.0


def test_rounding_of_layer_norm_on_tokens_that_are_nearly_constant() -> None:
    """Centring cancels: the error is that of the mean, over sqrt(eps); where it may reach eps there is no bound."""
    example = _example("layer_norm@1", {"eps": 1e-3}, (2, 16))
    rule, call = ask(example, roundoff=UNIT_ROUNDOFF["float32"])
    noise = np.random.default_rng(0).standard_normal((200, 2, 16))
    x = torch.from_numpy(3.0 + 0.01 * noise).float()
    errors = (execute(example, [x]).double() - execute(example, [x.double()])).flatten(1).norm(dim=1)
    token, total = float(x.double().norm(dim=2).max()), float(x.double().flatten(1).norm(dim=1).max())
    bound = rule.rounding(call, UNIT_ROUNDOFF["float32"], (Size(token, total),))
    relative = UNIT_ROUNDOFF["float32"] * 16 * float(execute(example, [x.double()]).flatten(1).norm(dim=1).max())
    assert relative / 16 < float(errors.max()) <= bound < math.inf
    assert rule.rounding(call, UNIT_ROUNDOFF["float32"], (Size(100.0 * token, 100.0 * total),)) == math.inf
    assert rule.rounding(call, UNIT_ROUNDOFF["float64"], (Size(math.inf, math.inf),)) == math.inf


@pytest.mark.parametrize("op", ["layer_norm@1", "rms_norm@1"])
def test_norms_bound_what_has_no_bound(op: str) -> None:
    """Their value is bounded however large the input is, and they warn of what they do to the constant."""
    rule, call = ask(_example(op, {"eps": 1e-6}, (4, 9), weight=2.0 * _ones(9), bias=_ones(9)))
    size = rule.size(call, (Size(math.inf, math.inf),))
    assert 9.0 <= size.token <= 9.0 * (1.0 + 1e-12) and 18.0 <= size.total <= 18.0 * (1.0 + 1e-12)
    assert rule.gains(call, "l2")[0] >= 2000.0 and "sqrt(eps)" in rule.warning
    assert BUILT_IN["batch_norm@1"].warning == ""


def test_scale_of_batch_norm_is_rounded_up() -> None:
    """Exactly: the gain squared is at least weight^2 / (variance + eps), and hardly more."""
    rng = np.random.default_rng(11)
    for _ in range(50):
        weight, variance = rng.standard_normal(1).astype(np.float32), np.abs(rng.standard_normal(1)).astype(np.float32)
        example = _example("batch_norm@1", {"eps": 1e-5}, (1,), mean=_ones(1), variance=variance, weight=weight)
        gain = Fraction(claimed_constant(example, "l2")) ** 2
        exact = Fraction(float(weight[0])) ** 2 / (Fraction(float(variance[0])) + Fraction(1e-5))
        assert exact <= gain <= exact * (1 + Fraction(1, 10**14))


@pytest.mark.parametrize("op", ["max_pool@1", "average_pool@1"])
def test_pools_of_too_many_windows_are_refused(op: str) -> None:
    """Windows are listed one by one: a million of them in every node would take a verifier days."""
    attrs: dict[str, Any] = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "ceil": False}
    attrs |= {"dilation": [1, 1]} if op == "max_pool@1" else {"count_padding": True}
    first = Node("input@1", attrs={"shape": [1, 1, 65536], "space": "pixels[0,1]"})
    program = Program((first, Node(op, (0,), attrs)), {"features": 1, "logits": 1})
    with pytest.raises(KernelError, match="are too many"):
        bound_program(program, {}, BUILT_IN)
