"""Random programs: whatever is composed, bound, size and rounding of the whole hold, in both geometries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hf_lipschitz.bounds.engine import bound_program, evaluate_program, rounding_error
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rounding import Array
from hf_lipschitz.bounds.rule import GEOMETRIES, Geometry
from hf_lipschitz.bounds.rules.table import BUILT_IN
from tests.bounds.operations import OPERATIONS, value_of
from tests.bounds.search import stretch, token_norms

PROGRAMS = 90
_DRAWN = {
    *(
        "input@1",
        "normalize@1",
        "patchify@1",
        "patch_merge@1",
        "convolution@1",
        "relu@1",
        "permute@1",
        "ball@1",
        "gelu@1",
    ),
    *("linear@1", "normalized_linear@1", "token_mixing@1", "shift@1", "offset@1", "scale@1", "residual@1", "abs@1"),
    *("maxmin@1", "group_sort@1", "softmax_attention@1", "sinkhorn_attention@1", "ball_attention@1"),
    *("l2_pool@1", "sum_pool@1"),
}
Shape = tuple[int, ...]


class _Draw:
    """A program in the making: nodes, their shapes, and the tensors they read."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.shapes: list[Shape] = []
        self.weights: dict[str, Array] = {}

    def tensor(self, *shape: int) -> str:
        """A new float32 tensor, or now and then one of the same shape that is there already."""
        same = [name for name, value in self.weights.items() if value.shape == shape]
        if same and self.rng.random() < 0.3:
            return str(self.rng.choice(same))
        name = f"t{len(self.weights)}"
        scale = max(1, shape[-1] if shape else 1) ** -0.5
        self.weights[name] = np.asarray(scale * self.rng.standard_normal(shape), dtype=np.float32)
        return name

    def add(self, node: Node, shape: Shape) -> None:
        self.nodes.append(node)
        self.shapes.append(shape)

    def chosen(self, *choices: int) -> int:
        return int(self.rng.choice(choices))


