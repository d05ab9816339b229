"""Rows for convolutions.

Signals along a row of n pixels with circular padding come within cos(pi (k - 1) / (2 n)) of the supremum of a kernel of
k taps, whatever it is, so that those rows are sharp in ``l2``; with one output channel every tap's norm is reached by
its own pixel, so that those are sharp in ``token_max``.
"""

from __future__ import annotations

from typing import Any

from tests.bounds.row import Row, Shape

_CROP = "a small image is a crop of Z^2, whose norm is less than the supremum over all frequencies"
_TAPS = "no token is the first singular vector of every tap"


def _attrs(stride: Any, padding: Any, dilation: Any, groups: int, mode: str) -> dict[str, Any]:
    each = {"stride": stride, "padding": padding, "dilation": dilation}
    pairs = {key: [value, value] if isinstance(value, int) else [*value] for key, value in each.items()}
    return pairs | {"groups": groups, "padding_mode": mode}


def _row(
    name: str,
    shape: Shape,
    weight: Shape,
    sharp: str = "",
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    mode: str = "zeros",
    bias: int = 0,
    output_padding: Any = None,
    batch_norm: tuple[str, ...] = (),
) -> Row:
    """A row that is sharp in the geometries named in ``sharp`` (separated by blanks)."""
    attrs, op, vectors = _attrs(stride, padding, dilation, groups, mode), "convolution@1", {}
    if bias:
        vectors["bias"] = (bias,)
    if output_padding is not None:
        attrs, op = attrs | {"output_padding": [*output_padding]}, "transposed_convolution@1"
    if batch_norm:
        attrs, op = attrs | {"eps": 1e-3}, "convolution_batch_norm@1"
        vectors |= dict.fromkeys(batch_norm, weight[:1])
    slack = {key: why for key, why in (("l2", _CROP), ("token_max", _TAPS)) if key not in sharp.split()}
    positive = frozenset({"variance"} & set(vectors))
    return Row(name, op, (shape,), attrs, {}, {"weight": weight}, vectors, tuple(sharp.split()), slack, positive)


