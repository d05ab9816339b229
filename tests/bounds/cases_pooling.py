"""Rows for pools over images."""

from __future__ import annotations

from typing import Any

from tests.bounds.row import Row, Shape

_OVERLAP = {"l2": "overlapping windows: Schur's test is reached on a torus alone"}
_TRUE, _FALSE = {"count_padding": True}, {"count_padding": False}


def _windows(
    name: str,
    op: str,
    shape: Shape,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    ceil: bool = False,
    more: dict[str, Any] | None = None,
    **sharp: Any,
) -> Row:
    attrs = {"kernel": [*kernel], "stride": [*stride], "padding": [*padding], "ceil": ceil}
    return Row(name, op, (shape,), attrs | (more or {"dilation": [1, 1]}), **sharp)


def _max(name: str, *where: Any, **more: Any) -> Row:
    return _windows(name, "max_pool@1", *where, **more)


def _average(name: str, *where: Any, **more: Any) -> Row:
    return _windows(name, "average_pool@1", *where, **more)


_TOKENS = {"sharp": ("token_max",), "slack": _OVERLAP}

ROWS: tuple[Row, ...] = (
    Row("mean pool", "mean_pool@1", ((4, 3),)),
    Row("mean pool of one token", "mean_pool@1", ((1, 3),)),
    Row("mean pool of an image", "mean_pool@1", ((3, 2, 4),)),
    _max("max pool", (2, 4, 4), (2, 2), (2, 2)),
    _max("max pool of many channels", (7, 2, 2), (2, 2), (2, 2)),
    _max("max pool with gaps", (2, 5, 6), (2, 2), (3, 3)),
    _max("max pool 3 x 3 stride 2", (2, 7, 7), (3, 3), (2, 2), (1, 1)),
    _max("max pool 3 x 3 stride 1", (3, 6, 6), (3, 3), (1, 1), (1, 1)),
    _max("max pool 5 x 5 stride 2", (2, 9, 9), (5, 5), (2, 2), (2, 2)),
    _max("max pool along a row", (2, 1, 9), (1, 3), (1, 2), (0, 1)),
    _max("max pool of the whole image", (3, 3, 2), (3, 2), (1, 1)),
    _max("max pool larger than the image", (2, 2, 3), (4, 4), (2, 2), (2, 2)),
    _max("max pool with dilation", (2, 6, 7), (2, 3), (2, 1), (0, 1), more={"dilation": [2, 2]}),
    _max("max pool with a dilation that parts windows", (2, 4, 8), (1, 2), (1, 1), more={"dilation": [1, 4]}),
    _max("max pool ceil", (2, 5, 6), (2, 3), (2, 2), (1, 1), True),
    _max("max pool ceil that drops a window", (2, 4, 4), (2, 2), (3, 3), (1, 1), True),
    _average("average pool", (2, 4, 4), (2, 2), (2, 2), more=_TRUE),
    _average("average pool along a row", (2, 1, 6), (1, 3), (1, 3), more=_TRUE),
    _average("average pool with gaps", (2, 5, 4), (2, 1), (3, 2), more=_FALSE),
    _average("average pool 3 x 3 stride 2", (2, 7, 7), (3, 3), (2, 2), (1, 1), more=_TRUE, **_TOKENS),
    _average("average pool 3 x 3 stride 1", (2, 5, 5), (3, 3), (1, 1), (1, 1), more=_FALSE, **_TOKENS),
    _average("average pool over padding", (2, 2, 3), (4, 4), (4, 4), (2, 2), more=_TRUE),
    _average("average pool over padding not counted", (2, 2, 3), (4, 4), (4, 4), (2, 2), more=_FALSE),
    _average("average pool of the whole image", (3, 3, 2), (3, 2), (1, 1), more=_FALSE),
    _average("average pool ceil", (2, 5, 7), (2, 3), (2, 3), (0, 0), True, more=_FALSE),
    _average("average pool ceil that counts padding", (2, 5, 7), (2, 3), (2, 3), (1, 1), True, more=_TRUE),
    _average("average pool ceil that drops a window", (2, 4, 4), (2, 2), (3, 3), (1, 1), True, more=_TRUE),
    _average("average pool of uneven windows", (2, 6, 1), (4, 1), (3, 1), (1, 0), True, more=_TRUE, **_TOKENS),
)
