"""Operations of aten with weights or windows: linear maps, convolutions, normalisations and pools."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_lipschitz.lowering.builder import Builder
from hf_lipschitz.lowering.export import BATCH
from hf_lipschitz.lowering.refusal import PRODUCT
from hf_lipschitz.lowering.values import Stored, Value

Arguments = Mapping[str, Any]


def linear(b: Builder, a: Arguments) -> Value:
    """x W^T + bias on the last axis."""
    weight = b.stored(a["weight"], "weight")
    return _linear(b, a["input"], Stored(weight.name, weight.shape[::-1], not weight.turned), a["bias"])


def matrix_product(b: Builder, a: Arguments) -> Value:
    """x W with a stored matrix on the right, or U x, which mixes tokens, with one on the left."""
    x, y = a["self"], a.get("other", a.get("mat2"))
    b.need(not (isinstance(x, Value) and isinstance(y, Value)), *PRODUCT)
    if isinstance(x, Value):
        return _linear(b, x, b.stored(y, "right factor"), None)
    x, y = b.stored(x, "left factor"), b.activation(y)
    b.need(len(x.shape) == 2 and len(y.shape) > 2, "its left factor is no matrix that mixes tokens")
    if x.shape[0] == x.shape[1] and not x.turned and len(y.shape) == 3:
        return b.add("token_mixing@1", b.settle(y), shape=y.shape[1:], tensors={"weight": x.name})
    axes = (*range(len(y.shape) - 2), len(y.shape) - 1, len(y.shape) - 2)
    mixed = _linear(b, y.permuted(axes), Stored(x.name, x.shape[::-1], not x.turned), None)
    return mixed.permuted(axes)


def sum_and_product(b: Builder, a: Arguments) -> Value:
    """bias + x W."""
    b.need(a["beta"] == a["alpha"] == 1, "its factors differ from one", "use a linear layer")
    return _linear(b, b.activation(a["mat1"]), b.stored(a["mat2"], "right factor"), a["self"])


def _linear(b: Builder, x: Any, weight: Stored, bias: Any) -> Value:
    """x W + bias, ``weight.shape`` being that of W; the kernel's transposed form takes W as stored."""
    b.need(len(weight.shape) == 2, f"its weight has shape {weight.shape}, not that of a matrix")
    tokens = b.tokens(b.activation(x))
    tensors = {"weight": weight.name, "bias": b.name(bias, "bias")}
    shape = (*tokens.held[:-1], weight.shape[1])
    result = b.add("linear@1", tokens, shape=shape, attrs={"transpose": not weight.turned}, tensors=tensors)
    return result.reshaped((*x.shape[:-1], weight.shape[1]))


