"""Which operation of aten is lowered by what: the one table. What is not in it is refused by name.

Names are overloads of the functional graph that ``torch.export`` gives after its in-place operations were made pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_lipschitz.lowering import arrangement, entrywise, layers
from hf_lipschitz.lowering.builder import Builder

Handler = Callable[[Builder, Mapping[str, Any]], Any]

_MOVES: dict[str, Handler] = {
    **dict.fromkeys(("clone.default", "contiguous.default", "alias.default", "detach.default"), arrangement.same),
    **dict.fromkeys(("dropout.default", "feature_dropout.default", "alpha_dropout.default"), arrangement.same),
    **dict.fromkeys(("_to_copy.default", "to.dtype", "to.dtype_layout", "to.device"), arrangement.cast),
    **dict.fromkeys(("view.default", "reshape.default", "_unsafe_view.default"), arrangement.reshape),
    **dict.fromkeys(("flatten.using_ints", "unflatten.int", "unsqueeze.default"), arrangement.reshape),
    **dict.fromkeys(("squeeze.default", "squeeze.dim", "squeeze.dims"), arrangement.reshape),
    "expand.default": arrangement.expand,
    "permute.default": arrangement.permute,
    "transpose.int": arrangement.transpose,
    "t.default": arrangement.transpose,
    "slice.Tensor": arrangement.cut,
    "select.int": arrangement.select,
    **dict.fromkeys(("split.Tensor", "split_with_sizes.default", "chunk.default"), arrangement.split),
    "unbind.int": arrangement.unbind,
    "cat.default": arrangement.concatenate,
    "stack.default": arrangement.stack,
    **dict.fromkeys(("pad.default", "constant_pad_nd.default"), arrangement.pad),
    "pixel_shuffle.default": arrangement.shuffle,
    "pixel_unshuffle.default": arrangement.unshuffle,
}
_ENTRYWISE: dict[str, Handler] = {
    **dict.fromkeys(entrywise.ACTIVATIONS, entrywise.activation),
    **dict.fromkeys(("exp.default", "sqrt.default"), entrywise.scalar),
    "abs.default": entrywise.absolute,
    "prelu.default": entrywise.prelu,
    **dict.fromkeys(("clamp.default", "clamp_min.default"), entrywise.clamp),
    **dict.fromkeys(("add.Tensor", "add.Scalar"), entrywise.add),
    **dict.fromkeys(("sub.Tensor", "sub.Scalar"), entrywise.subtract),
    **dict.fromkeys(("rsub.Tensor", "rsub.Scalar"), entrywise.reverse_subtract),
    **dict.fromkeys(("mul.Tensor", "mul.Scalar"), entrywise.multiply),
    **dict.fromkeys(("div.Tensor", "div.Scalar"), entrywise.divide),
    "neg.default": entrywise.negate,
}
_LAYERS: dict[str, Handler] = {
    "linear.default": layers.linear,
    **dict.fromkeys(("matmul.default", "mm.default"), layers.matrix_product),
    "addmm.default": layers.sum_and_product,
    **dict.fromkeys(("conv1d.default", "conv2d.default", "conv1d.padding", "conv2d.padding"), layers.convolution),
    **dict.fromkeys(("conv_transpose1d.default", "conv_transpose2d.input"), layers.transposed_convolution),
    **dict.fromkeys(("batch_norm.default", "_native_batch_norm_legit_no_training.default"), layers.batch_norm),
    **dict.fromkeys(("layer_norm.default", "rms_norm.default"), layers.token_norm),
    **dict.fromkeys(("max_pool1d.default", "max_pool2d.default"), layers.max_pool),
    **dict.fromkeys(("avg_pool1d.default", "avg_pool2d.default"), layers.average_pool),
    **dict.fromkeys(("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default"), layers.adaptive_average),
    **dict.fromkeys(("adaptive_max_pool1d.default", "adaptive_max_pool2d.default"), layers.adaptive_max),
    **dict.fromkeys(("mean.default", "mean.dim", "sum.default", "sum.dim_IntList"), layers.mean),
}
OPERATIONS: dict[str, Handler] = {**_MOVES, **_ENTRYWISE, **_LAYERS}
