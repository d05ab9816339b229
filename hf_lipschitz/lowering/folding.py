"""Nodes that are better bounded together: a convolution with its batch norm, and circular padding with its convolution.

The norm of a folded kernel is at most, and mostly far below, the product of the two norms; a circular pad counts pixels
twice, the circular convolution does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hf_lipschitz.bounds.program import Node
from hf_lipschitz.lowering.values import Shape


def fold(nodes: Sequence[Node], shapes: Sequence[Shape], stored: Mapping[str, Shape], output: int) -> list[Node]:
    """The same nodes, some absorbed by their only reader; what was absorbed stays, unread.

    Args:
        nodes: a program's nodes.
        shapes: their sample shapes.
        stored: shapes of stored tensors by name.
        output: index of the node that is the answer, and so has a reader outside.
    """
    readers = Counter([output, *(i for node in nodes for i in node.inputs)])
    folded: list[Node] = []
    for node in nodes:
        before = node.inputs[0] if node.inputs and readers[node.inputs[0]] == 1 else None
        if before is not None and node.op == "batch_norm@1" and folded[before].op == "convolution@1":
            node = _with_batch_norm(folded[before], node)
        elif before is not None and node.op == "convolution@1" and folded[before].op == "pad@1":
            size = shapes[folded[before].inputs[0]]
            node = _with_padding(folded[before], node, size, stored[node.tensors["weight"]])
        folded.append(node)
    return folded


def _with_batch_norm(convolution: Node, norm: Node) -> Node:
    renamed = {"weight": "gamma", "bias": "beta"}
    tensors = {**convolution.tensors, **{renamed.get(slot, slot): name for slot, name in norm.tensors.items()}}
    attrs = {**convolution.attrs, **norm.attrs}
    return Node("convolution_batch_norm@1", convolution.inputs, attrs, tensors, {})


def _with_padding(pad: Node, convolution: Node, size: Shape, kernel: Shape) -> Node:
    """Circular padding that repeats no pixel for the convolution (see rules/convolution.py); else left as it is."""
    before, after, attrs = pad.attrs["before"], pad.attrs["after"], convolution.attrs
    if pad.attrs["mode"] != "circular" or before != after or any(attrs["padding"]):
        return convolution
    kernel = (1, kernel[2]) if len(kernel) == 3 else kernel[2:]
    axes = zip(size[1:], kernel, attrs["stride"], before, attrs["dilation"], strict=True)
    if any(p and (2 * p > d * (k - 1) or n % s) for n, k, s, p, d in axes):
        return convolution
    attrs = {**attrs, "padding": list(before), "padding_mode": "circular"}
    return Node(convolution.op, pad.inputs, attrs, convolution.tensors, {})
