"""Rows for reshapes, branches, rotations and balls (an embedding has no input: see test_shape_rules.py)."""

from __future__ import annotations

from typing import Any

from tests.bounds.row import Row, Shape


def _reshape(source: Shape, result: Shape, **kind: Any) -> Row:
    return Row(f"reshape {source} to {result}", "reshape@1", (source,), {"shape": list(result)}, **kind)


def _permute(shape: Shape, *axes: int) -> Row:
    return Row(f"permute {shape} by {axes}", "permute@1", (shape,), {"axes": list(axes)})


def _slice(shape: Shape, axis: int, start: int, stop: int) -> Row:
    return Row(f"slice axis {axis} of {shape}", "slice@1", (shape,), {"axis": axis, "start": start, "stop": stop})


def _pad(mode: str, before: list[int], after: list[int], shape: Shape = (2, 3, 4)) -> Row:
    name = f"pad {shape} by {before} and {after} with {mode}"
    return Row(name, "pad@1", (shape,), {"before": before, "after": after, "mode": mode})


def _concatenate(shape: Shape, axis: int) -> Row:
    return Row(f"concatenate {shape} along {axis}", "concatenate@1", (shape, shape), {"axis": axis})


def _rotation(shape: Shape, heads: int, base: float, layout: str) -> Row:
    attrs = {"heads": heads, "base": base, "layout": layout}
    return Row(f"rotation {layout} of {heads} heads of {shape}", "rotation@1", (shape,), attrs)


def _ball(name: str, shape: Shape, heads: int, radius: Any, **kind: Any) -> Row:
    return Row(name, "ball@1", (shape,), {"heads": heads}, {"radius": radius}, **kind)


_RADIUS = ["softplus", ["tensor", "raw_radius"]]

ROWS: tuple[Row, ...] = (
    Row("pixel unshuffle", "pixel_unshuffle@1", ((2, 4, 6),), {"factor": 2}),
    Row("pixel unshuffle of a whole image", "pixel_unshuffle@1", ((1, 3, 3),), {"factor": 3}),
    Row("pixel shuffle", "pixel_shuffle@1", ((8, 2, 1),), {"factor": 2}),
    Row("pixel shuffle by three", "pixel_shuffle@1", ((9, 1, 2),), {"factor": 3}),
    Row("flatten an image", "flatten@1", ((2, 3, 2),)),
    Row("flatten tokens", "flatten@1", ((4, 3),)),
    Row("flatten one token", "flatten@1", ((4,),)),
    _reshape((2, 2, 3), (2, 6)),
    _reshape((2, 2, 3), (4, 3)),
    _reshape((2, 2, 3), (12,)),
    _reshape((4, 2, 2), (2, 4, 2)),
    _reshape((2, 4, 2), (4, 2, 2)),
    _reshape((3, 2, 2), (2, 3, 2)),
    _reshape((6, 2), (3, 4)),
    _reshape((3, 4), (6, 2)),
    _reshape((4, 3), (2, 6)),
    _reshape((6, 2), (4, 3)),
    _reshape((4, 6), (6, 4)),
    _reshape((3, 4), (3, 2, 2)),
    _reshape((2, 6), (3, 2, 2), sharp=("l2",), slack={"token_max": "two tokens meet where three entries could"}),
    _reshape((12,), (3, 2, 2)),
    _reshape((12,), (3, 4)),
    _permute((2, 2, 3), 1, 2, 0),
    _permute((2, 2, 3), 2, 0, 1),
    _permute((2, 2, 3), 0, 2, 1),
    _permute((3, 4), 1, 0),
    _permute((3, 4), 0, 1),
    _permute((4,), 0),
    _slice((3, 2, 3), 0, 1, 3),
    _slice((2, 3, 3), 2, 0, 2),
    _slice((4, 3), 0, 0, 1),
    _slice((4, 3), 1, 1, 3),
    _slice((4,), 0, 2, 4),
    _pad("zeros", [1, 0], [0, 2]),
    _pad("reflect", [2, 1], [1, 3]),
    _pad("replicate", [0, 3], [1, 1]),
    _pad("circular", [3, 1], [1, 0]),
    _pad("circular", [1, 0], [1, 2], (1, 1, 2)),
    Row("add images", "add@1", ((2, 2, 2),) * 2),
    Row("add tokens", "add@1", ((3, 2),) * 2),
    _concatenate((2, 2, 2), 0),
    _concatenate((2, 2, 2), 1),
    _concatenate((2, 1, 2), 2),
    _concatenate((3, 2), 0),
    _concatenate((3, 2), 1),
    _concatenate((3,), 0),
    _rotation((5, 6), 1, 10000.0, "half"),
    _rotation((4, 8), 2, 500.5, "half"),
    _rotation((4, 8), 2, 10000.0, "interleaved"),
    _rotation((3, 2), 1, 1, "interleaved"),
    _ball("ball", (3, 4), 1, _RADIUS, vectors={"raw_radius": ()}),
    _ball("ball of one token", (4,), 1, 0.5),
    _ball("balls of two heads", (3, 4), 2, _RADIUS, vectors={"raw_radius": (2,)}),
    _ball("balls of three heads of one radius", (2, 6), 3, 2, vectors={}),
    _ball("a tiny ball", (3, 4), 1, 1e-6, sharp=(), slack=dict.fromkeys(("l2", "token_max"), "no point lies inside")),
)