def convolution(b: Builder, a: Arguments) -> Value:
    """conv1d and conv2d; ``same`` padding that is not symmetric is padded first."""
    x, weight = _input_and_weight(b, a)
    stride, dilation = _pair(b, a["stride"], 1), _pair(b, a["dilation"], 1)
    kernel = _pair(b, weight.shape[2:], 1)
    if isinstance(a["padding"], str):
        total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = [n // 2 for n in total]
        after = [n - n // 2 for n in total]
        if after != padding:
            shape = (x.held[0], x.held[1] + total[0], x.held[2] + total[1])
            x = b.add("pad@1", x, shape=shape, attrs={"before": padding, "after": after, "mode": "zeros"})
            padding = [0, 0]
    else:
        padding = _pair(b, a["padding"], 0)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": a["groups"], "padding_mode": "zeros"}
    return _convolved(b, "convolution@1", x, weight, a["bias"], attrs)


def transposed_convolution(b: Builder, a: Arguments) -> Value:
    """conv_transpose1d and conv_transpose2d."""
    x, weight = _input_and_weight(b, a)
    attrs = {
        "stride": _pair(b, a["stride"], 1),
        "padding": _pair(b, a["padding"], 0),
        "output_padding": _pair(b, a["output_padding"], 0),
        "dilation": _pair(b, a["dilation"], 1),
        "groups": a["groups"],
        "padding_mode": "zeros",
    }
    return _convolved(b, "transposed_convolution@1", x, weight, a["bias"], attrs)


def _input_and_weight(b: Builder, a: Arguments) -> tuple[Value, Stored]:
    x, weight = b.activation(a["input"]), b.stored(a["weight"], "weight")
    b.need(not weight.turned and len(weight.shape) == len(x.shape), f"its input of shape {x.shape} has no batch axis")
    return b.image(x), weight


def _convolved(b: Builder, op: str, x: Value, weight: Stored, bias: Any, attrs: dict[str, Any]) -> Value:
    tensors = {"weight": weight.name, "bias": b.name(bias, "bias")}
    shape = _image(b.shape)
    return b.add(op, x, shape=shape, attrs=attrs, tensors=tensors).reshaped(b.shape)


def batch_norm(b: Builder, a: Arguments) -> Any:
    """Batch norm with stored statistics; the functional form gives three results."""
    x = b.activation(a["input"])
    b.need(
        not a.get("training") and a["running_mean"] is not None and a["running_var"] is not None,
        "it takes the statistics of the batch",
        "keep running statistics in the batch norm",
    )
    x = b.settle(x) if len(x.shape) == 2 else b.image(x)
    tensors = {
        "mean": b.name(a["running_mean"], "mean"),
        "variance": b.name(a["running_var"], "variance"),
        "weight": b.name(a["weight"], "weight"),
        "bias": b.name(a["bias"], "bias"),
    }
    result = b.add("batch_norm@1", x, shape=x.held, attrs={"eps": a["eps"]}, tensors=tensors)
    result = result.reshaped(a["input"].shape)
    return (result,) if b.operation.startswith("_native") else result


def token_norm(b: Builder, a: Arguments) -> Value:
    """layer_norm and rms_norm over the last axis."""
    x, width = b.activation(a["input"]), tuple(a["normalized_shape"])
    b.need(len(width) == 1, f"it normalises over {len(width)} axes together", "normalise over the channels alone")
    tokens = b.tokens(x)
    op = "rms_norm@1" if b.operation.startswith("rms_norm") else "layer_norm@1"
    tensors = {"weight": b.name(a["weight"], "weight"), "bias": b.name(a.get("bias"), "bias")}
    b.need(a["eps"] is not None, "its eps depends on the dtype", "give it an eps")
    return b.add(op, tokens, shape=tokens.held, attrs={"eps": a["eps"]}, tensors=tensors).reshaped(x.shape)


def max_pool(b: Builder, a: Arguments) -> Value:
    """max_pool1d and max_pool2d."""
    attrs = {**_windows(b, a), "dilation": _pair(b, a["dilation"], 1), "ceil": bool(a["ceil_mode"])}
    return _pooled(b, "max_pool@1", b.activation(a["self"]), attrs)


def average_pool(b: Builder, a: Arguments) -> Value:
    """avg_pool1d and avg_pool2d."""
    b.need(a.get("divisor_override") is None, "its divisor is given by hand", "scale the result instead")
    attrs = {**_windows(b, a), "ceil": bool(a["ceil_mode"]), "count_padding": bool(a["count_include_pad"])}
    return _pooled(b, "average_pool@1", b.activation(a["self"]), attrs)


def adaptive_average(b: Builder, a: Arguments) -> Value:
    """adaptive_avg_pool1d and 2d, where windows do not overlap: a mean of everything, or equal windows."""
    x = b.activation(a["self"])
    size, wanted = _image(x.shape), _image(b.shape)
    if wanted[1:] == (1, 1):
        pooled = b.add("mean_pool@1", b.image(x), shape=size[:1])
        return pooled.reshaped(b.shape)
    attrs = {**_equal_windows(b, size, wanted), "ceil": False, "count_padding": False}
    return _pooled(b, "average_pool@1", x, attrs) if wanted != size else x


def adaptive_max(b: Builder, a: Arguments) -> tuple[Value]:
    """adaptive_max_pool1d and 2d, where windows do not overlap; torch gives indices too."""
    x = b.activation(a["self"])
    shape = tuple(int(n) for n in b.at.meta["val"][0].shape) if b.at is not None else ()
    size, wanted = _image(x.shape), _image(shape)
    attrs = {**_equal_windows(b, size, wanted), "dilation": [1, 1], "ceil": False}
    result = b.add("max_pool@1", b.image(x), shape=wanted, attrs=attrs)
    return (result.reshaped(shape),)


def _equal_windows(b: Builder, size: Sequence[int], wanted: Sequence[int]) -> dict[str, Any]:
    fits = all(n % m == 0 for n, m in zip(size[1:], wanted[1:], strict=True))
    b.need(fits, f"its windows overlap: {wanted[1:]} does not divide {size[1:]}", "pool to a size that divides")
    kernel = [n // m for n, m in zip(size[1:], wanted[1:], strict=True)]
    return {"kernel": kernel, "stride": kernel, "padding": [0, 0]}


def mean(b: Builder, a: Arguments) -> Value:
    """The mean over some axes; with ``sum`` times their size."""
    x = b.activation(a["self"])
    dims = a.get("dim")
    axes = sorted({axis % len(x.shape) for axis in ([dims] if isinstance(dims, int) else dims or range(len(x.shape)))})
    b.need(0 not in axes, "it combines the samples of a batch", "compute every sample by itself")
    kept = [axis for axis in range(1, len(x.shape)) if axis not in axes]
    count, channels = (math.prod(x.shape[axis] for axis in part) for part in (axes, kept))
    if axes == [2, 3] and len(x.shape) == 4:
        inner = b.image(x)
    elif axes == list(range(1, len(axes) + 1)):  # leading: tokens
        inner = b.settle(x.reshaped((BATCH, count, channels)))
    else:
        inner = b.settle(x.permuted((0, *kept, *axes)).reshaped((BATCH, channels, 1, count)))
    pooled = b.add("mean_pool@1", inner, shape=(channels,)).reshaped(b.shape)
    return b.entrywise("scale@1", pooled, scalars={"factor": count}) if b.operation.startswith("sum") else pooled


def _pooled(b: Builder, op: str, x: Value, attrs: dict[str, Any]) -> Value:
    return b.add(op, b.image(x), shape=_image(b.shape), attrs=attrs).reshaped(b.shape)


def _windows(b: Builder, a: Arguments) -> dict[str, Any]:
    kernel = _pair(b, a["kernel_size"], 1)
    return {
        "kernel": kernel,
        "stride": _pair(b, a["stride"], 1) if a["stride"] else kernel,
        "padding": _pair(b, a["padding"], 0),
    }


def _pair(b: Builder, value: Any, along_height: int) -> list[int]:
    """(height, width) of an argument; a signal is an image of height one, where ``along_height`` changes nothing."""
    values = [int(n) for n in value] if isinstance(value, Sequence) else [int(value)]
    if len(values) == 2:
        return values
    return [along_height if b.signal else values[0], values[0]]


def _image(shape: Sequence[int]) -> tuple[int, ...]:
    """(C, H, W) of a traced image (B, C, H, W) or signal (B, C, L)."""
    return (shape[1], 1, shape[2]) if len(shape) == 3 else tuple(shape[1:])
