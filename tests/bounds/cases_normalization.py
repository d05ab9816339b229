"""Rows for normalisation layers."""

from __future__ import annotations

from typing import Any

from tests.bounds.row import Row, Shape

_STATISTICS = ("mean", "variance", "weight", "bias")
_FAR = {
    "l2": "the constant is that of tokens much shorter than sqrt(eps)",
    "token_max": "as in l2",
}


def _batch_norm(name: str, shape: Shape, channels: int, eps: float, slots: tuple[str, ...] = _STATISTICS) -> Row:
    vectors = dict.fromkeys(slots, (channels,))
    return Row(name, "batch_norm@1", (shape,), {"eps": eps}, vectors=vectors, positive=frozenset({"variance"}))


def _norm(name: str, op: str, shape: Shape, eps: float, slots: tuple[str, ...], **more: Any) -> Row:
    return Row(name, op, (shape,), {"eps": eps}, vectors=dict.fromkeys(slots, shape[-1:]), **more)


ROWS: tuple[Row, ...] = (
    _batch_norm("batch norm", (3, 2, 4), 3, 1e-5),
    _batch_norm("batch norm without weights", (2, 3, 1), 2, 1e-3, ("mean", "variance")),
    _batch_norm("batch norm of tokens", (3, 4), 4, 1e-5),
    _batch_norm("batch norm of one token", (5,), 5, 0.5, ("mean", "variance", "bias")),
    _batch_norm("batch norm of one channel", (1, 1, 3), 1, 1e-12, ("mean", "variance", "weight")),
    _norm("rms norm", "rms_norm@1", (3, 4), 1.0, ("weight",)),
    _norm("rms norm with a bias", "rms_norm@1", (5,), 2.0, ("weight", "bias")),
    _norm("rms norm without weights", "rms_norm@1", (2, 3), 1.0, ()),
    _norm("rms norm with a small eps", "rms_norm@1", (3, 4), 1e-6, ("weight", "bias"), sharp=(), slack=_FAR),
    _norm("layer norm without weights", "layer_norm@1", (3, 4), 1.0, ()),
    _norm(
        "layer norm",
        "layer_norm@1",
        (5,),
        1.0,
        ("weight", "bias"),
        sharp=(),
        slack=dict.fromkeys(("l2", "token_max"), "the heaviest channel is not centred: a token cannot move it alone"),
    ),
    _norm("layer norm with a small eps", "layer_norm@1", (3, 4), 1e-5, ("weight", "bias"), sharp=(), slack=_FAR),
)
