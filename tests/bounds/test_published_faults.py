"""Soundness faults of published code, each reproduced, each next to what our rule says of the same case.

The unsound formula for attention heads stands in test_attention.py (and its rule in test_attention_forms.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_lipschitz.bounds.engine import bound_program, evaluate_program
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.spectral import spectral_norm_upper
from hf_lipschitz.evaluation.radii import certified_radius

_PLAIN = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}


def _chain(shape: tuple[int, ...], *nodes: Node) -> Program:
    last = len(nodes)
    first = Node("input@1", attrs={"shape": list(shape), "space": "model_input"})
    return Program((first, *nodes), {"features": last, "logits": last})


def _bound(program: Program, weights: dict[str, Array]) -> float:
    return bound_program(program, weights, BUILT_IN).outputs["logits"].lipschitz


def _operator_norm(program: Program, weights: dict[str, Array], shape: tuple[int, ...]) -> float:
    """The largest singular value of a linear program, from its explicit matrix."""
    basis = np.eye(math.prod(shape)).reshape(-1, *shape)
    return float(
        np.linalg.norm(evaluate_program(program, weights, BUILT_IN, basis)["logits"].reshape(len(basis), -1), 2)
    )


@pytest.mark.parametrize("logits", [[0.0, 0.0], [1.0, 1.0, -2.0], [3.0, 3.0, 3.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_a_tie_is_not_robust(logits: list[float]) -> None:
    """gloro, issue 9: every entry equal to the top one was masked, so that a tie was certified."""
    count = len(logits)
    norms = math.sqrt(2.0) * (1.0 - np.eye(count))
    runner_up = np.where(np.asarray(logits) == np.nanmax(logits), -math.inf, logits).max()
    assert not np.nanmax(logits) - runner_up <= 0.0  # what the fault computes: a margin that is not 0
    assert certified_radius(np.array([logits]), norms, 1.0)[0] == 0.0


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e-30])
def test_an_estimate_is_not_a_bound(scale: float) -> None:
    """gloro, issue 8, and others: power iteration reads too little: slow spectra, unlucky starts, tiny weights."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    weight = (scale * q @ np.diag(np.linspace(0.98, 1.0, 64)) @ q.T).astype(np.float32)
    v = torch.ones(64)
    w = torch.from_numpy(weight)
    for _ in range(20):
        v = w.T @ (w @ v)
        v = v / (v.norm() + 1e-9)
    estimate = float((w @ v).norm() / (v.norm() + 1e-9))
    true = float(np.linalg.norm(weight.astype(np.float64), 2))
    assert estimate < 0.999 * true <= spectral_norm_upper(weight).value <= (1 + 1e-9) * true


def test_groups_are_maximised_not_multiplied() -> None:
    """Norms of the groups of a convolution were multiplied: 0.5 * 0.5 = 0.25 where 0.5 is reached."""
    kernel = np.zeros((4, 2, 3, 3), np.float32)
    kernel[[0, 1, 2, 3], [0, 1, 0, 1], 1, 1] = 0.5
    program = _chain((4, 5, 5), Node("convolution@1", (0,), {**_PLAIN, "groups": 2}, {"weight": "k"}))
    reached = _operator_norm(program, {"k": kernel}, (4, 5, 5))
    assert reached == pytest.approx(0.5)
    assert 0.5 * 0.5 < reached <= _bound(program, {"k": kernel}) < 0.5001


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_coefficient_for_zero_padding(size: int) -> None:
    """sqrt(hw / ((kh - ..)(kw - ..))) for a reshaped kernel of norm one: a constant 3 x 3 kernel exceeds it."""
    kernel = np.full((1, 1, 3, 3), 1.0 / 3.0)  # spectral norm 1 as a matrix of 1 x 9
    border = 2.0 / size  # what a 3 x 3 window loses at the two borders, averaged over the image
    coefficient = 1.0 / (3.0 - border)
    program = _chain((1, size, size), Node("convolution@1", (0,), _PLAIN, {"weight": "k"}))
    weights = {"k": (coefficient * kernel)}
    reached = _operator_norm(program, weights, (1, size, size))
    assert 1.0 < reached <= _bound(program, weights)


def test_a_factor_is_multiplied_never_assumed() -> None:
    """LDLT networks with L != 1: the first layer was divided by L, not multiplied, and the bound assumed the latter."""
    weight = {"w": np.eye(3, dtype=np.float32)}
    linear = Node("linear@1", (0,), {"transpose": False}, {"weight": "w"})
    wanted = 0.5
    divided = _chain((3,), linear, Node("scale@1", (1,), scalars={"factor": ["div", 1, wanted]}))
    multiplied = _chain((3,), linear, Node("scale@1", (1,), scalars={"factor": wanted}))
    assert _bound(divided, weight) >= 2.0 > wanted
    assert wanted <= _bound(multiplied, weight) < wanted + 1e-9


def test_gelu_divided_by_its_constant_has_constant_one() -> None:
    """Its constant was divided out twice: GELU / 1.1289 was counted as 1 / 1.1289."""
    scale = Node("scale@1", (1,), scalars={"factor": ["div", 1, 1.128904145186]})
    program = _chain((1,), Node("gelu@1", (0,), {"approximate": "none"}), scale)
    x = np.array([[math.sqrt(2.0)], [math.sqrt(2.0) + 1e-4]])
    y = evaluate_program(program, {}, BUILT_IN, x)["logits"]
    slope = float((y[1] - y[0])[0] / 1e-4)
    assert 1.0 / 1.1289 < 0.99999 < slope <= _bound(program, {}) < 1.0 + 1e-9


def test_abs_in_a_layer_for_slopes_between_zero_and_one() -> None:
    """x - 2 W^T T^-1 phi(W x) is 1-Lipschitz for slopes in [0, 1]; with abs it is not. Here parts are counted."""
    weight = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    nodes = (
        Node("linear@1", (0,), {"transpose": False}, {"weight": "w"}),
        Node("abs@1", (1,), {"channels": 2}),
        Node("linear@1", (2,), {"transpose": True}, {"weight": "w"}),
        Node("scale@1", (3,), scalars={"factor": -2}),
        Node("add@1", (0, 4)),
    )
    program = _chain((2,), *nodes)
    x = np.array([[-1.0, -1.0], [-1.5, -1.0]])
    y = evaluate_program(program, {"w": weight}, BUILT_IN, x)["logits"]
    reached = float(np.linalg.norm(y[1] - y[0]) / 0.5)
    assert 2.99 < reached <= _bound(program, {"w": weight})


@pytest.mark.parametrize("op", ["dense@1", "hardshrink@1", "glu@1", "softmax@1", "layer_norm@2"])
def test_an_unknown_layer_does_not_count_as_one(op: str) -> None:
    with pytest.raises(KernelError, match=rf"node 1 \({op}\): no rule named '{op}'; known: "):
        _bound(_chain((2,), Node(op, (0,))), {})