_ALL = ("mean", "variance", "gamma", "beta")
_BOTH = "l2 token_max"
_PLAIN = (
    _row("conv", (2, 4, 5), (3, 2, 3, 2), padding=1, bias=3),
    _row("conv to one channel", (2, 4, 5), (1, 2, 3, 3), "token_max", padding=1, bias=1),
    _row("conv 1 x 1", (3, 2, 3), (2, 3, 1, 1), _BOTH, bias=2),
    _row("conv 1 x 1 with stride", (3, 4, 3), (2, 3, 1, 1), _BOTH, stride=2),
    _row("conv of patches", (2, 4, 6), (3, 2, 2, 2), "l2", stride=2, bias=3),
    _row("conv that skips pixels", (2, 5, 6), (3, 2, 2, 2), "l2", stride=3),
    _row("conv with stride", (2, 6, 6), (3, 2, 3, 3), stride=2, padding=1),
    _row("conv with dilation", (2, 5, 5), (2, 2, 3, 3), dilation=2, padding=2),
    _row("conv with groups", (4, 3, 3), (6, 2, 2, 2), groups=2, padding=1, bias=6),
    _row("conv 1 x 1 with groups", (4, 2, 2), (6, 2, 1, 1), _BOTH, groups=2),
    _row("depthwise conv", (3, 4, 4), (3, 1, 3, 3), groups=3, padding=1),
    _row("conv padded by more than the kernel", (2, 3, 2), (2, 2, 2, 2), padding=3, bias=2),
    _row("conv of a kernel larger than the image", (2, 2, 3), (2, 2, 5, 5), padding=2),
    _row("conv that sees padding alone", (2, 1, 1), (2, 2, 3, 3), padding=4),
    _row("conv1d", (2, 1, 6), (3, 2, 3), padding=(0, 1), bias=3),
    _row("conv1d to one channel", (3, 1, 7), (1, 3, 4), "token_max", padding=(0, 2), stride=(1, 2)),
)
_CIRCULAR = (
    _row("circular conv", (2, 3, 4), (2, 2, 3, 3), padding=1, mode="circular", bias=2),
    _row("circular conv along a row", (2, 1, 24), (2, 2, 1, 3), "l2", padding=(0, 1), mode="circular"),
    _row("circular conv1d to one channel", (2, 1, 24), (1, 2, 3), _BOTH, padding=(0, 1), mode="circular"),
    _row("circular conv1d with stride", (2, 1, 36), (2, 2, 3), "l2", stride=(1, 2), padding=(0, 1), mode="circular"),
    _row("circular conv1d with dilation", (2, 1, 25), (2, 2, 3), "l2", dilation=2, padding=(0, 2), mode="circular"),
    _row(
        "circular conv1d with stride and dilation",
        (2, 1, 36),
        (2, 2, 3),
        "l2",
        stride=(1, 2),
        dilation=3,
        padding=(0, 3),
        mode="circular",
    ),
    _row(
        "circular conv1d that reads every second pixel",
        (2, 1, 48),
        (2, 2, 3),
        "l2",
        stride=2,
        dilation=2,
        padding=(0, 2),
        mode="circular",
    ),
    _row(
        "circular conv1d with groups",
        (4, 1, 16),
        (4, 2, 2),
        "l2",
        groups=2,
        dilation=2,
        padding=(0, 1),
        mode="circular",
    ),
    _row("circular depthwise conv1d", (3, 1, 24), (3, 1, 3), "l2", groups=3, padding=(0, 1), mode="circular"),
    _row("circular conv of a kernel larger than the image", (2, 3, 2), (1, 2, 5, 5), padding=2, mode="circular"),
)
_BATCH_NORM = (
    _row("conv batch norm", (2, 4, 4), (3, 2, 3, 3), padding=1, bias=3, batch_norm=_ALL),
    _row("conv batch norm 1 x 1", (3, 2, 3), (2, 3, 1, 1), _BOTH, batch_norm=_ALL),
    _row("conv batch norm of patches", (2, 4, 4), (3, 2, 2, 2), "l2", stride=2, batch_norm=("mean", "variance")),
    _row("conv batch norm to one channel", (2, 3, 4), (1, 2, 2, 3), "token_max", batch_norm=_ALL[:3]),
    _row("conv1d batch norm", (2, 1, 24), (2, 2, 3), "l2", padding=(0, 1), mode="circular", batch_norm=_ALL),
)
_NO = (0, 0)
_TRANSPOSED = (
    _row("transposed conv", (2, 3, 3), (2, 3, 3, 3), padding=1, bias=3, output_padding=_NO),
    _row("transposed conv with stride", (2, 3, 3), (2, 3, 3, 3), stride=2, padding=1, output_padding=(1, 1)),
    _row("transposed conv of patches", (2, 2, 3), (2, 3, 2, 2), _BOTH, stride=2, bias=3, output_padding=_NO),
    _row("transposed conv with gaps", (2, 2, 3), (2, 3, 2, 2), _BOTH, stride=3, bias=3, output_padding=(1, 2)),
    _row("transposed conv with dilation", (2, 3, 2), (2, 2, 2, 3), dilation=2, stride=2, output_padding=(1, 0)),
    _row("transposed conv with groups", (4, 2, 3), (4, 2, 3, 2), groups=2, stride=2, output_padding=_NO),
    _row("transposed conv to one channel", (2, 3, 4), (2, 1, 3, 3), "token_max", stride=1, output_padding=_NO),
    _row("transposed conv1d", (2, 1, 6), (2, 2, 4), stride=(1, 3), padding=(0, 2), output_padding=(0, 2), bias=2),
    _row("transposed conv1d to one channel", (3, 1, 8), (3, 1, 5), "token_max", stride=(1, 2), output_padding=_NO),
)

ROWS: tuple[Row, ...] = (*_PLAIN, *_CIRCULAR, *_BATCH_NORM, *_TRANSPOSED)
