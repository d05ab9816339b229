"""Operations of aten that move, select or join entries; those that only rename axes wait (see values.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_lipschitz.lowering.builder import Builder
from hf_lipschitz.lowering.refusal import COMPUTED, RANDOM
from hf_lipschitz.lowering.values import Scalar, Stored, Value

Arguments = Mapping[str, Any]
_CONSTANT_BRANCH = (
    "it joins an activation with a stored tensor, which has no rule",
    "leave the class token out and pool the mean of all tokens",
)


def same(b: Builder, a: Arguments) -> Any:
    """A copy, or dropout in evaluation mode."""
    b.need(not a.get("train"), *RANDOM)
    return next(iter(a.values()))


def cast(b: Builder, a: Arguments) -> Any:
    """A conversion that converts nothing; the graph is traced in float64, so any other dtype is a cast of the model."""
    wanted = str(b.at.meta["val"].dtype) if b.at is not None else ""
    b.need(
        wanted == "torch.float64",
        f"it casts to {wanted.removeprefix('torch.')} on the way",
        "leave the dtype to the whole model",
    )
    return next(iter(a.values()))


def reshape(b: Builder, a: Arguments) -> Value | Stored | Scalar:
    """view, reshape, flatten, squeeze, unsqueeze: the same entries in row-major order."""
    x = next(iter(a.values()))
    if isinstance(x, Stored):
        b.need(not x.turned, *COMPUTED)
        return Stored(x.name, b.shape)
    return x.reshaped(b.shape) if isinstance(x, Value) else x


def expand(b: Builder, a: Arguments) -> Value | Stored | Scalar:
    """expand, where it repeats nothing but a stored tensor over the batch."""
    x = a["self"]
    if isinstance(x, Stored) and math.prod(x.shape) == math.prod(b.shape[1:]):
        return Stored(x.name, (1, *b.shape[1:]), x.turned)
    unchanged = not isinstance(x, Value) or x.shape == b.shape
    b.need(unchanged, "it repeats entries, which has no rule", "give both branches one shape")
    return x


def transpose(b: Builder, a: Arguments) -> Value | Stored:
    """Two axes exchanged."""
    count = len(a["self"].shape)
    axes = list(range(count))
    first, second = a.get("dim0", 0) % count, a.get("dim1", 1) % count
    axes[first], axes[second] = second, first
    return permute(b, {"self": a["self"], "dims": axes})


def permute(b: Builder, a: Arguments) -> Value | Stored:
    """Axes in another order; a stored matrix may be transposed."""
    x, axes = a["self"], tuple(axis % len(b.shape) for axis in a["dims"])
    if isinstance(x, Value):
        return x.permuted(axes)
    if axes == tuple(range(len(axes))):
        return x
    b.need(len(axes) == 2, *COMPUTED)
    return Stored(x.name, x.shape[::-1], not x.turned)


def cut(b: Builder, a: Arguments) -> Value | Stored:
    """x[..., start:end] along one axis."""
    x = b.activation(a["self"])
    n, axis = x.shape[a["dim"] % len(x.shape)], a["dim"] % len(x.shape)
    start, end = (min(max(i + n if i < 0 else i, 0), n) for i in (a["start"] or 0, n if a["end"] is None else a["end"]))
    b.need(a["step"] == 1, "it takes every other entry", "use a pool with kernel 1 and the stride")
    return _part(b, x, axis, start, end)


def select(b: Builder, a: Arguments) -> Value:
    """One index of one axis, which goes."""
    x = b.activation(a["self"])
    axis = a["dim"] % len(x.shape)
    index = a["index"] % x.shape[axis]
    return _part(b, x, axis, index, index + 1).reshaped(b.shape)


def split(b: Builder, a: Arguments) -> tuple[Value, ...]:
    """split and chunk: consecutive parts along one axis, their sizes as traced."""
    x, axis = b.activation(a["self"]), a["dim"] % len(a["self"].shape)
    assert b.at is not None
    sizes = [int(part.shape[axis]) for part in b.at.meta["val"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_part(b, x, axis, start, start + size) for start, size in zip(starts, sizes, strict=True))


def unbind(b: Builder, a: Arguments) -> tuple[Value, ...]:
    """Each index of one axis, which goes."""
    x, axis = b.activation(a["self"]), a["dim"] % len(a["self"].shape)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return tuple(_part(b, x, axis, i, i + 1).reshaped(shape) for i in range(x.shape[axis]))


def _part(b: Builder, x: Value, axis: int, start: int, stop: int) -> Value:
    if (start, stop) == (0, x.shape[axis]):
        return x
    b.need(axis > 0, "it takes some samples of the batch", "compute every sample by itself")
    b.need(start < stop, "it takes no entry at all", "leave it out")
    x = b.settle(x)
    shape = (*x.held[: axis - 1], stop - start, *x.held[axis:])
    return b.add("slice@1", x, shape=shape, attrs={"axis": axis - 1, "start": start, "stop": stop})


def concatenate(b: Builder, a: Arguments) -> Value:
    """Branches beside each other."""
    b.need(all(isinstance(each, Value) for each in a["tensors"]), *_CONSTANT_BRANCH)
    parts = [b.settle(each) for each in a["tensors"]]
    axis = a["dim"] % len(b.shape) - 1
    b.need(axis >= 0, "it makes the batch larger", "join branches along an axis of the sample")
    result = parts[0]
    for part in parts[1:]:
        shape = (*result.held[:axis], result.held[axis] + part.held[axis], *result.held[axis + 1 :])
        result = b.add("concatenate@1", result, part, shape=shape, attrs={"axis": axis})
    return result


def stack(b: Builder, a: Arguments) -> Value:
    """Branches beside each other along a new axis."""
    b.need(all(isinstance(each, Value) for each in a["tensors"]), *_CONSTANT_BRANCH)
    axis = a["dim"] % len(b.shape)
    longer = [each.reshaped((*each.shape[:axis], 1, *each.shape[axis:])) for each in a["tensors"]]
    return concatenate(b, {"tensors": longer, "dim": axis})


def pad(b: Builder, a: Arguments) -> Value:
    """Pixels around an image, or entries around a signal."""
    x, widths = b.activation(a["self"]), [*a["pad"], 0, 0][:4]
    mode = {"constant": "zeros"}.get(a.get("mode", "constant"), a.get("mode"))
    inside = len(a["pad"]) <= 2 * (len(x.shape) - 2) and all(width >= 0 for width in widths) and len(a["pad"]) <= 4
    b.need(inside, "it pads channels, or crops", "pad the height and width of images, and crop with a slice")
    b.need(mode != "zeros" or not a.get("value"), "it pads with another number than zero", "pad with zeros")
    x = b.image(x)
    before, after = [widths[2], widths[0]], [widths[3], widths[1]]
    shape = (x.held[0], x.held[1] + before[0] + after[0], x.held[2] + before[1] + after[1])
    attrs = {"before": before, "after": after, "mode": mode}
    return b.add("pad@1", x, shape=shape, attrs=attrs).reshaped(b.shape)


def shuffle(b: Builder, a: Arguments) -> Value:
    """Channels into pixels."""
    x, factor = b.image(b.activation(a["self"])), a["upscale_factor"]
    return b.add("pixel_shuffle@1", x, shape=b.shape[1:], attrs={"factor": factor})


def unshuffle(b: Builder, a: Arguments) -> Value:
    """Pixels into channels."""
    x, factor = b.image(b.activation(a["self"])), a["downscale_factor"]
    return b.add("pixel_unshuffle@1", x, shape=b.shape[1:], attrs={"factor": factor})
