"""One row or more for each built-in rule; the rows of newer rooms stand in files of their own.

A new rule is one more row here or there, and its meaning in operations.py (or the room's file beside it).
"""

from __future__ import annotations

from typing import Any

from tests.bounds import (
    cases_activation,
    cases_attention,
    cases_convolution,
    cases_normalization,
    cases_pooling,
    cases_shape,
)
from tests.bounds.row import Row

_TAU, _RADIUS = ["softplus", ["tensor", "raw_tau"]], ["softplus", ["tensor", "raw_radius"]]
_ATTENTION_SLACK = {
    "l2": "the three terms of the sum are not reached by one direction of random weights: see test_attention.py",
    "token_max": "as in l2",
}


def _attention(name: str, tokens: int, width: int, heads: int, rows: int, **scalars: Any) -> Row:
    matrices = dict.fromkeys(("query", "key", "value"), (rows, width))
    given = {"temperature": _TAU, "radius": _RADIUS} | scalars
    vectors = {"raw_tau": (heads,), "raw_radius": (heads,)} if not scalars else {}
    attrs = {"heads": heads}
    shapes = ((tokens, width),)
    return Row(name, "softmax_attention@1", shapes, attrs, given, matrices, vectors, (), _ATTENTION_SLACK)


_FIRST = (
    Row("normalize", "normalize@1", ((3, 2, 2),), {"mean": [0.5, 0.1, -2.0], "std": [1.0, 0.25, 3]}),
    Row("normalize one channel", "normalize@1", ((1, 1, 3),), {"mean": [0], "std": [0.001]}),
    Row("patchify", "patchify@1", ((2, 4, 6),), {"patch": 2}),
    Row("patchify whole image", "patchify@1", ((1, 3, 3),), {"patch": 3}),
    Row("patch merge", "patch_merge@1", ((8, 3),), {"height": 2, "width": 4, "factor": 2}),
    Row("shift", "shift@1", ((12, 9),), {"height": 3, "width": 4, "moved": 2}),
    Row("shift of all channels", "shift@1", ((9, 4),), {"height": 3, "width": 3, "moved": 1}),
    Row("shift on a row", "shift@1", ((3, 5),), {"height": 1, "width": 3, "moved": 1}),
    Row("shift of two rows", "shift@1", ((4, 4),), {"height": 2, "width": 2, "moved": 1}),
    Row("shift of one token", "shift@1", ((1, 8),), {"height": 1, "width": 1, "moved": 2}),
    Row("token mixing", "token_mixing@1", ((4, 3),), matrices={"weight": (4, 4)}),
    Row("token mixing of one", "token_mixing@1", ((1, 3),), matrices={"weight": (1, 1)}),
    Row("channel offset", "offset@1", ((3, 4),), {"axis": "channel", "negative": False}, vectors={"offset": (4,)}),
    Row(
        "channel offset of one token",
        "offset@1",
        ((4,),),
        {"axis": "channel", "negative": True},
        vectors={"offset": (4,)},
    ),
    Row("token offset", "offset@1", ((3, 4),), {"axis": "token", "negative": True}, vectors={"offset": (3,)}),
    Row("image offset", "offset@1", ((3, 2, 2),), {"axis": "channel", "negative": False}, vectors={"offset": (3,)}),
    Row("stored position", "offset@1", ((3, 4),), {"axis": "entry", "negative": False}, vectors={"offset": (1, 3, 4)}),
    Row(
        "stored shift",
        "offset@1",
        ((3, 2, 2),),
        {"axis": "channel", "negative": True},
        vectors={"offset": (1, 3, 1, 1)},
    ),
    Row("offset of entries", "offset@1", ((3, 4),), {"axis": "entry", "negative": False}, vectors={"offset": (3, 4)}),
    Row(
        "offset of an image",
        "offset@1",
        ((2, 3, 2),),
        {"axis": "entry", "negative": True},
        vectors={"offset": (2, 3, 2)},
    ),
    Row("scale", "scale@1", ((2, 3),), scalars={"factor": ["div", 3, ["exp", ["tensor", "raw"]]]}, vectors={"raw": ()}),
    Row(
        "negative scale",
        "scale@1",
        ((2, 3),),
        scalars={"factor": ["sub", 0.1, ["tensor", "raw"]]},
        vectors={"raw": (1,)},
    ),
    Row(
        "residual", "residual@1", ((3, 2),) * 2, scalars={"weight": ["sigmoid", ["tensor", "raw"]]}, vectors={"raw": ()}
    ),
    Row("residual beyond one", "residual@1", ((3, 2),) * 2, scalars={"weight": 2.5}),
    Row("residual below zero", "residual@1", ((3, 2),) * 2, scalars={"weight": -1.5}),
    Row(
        "residual of one entry",
        "residual@1",
        ((3, 2),) * 2,
        scalars={"weight": ["sigmoid", ["tensor", "raw"]]},
        vectors={"raw": (1,)},
    ),
    Row("linear", "linear@1", ((3, 4),), {"transpose": False}, {}, {"weight": (5, 4)}, {"bias": (5,)}),
    Row("linear transposed", "linear@1", ((3, 5),), {"transpose": True}, {}, {"weight": (5, 4)}),
    Row("linear on one token", "linear@1", ((4,),), {"transpose": False}, {}, {"weight": (2, 4)}, {"bias": (2,)}),
    Row("linear to one channel", "linear@1", ((2, 3),), {"transpose": False}, {}, {"weight": (1, 3)}),
    Row("head", "normalized_linear@1", ((4,),), {"eps": 1e-12}, {}, {"weight": (3, 4)}, {"bias": (3,)}),
    Row("head of many rows", "normalized_linear@1", ((2,),), {"eps": 0.5}, {}, {"weight": (7, 2)}),
    Row("maxmin", "maxmin@1", ((3, 4),)),
    Row("maxmin of one token", "maxmin@1", ((6,),)),
    Row("group sort", "group_sort@1", ((2, 6),), {"group": 3}),
    Row("full sort", "group_sort@1", ((5,),), {"group": 5}),
    Row("abs", "abs@1", ((2, 4),), {"channels": 3}),
    Row("l2 pool", "l2_pool@1", ((4, 3),), {"eps": 1e-12}),
    Row(
        "l2 pool with a large eps",
        "l2_pool@1",
        ((2, 2),),
        {"eps": 1.0},
        sharp=(),
        slack={"l2": "eps rounds the tip", "token_max": "eps rounds the tip"},
    ),
    Row("sum pool", "sum_pool@1", ((5, 3),)),
    _attention("attention", 3, 4, 1, 4),
    _attention("attention of two heads", 4, 6, 2, 4),
    _attention("attention of three narrow heads", 2, 3, 3, 3),
    _attention("attention of one token", 1, 4, 2, 4),
    _attention("cold attention", 3, 4, 2, 4, temperature=0, radius=1.0),
    _attention("hot attention", 3, 4, 2, 4, temperature=30.0, radius=2.0),
    _attention("attention of tiny values", 3, 4, 2, 4, temperature=1.0, radius=1e-6),
)

ROWS: tuple[Row, ...] = (
    *_FIRST,
    *cases_shape.ROWS,
    *cases_activation.ROWS,
    *cases_normalization.ROWS,
    *cases_convolution.ROWS,
    *cases_pooling.ROWS,
    *cases_attention.ROWS,
)
