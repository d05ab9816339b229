"""Operations of aten that treat every entry alike: activations, sums, and products with scalars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_lipschitz.lowering.builder import Builder, expression
from hf_lipschitz.lowering.export import BATCH
from hf_lipschitz.lowering.refusal import COMPUTED, PRODUCT
from hf_lipschitz.lowering.values import Scalar, Shape, Stored, Value

Arguments = Mapping[str, Any]
_CHANNEL_SCALE = (
    "it scales entries by a stored tensor of more than one number, which has no rule",
    "fold the tensor into the layer before it, or scale by one number",
)
_CONSTANT = (
    "it adds a number that no file would hold",
    "store it as a parameter or a persistent buffer with one number a channel",
)

# Overload -> (operation of the kernel, attributes from the arguments).
ACTIVATIONS: dict[str, tuple[str, Callable[[Arguments], dict[str, Any]]]] = {
    "relu.default": ("relu@1", lambda a: {}),
    "leaky_relu.default": ("leaky_relu@1", lambda a: {"slope": a["negative_slope"]}),
    "elu.default": ("elu@1", lambda a: {"alpha": a["alpha"]}),
    "celu.default": ("celu@1", lambda a: {"alpha": a["alpha"]}),
    "selu.default": ("selu@1", lambda a: {}),
    "hardtanh.default": ("hardtanh@1", lambda a: {"low": a["min_val"], "high": a["max_val"]}),
    "relu6.default": ("hardtanh@1", lambda a: {"low": 0, "high": 6}),
    "gelu.default": ("gelu@1", lambda a: {"approximate": a["approximate"]}),
    "silu.default": ("silu@1", lambda a: {"beta": 1}),
    "mish.default": ("mish@1", lambda a: {}),
    "tanh.default": ("tanh@1", lambda a: {}),
    "sigmoid.default": ("sigmoid@1", lambda a: {}),
    "hardsigmoid.default": ("hardsigmoid@1", lambda a: {}),
    "hardswish.default": ("hardswish@1", lambda a: {}),
    "softplus.default": ("softplus@1", lambda a: {"beta": a["beta"], "threshold": a["threshold"]}),
    "log_sigmoid.default": ("logsigmoid@1", lambda a: {}),
    "softshrink.default": ("softshrink@1", lambda a: {"lambda": a["lambd"]}),
}
_OF_SCALARS = {
    "exp.default": "exp",
    "sigmoid.default": "sigmoid",
    "softplus.default": "softplus",
    "sqrt.default": "sqrt",
}


def activation(b: Builder, a: Arguments) -> Value | Scalar:
    """An activation, or the same function of a stored scalar."""
    x = next(iter(a.values()))
    if not isinstance(x, Value):
        return scalar(b, a)
    if b.operation == "elu.default":
        b.need(a["scale"] == a["input_scale"] == 1, "its scales differ from one", "use nn.ELU")
    op, attrs = ACTIVATIONS[b.operation]
    return b.entrywise(op, x, attrs=attrs(a))


def scalar(b: Builder, a: Arguments) -> Scalar:
    """A function of a stored scalar, such as the sigmoid of a residual weight."""
    head, inner = _OF_SCALARS.get(b.operation), expression(next(iter(a.values())))
    if head is None or inner is None:
        b.refuse()
    return Scalar([head, inner])


def prelu(b: Builder, a: Arguments) -> Value:
    """A leaky ReLU with stored slopes, one for all channels or one a channel (the axis behind the batch)."""
    x, weight = a["self"], b.stored(a["weight"], "slope")
    if math.prod(weight.shape) == 1:
        return b.entrywise("prelu@1", x, tensors={"weight": weight.name})
    kept = all(kind == "reshape" and shape[1] == x.shape[1] for kind, shape in x.steps) and x.held[0] == x.shape[1]
    if kept:  # what waits to be reshaped leaves the kernel's axis of slopes, the first of the sample, where it is
        return b.entrywise("prelu@1", x, tensors={"weight": weight.name})
    return b.add("prelu@1", b.settle(x), shape=x.shape[1:], tensors={"weight": weight.name})


def absolute(b: Builder, a: Arguments) -> Value:
    """|x|: a leaky ReLU of slope -1."""
    return b.entrywise("leaky_relu@1", a["self"], attrs={"slope": -1})


def clamp(b: Builder, a: Arguments) -> Value:
    """Values limited from below, or from both sides."""
    low, high = a.get("min"), a.get("max")
    if low == 0 and high is None:
        return b.entrywise("relu@1", a["self"])
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    b.need(numbers, "it limits values on one side by another number than 0", "limit them on both sides")
    return b.entrywise("hardtanh@1", a["self"], attrs={"low": low, "high": high})


def add(b: Builder, a: Arguments) -> Value | Scalar:
    """x + alpha y, of two activations, an activation and a stored tensor, or scalars."""
    x, y = a["self"], a["other"]
    if not isinstance(x, Value) and not isinstance(y, Value):
        return _of_two(b, "add", a)
    if isinstance(x, Value) and isinstance(y, Value):
        return _sum(b, x, _times(b, y, a["alpha"]))
    x, y, sign = (x, y, a["alpha"]) if isinstance(x, Value) else (_times(b, y, a["alpha"]), x, 1)
    return _offset(b, x, y, sign)


def subtract(b: Builder, a: Arguments) -> Value | Scalar:
    """x - alpha y."""
    x, y = a["self"], a["other"]
    if not isinstance(x, Value) and not isinstance(y, Value):
        return _of_two(b, "sub", a)
    if isinstance(x, Value) and not isinstance(y, Value):
        return _offset(b, x, y, -a["alpha"])
    y = _times(b, y, -a["alpha"])
    return _sum(b, x, y) if isinstance(x, Value) else _offset(b, y, x, 1)


def reverse_subtract(b: Builder, a: Arguments) -> Value | Scalar:
    """alpha y subtracted the other way round: other - alpha self."""
    return subtract(b, {"self": a["other"], "other": a["self"], "alpha": a["alpha"]})


def multiply(b: Builder, a: Arguments) -> Value | Scalar:
    """An activation times a scalar, or two scalars."""
    x, y = a["self"], a["other"]
    if not isinstance(x, Value) and not isinstance(y, Value):
        return _of_two(b, "mul", a)
    b.need(not (isinstance(x, Value) and isinstance(y, Value)), *PRODUCT)
    x, y = (x, y) if isinstance(x, Value) else (y, x)
    return _scale(b, x, _factor(b, y), y)


def divide(b: Builder, a: Arguments) -> Value | Scalar:
    """An activation by a scalar, or two scalars."""
    x, y = a["self"], a["other"]
    if not isinstance(x, Value) and not isinstance(y, Value):
        return _of_two(b, "div", a)
    b.need(not isinstance(y, Value), "the quotient by an activation is not Lipschitz near zero", "do not divide by it")
    return _scale(b, x, ["div", 1, _factor(b, y)], y)


def negate(b: Builder, a: Arguments) -> Value | Scalar:
    """-x."""
    x = a["self"]
    return _times(b, x, -1) if isinstance(x, Value) else _of_two(b, "mul", {"self": x, "other": -1})


def _times(b: Builder, x: Value, factor: float) -> Value:
    return x if factor == 1 else b.entrywise("scale@1", x, scalars={"factor": factor})


def _factor(b: Builder, value: Any) -> Any:
    found = expression(value)
    b.need(found is not None, *_CHANNEL_SCALE)
    return found


def _scale(b: Builder, x: Value, factor: Any, by: Any) -> Value:
    if isinstance(by, Stored):
        broadcast = len(by.shape) <= len(x.shape)
        b.need(broadcast, f"a tensor of shape {by.shape} adds axes to its input of shape {x.shape}")
    return b.entrywise("scale@1", x, scalars={"factor": factor})


def _of_two(b: Builder, head: str, a: Arguments) -> Scalar:
    first, second = expression(a["self"]), expression(a["other"])
    if first is None or second is None or a.get("alpha", 1) != 1:
        b.refuse(*COMPUTED)
    return Scalar([head, first, second])


def _sum(b: Builder, x: Value, y: Value) -> Value:
    b.need(
        x.shape == y.shape,
        f"branches of shapes {x.shape[1:]} and {y.shape[1:]} would be broadcast, which has no rule",
        "give both branches one shape",
    )
    if (x.held, x.steps) == (y.held, y.steps):
        first, second = (Value(each.node, each.held, (BATCH, *each.held)) for each in (x, y))
        return Value(b.add("add@1", first, second, shape=x.held).node, x.held, x.shape, x.steps)
    return b.add("add@1", b.settle(x), b.settle(y), shape=x.shape[1:])


def _offset(b: Builder, x: Value, tensor: Any, sign: float) -> Value:
    """A stored tensor added: one number a channel, a token or an entry of the sample."""
    if not isinstance(tensor, Stored):
        b.refuse(*_CONSTANT)
    b.need(abs(sign) == 1, "it adds a multiple of a stored tensor", "store the multiple")
    b.need(not tensor.turned, "it adds the transpose of a stored matrix", "store the transpose")
    shape = tensor.shape[1:] if len(tensor.shape) == len(x.shape) and tensor.shape[0] == 1 else tensor.shape
    full = (1,) * (len(x.shape) - 1 - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(full) if n != 1)
    sample = x.shape[1:]
    kind = _kind(axes, sample) if full == tuple(n if i in axes else 1 for i, n in enumerate(sample)) else None
    b.need(
        kind is not None,
        f"a stored tensor of shape {tensor.shape} is added to samples of shape {sample}, which has no rule",
        "store one number a channel, a token or an entry",
    )
    attrs = {"axis": kind, "negative": sign < 0}
    return b.add("offset@1", b.settle(x), shape=sample, attrs=attrs, tensors={"offset": tensor.name})


def _kind(axes: Shape, sample: Shape) -> str | None:
    channel = 0 if len(sample) == 3 else len(sample) - 1
    if math.prod(sample) == math.prod(sample[axis] for axis in axes) and len(axes) != 1:
        return "entry"
    if axes == (channel,):
        return "channel"
    return "token" if axes == (0,) and len(sample) == 2 else None
