"""Rows for pointwise and parametric activations, on samples of every kind."""

from __future__ import annotations

from tests.bounds.row import Row

_IMAGE, _TOKENS, _TOKEN = (2, 2, 3), (3, 4), (6,)

ROWS: tuple[Row, ...] = (
    Row("relu", "relu@1", (_IMAGE,)),
    Row("relu of one token", "relu@1", (_TOKEN,)),
    Row("leaky relu", "leaky_relu@1", (_TOKENS,), {"slope": 0.01}),
    Row("leaky relu with a steep slope", "leaky_relu@1", (_IMAGE,), {"slope": -3.7}),
    Row("prelu", "prelu@1", (_TOKENS,), vectors={"weight": (1,)}),
    Row("prelu of channels", "prelu@1", (_IMAGE,), vectors={"weight": (2,)}),
    Row("prelu of the first axis of tokens", "prelu@1", (_TOKENS,), vectors={"weight": (3,)}),
    Row("prelu of one token", "prelu@1", (_TOKEN,), vectors={"weight": (6,)}),
    Row("elu", "elu@1", (_IMAGE,), {"alpha": 1}),
    Row("elu with a steep slope", "elu@1", (_TOKENS,), {"alpha": 2.5}),
    Row("elu with a negative slope", "elu@1", (_TOKENS,), {"alpha": -1.3}),
    Row("celu", "celu@1", (_IMAGE,), {"alpha": 0.3}),
    Row("celu with a wide bend", "celu@1", (_TOKENS,), {"alpha": 7}),
    Row("selu", "selu@1", (_TOKENS,)),
    Row("relu6", "hardtanh@1", (_IMAGE,), {"low": 0, "high": 6}),
    Row("hardtanh", "hardtanh@1", (_TOKENS,), {"low": -0.1, "high": 1.7}),
    Row("hardtanh away from zero", "hardtanh@1", (_TOKENS,), {"low": 0.3, "high": 2}),
    Row("hardtanh below zero", "hardtanh@1", (_TOKENS,), {"low": -3, "high": -0.7}),
    Row("gelu", "gelu@1", (_TOKENS,), {"approximate": "none"}),
    Row("gelu of an image", "gelu@1", ((1, 3, 4),), {"approximate": "none"}),
    Row("gelu by tanh", "gelu@1", (_TOKENS,), {"approximate": "tanh"}),
    Row("silu", "silu@1", (_IMAGE,), {"beta": 1}),
    Row("quick gelu", "silu@1", (_TOKENS,), {"beta": 1.702}),
    Row("silu turned round", "silu@1", (_TOKENS,), {"beta": -0.4}),
    Row("mish", "mish@1", (_TOKENS,)),
    Row("tanh", "tanh@1", (_IMAGE,)),
    Row("sigmoid", "sigmoid@1", (_TOKENS,)),
    Row("sigmoid of one token", "sigmoid@1", (_TOKEN,)),
    Row("hardsigmoid", "hardsigmoid@1", (_IMAGE,)),
    Row("hardswish", "hardswish@1", (_IMAGE,)),
    Row("softplus", "softplus@1", (_TOKENS,), {"beta": 1, "threshold": 20}),
    Row("softplus of an image", "softplus@1", (_IMAGE,), {"beta": 0.25, "threshold": 30.5}),
    Row("softplus, nearly relu", "softplus@1", (_TOKEN,), {"beta": 90.0, "threshold": 20}),
    Row("softsign", "softsign@1", (_TOKENS,)),
    Row("logsigmoid", "logsigmoid@1", (_TOKENS,)),
    Row("softshrink", "softshrink@1", (_IMAGE,), {"lambda": 0.45}),
    Row("softshrink by nothing", "softshrink@1", (_TOKENS,), {"lambda": 0}),
    Row("tanhshrink", "tanhshrink@1", (_TOKENS,)),
    Row("householder", "householder@1", (_TOKENS,), vectors={"angle": (2,)}),
    Row("householder of one token", "householder@1", (_TOKEN,), vectors={"angle": (3,)}),
    Row("n-activation", "n_activation@1", (_TOKENS,), vectors={"first": (4,), "second": (4,)}),
    Row("n-activation of an image", "n_activation@1", (_IMAGE,), vectors={"first": (2,), "second": (2,)}),
)