def _on_images(d: _Draw, i: int) -> Iterator[Callable[[], None]]:
    c, h, w = d.shapes[i]
    std = [float(value) for value in d.rng.uniform(0.3, 2.0, c)]
    yield lambda: d.add(Node("normalize@1", (i,), {"mean": [0.5] * c, "std": std}), (c, h, w))
    p = d.chosen(1, 2, 4)
    yield lambda: d.add(Node("patchify@1", (i,), {"patch": p}), ((h // p) * (w // p), c * p * p))
    plain = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}
    out = d.chosen(2, 3)
    yield lambda: d.add(
        Node("convolution@1", (i,), plain, {"weight": d.tensor(out, c, 3, 3), "bias": d.tensor(out)}), (out, h, w)
    )
    yield lambda: d.add(Node("relu@1", (i,)), (c, h, w))


def _on_tokens(d: _Draw, i: int) -> Iterator[Callable[[], None]]:
    n, width = d.shapes[i]
    side = round(n**0.5)
    grid = {"height": side, "width": side} if side * side == n else {"height": 1, "width": n}
    yield lambda: d.add(Node("token_mixing@1", (i,), tensors={"weight": d.tensor(n, n)}), (n, width))
    offset = {"axis": "token", "negative": False}
    yield lambda: d.add(Node("offset@1", (i,), offset, {"offset": d.tensor(n)}), (n, width))
    if width >= 4:
        yield lambda: d.add(Node("shift@1", (i,), {**grid, "moved": d.chosen(1, width // 4)}), (n, width))
    if side * side == n and side % 2 == 0 and width <= 8:
        yield lambda: d.add(Node("patch_merge@1", (i,), {**grid, "factor": 2}), (n // 4, 4 * width))
    yield lambda: d.add(Node("permute@1", (i,), {"axes": [1, 0]}), (width, n))
    if width % 2 == 0:
        yield lambda: _attend(d, i, "softmax_attention@1")
        yield lambda: _attend(d, i, "sinkhorn_attention@1", iterations=64)
        yield lambda: _attend(d, i, "ball_attention@1", kv_heads=2, causal=True, rotary=0)


def _attend(d: _Draw, i: int, op: str, **attrs: Any) -> None:
    n, width = d.shapes[i]
    slots = {slot: d.tensor(width, width) for slot in ("query", "key", "value")}
    scalars = {slot: ["softplus", ["tensor", d.tensor(2)]] for slot in ("temperature", "radius")}
    d.add(Node(op, (i,), {"heads": 2, **attrs}, slots, scalars), (n, width))


def _on_any_tokens(d: _Draw, i: int) -> Iterator[Callable[[], None]]:
    shape = d.shapes[i]
    width = shape[-1]
    out = d.chosen(3, 4, 6, 8)
    yield lambda: d.add(
        Node("linear@1", (i,), {"transpose": False}, {"weight": d.tensor(out, width), "bias": d.tensor(out)}),
        (*shape[:-1], out),
    )
    yield lambda: d.add(
        Node("linear@1", (i,), {"transpose": True}, {"weight": d.tensor(width, out)}), (*shape[:-1], out)
    )
    yield lambda: d.add(Node("gelu@1", (i,), {"approximate": "none"}), shape)
    yield lambda: d.add(Node("ball@1", (i,), {"heads": 1}, scalars={"radius": 1.5}), shape)
    yield lambda: d.add(Node("abs@1", (i,), {"channels": d.chosen(1, width)}), shape)
    yield lambda: d.add(
        Node("offset@1", (i,), {"axis": "channel", "negative": True}, {"offset": d.tensor(width)}), shape
    )
    yield lambda: d.add(Node("scale@1", (i,), scalars={"factor": ["exp", ["tensor", d.tensor()]]}), shape)
    if width % 2 == 0:
        yield lambda: d.add(Node("maxmin@1", (i,)), shape)
        yield lambda: d.add(Node("group_sort@1", (i,), {"group": 2}), shape)
    others = [j for j, other in enumerate(d.shapes) if other == shape]
    j, weight = d.chosen(*others), ["sigmoid", ["tensor", d.tensor()]] if d.rng.random() < 0.7 else -0.5
    yield lambda: d.add(Node("residual@1", (j, i), scalars={"weight": weight}), shape)


def _program(seed: int) -> tuple[Program, dict[str, Array]]:
    d = _Draw(seed)
    shape = ((2, 4, 4), (4, 6), (9, 4))[seed % 3]
    d.add(Node("input@1", (), {"shape": list(shape), "space": "pixels[0,1]"}), shape)
    for _ in range(int(d.rng.integers(3, 12))):
        last = len(d.nodes) - 1
        on = (_on_images,) if len(d.shapes[last]) == 3 else (_on_any_tokens,)
        on += (_on_tokens,) if len(d.shapes[last]) == 2 else ()
        steps = [step for kind in on for step in kind(d, last)]
        steps[int(d.rng.integers(len(steps)))]()
    if len(d.shapes[-1]) == 2:
        width = d.shapes[-1][1]
        pool = (
            Node("l2_pool@1", (len(d.nodes) - 1,), {"eps": 1e-12})
            if seed % 2
            else Node("sum_pool@1", (len(d.nodes) - 1,))
        )
        d.add(pool, (width,))
    if len(d.shapes[-1]) == 1:
        slots = {"weight": d.tensor(3, d.shapes[-1][0]), "bias": d.tensor(3)}
        d.add(Node("normalized_linear@1", (len(d.nodes) - 1,), {"eps": 1e-12}, slots), (3,))
    last = len(d.nodes) - 1
    program = Program(tuple(d.nodes), {"features": max(0, last - 1), "logits": last}).canonical()
    return program, {name: d.weights[name] for name in program.tensor_names()}


def _execute(program: Program, weights: dict[str, Array], x: torch.Tensor, output: str) -> torch.Tensor:
    stored = {name: torch.from_numpy(value).to(x.dtype) for name, value in weights.items()}
    values: list[torch.Tensor] = []
    for node in program.nodes:
        tensors = {slot: stored[name] for slot, name in node.tensors.items()}
        scalars = {slot: value_of(expression, stored, x.dtype) for slot, expression in node.scalars.items()}
        inputs = [values[i] for i in node.inputs] or [x]
        values.append(OPERATIONS[node.op](node.attrs, tensors, scalars, inputs))
    return values[program.outputs[output]]


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_program(seed: int) -> None:
    program, weights = _program(seed)
    shape = tuple(program.nodes[0].attrs["shape"])
    images = np.random.default_rng(seed).random((6, *shape))
    images[0], images[1] = np.round(images[0]), 0.5
    x = torch.from_numpy(images.astype(np.float32))
    executed = evaluate_program(program, weights, BUILT_IN, x.double().numpy())
    for geometry in GEOMETRIES:
        bound = bound_program(program, weights, BUILT_IN, geometry=geometry)
        for output in ("features", "logits"):
            exact = _execute(program, weights, x.double(), output)
            value = executed[output]
            assert np.abs(exact.numpy() - value).max() <= 1e-10 * max(1.0, np.abs(value).max())
            assert _reached(program, weights, x.double(), output, geometry) <= bound.outputs[output].lipschitz * (
                1 + 1e-10
            )
            assert token_norms(value).max() <= bound.outputs[output].size.token * (1 + 1e-10)
            total = np.sqrt((value.reshape(len(value), -1) ** 2).sum(axis=1)).max()
            assert total <= bound.outputs[output].size.total * (1 + 1e-10)
    bound = bound_program(program, weights, BUILT_IN)
    allowed = rounding_error(program, weights, BUILT_IN, "float32", bound)
    for output, error in (("features", allowed.features_error), ("logits", allowed.logits_error)):
        deployed = _execute(program, weights, x, output).double().numpy()
        assert np.sqrt(((deployed - executed[output]).reshape(6, -1) ** 2).sum(axis=1)).max() <= error + 1e-300


def _reached(program: Program, weights: dict[str, Array], x: torch.Tensor, output: str, geometry: Geometry) -> float:
    def function(point: torch.Tensor) -> torch.Tensor:
        return _execute(program, weights, point[None], output)[0]

    shape = tuple(x.shape[1:])
    return float(stretch(torch.func.vmap(torch.func.jacrev(function))(x), shape, geometry).max())


def test_the_programs_are_of_many_kinds() -> None:
    """Every operation that is drawn from is in some program, and so are shared tensors and shared inputs."""
    programs = [_program(seed)[0] for seed in range(PROGRAMS)]
    assert {node.op for program in programs for node in program.nodes} == _DRAWN
    reads = [[name for node in program.nodes for name in node.tensor_names()] for program in programs]
    assert any(len(names) > len(set(names)) for names in reads)
    sources = [[i for node in program.nodes for i in node.inputs] for program in programs]
    assert any(len(found) > len(set(found)) for found in sources)
