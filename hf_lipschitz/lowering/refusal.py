"""Why a foreign model has no program: one sentence with the module's path, the operation, the reason and the way out.

An operation that no rule knows is refused, never counted as 1-Lipschitz. Operations that people use most have a reason
of their own here; the rest are refused by name alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_lipschitz.errors import UserError


class LoweringError(UserError):
    """A foreign model that has no bound program; the message names the module, the operation, why, and what to do."""


_ATTENTION = (
    "softmax attention has no Lipschitz bound unless queries, keys and values are bounded, since its scores grow with "
    "the square of the input",
    "project each head's queries, keys and values on balls as hf_lipschitz.nn.attention.BoundedAttention does, or mix "
    "tokens with a stored matrix",
)
_OWN_STATISTICS = (
    "it divides by a standard deviation of the input itself, for which no rule is stated",
    "use a batch norm, whose statistics are stored, or no normalisation",
)
_RECURRENT = ("the bound of a recurrence grows with the length of the sequence and has no rule", "unroll it by hand")
_RESIZING = ("resizing has no rule", "use a strided, a transposed convolution or a pixel shuffle")
RANDOM = ("it is random in evaluation mode too", "pass training=self.training, or use nn.Dropout")
PRODUCT = (
    "a product of two activations is not Lipschitz on an unbounded input",
    "scale by a stored scalar instead, or add the branches",
)
PARAMETRIZED = "bake the weight in with torch.nn.utils.parametrize.remove_parametrizations"
COMPUTED = ("it computes a weight from stored tensors", PARAMETRIZED)
DEFAULT = ("it has no rule", "replace it, or state the model's nodes with a bound_program method beside its forward")

# Overload packet of aten -> (why, what to use instead).
_REASONS: dict[str, tuple[str, str]] = {
    "scaled_dot_product_attention": _ATTENTION,
    "softmax": _ATTENTION,
    "_softmax": _ATTENTION,
    "_native_multi_head_attention": _ATTENTION,
    "_transformer_encoder_layer_fwd": _ATTENTION,
    "bmm": PRODUCT,
    "group_norm": _OWN_STATISTICS,
    "native_group_norm": _OWN_STATISTICS,
    "instance_norm": _OWN_STATISTICS,
    "_native_batch_norm_legit": ("it takes the statistics of the batch", "keep running statistics in the batch norm"),
    "var_mean": _OWN_STATISTICS,
    "std": _OWN_STATISTICS,
    "embedding": ("token ids have no distance", "certify the model from its embeddings on"),
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
    "rnn_tanh": _RECURRENT,
    "rnn_relu": _RECURRENT,
    "upsample_nearest2d": _RESIZING,
    "upsample_bilinear2d": _RESIZING,
    "upsample_bicubic2d": _RESIZING,
    "native_dropout": RANDOM,
    "bernoulli": RANDOM,
    "einsum": ("it has no rule", "write it as a linear layer, a transpose or a matrix product"),
    "index": ("picking entries by a stored index has no rule", "slice a range, or permute axes"),
    "numpy_T": PRODUCT,
    "max": ("a maximum over an axis has no rule", "use a max pool, or group sort as an activation"),
    "amax": ("a maximum over an axis has no rule", "use a max pool, or group sort as an activation"),
    "minimum": ("it has no rule for two activations", "use MaxMin as an activation"),
    "maximum": ("it has no rule for two activations", "use MaxMin as an activation"),
    "sort": ("sorting along an axis has no rule", "use group_sort of this library as an activation"),
    "flip": ("it has no rule", "reorder the weights of the next layer instead"),
    "roll": ("it has no rule", "use a circular convolution, or ShiftMixer of this library"),
    "exp": ("its slope is unbounded", "use an activation with bounded slope"),
    "square": ("its slope is unbounded", "use an activation with bounded slope"),
    "pow": ("its slope is unbounded", "use an activation with bounded slope"),
    "sqrt": ("its slope is unbounded near zero", "use an activation with bounded slope"),
    "linalg_vector_norm": ("dividing by a norm has an unbounded slope near zero", "project on a ball instead"),
    "_weight_norm": COMPUTED,
}


def packet(operation: str) -> str:
    """``relu.default`` -> ``relu``."""
    return operation.split(".")[0]


def has_reason(operation: str) -> bool:
    """Whether an operation is refused for a reason of its own."""
    return packet(operation) in _REASONS


def unknown(places: Sequence[tuple[str, str]]) -> LoweringError:
    """The refusal of operations without rule, each a place and a name; the first with a reason of its own leads."""
    where, operation = next((each for each in places if has_reason(each[1])), places[0])
    why, instead = _REASONS.get(packet(operation), DEFAULT)
    others = dict.fromkeys(packet(name) for _, name in places if packet(name) != packet(operation))
    names = ", ".join(others)
    more = f" (without a rule are also: {names})" if others else ""
    return refusal(where, packet(operation), why, f"{instead}{more}")


def refusal(where: str, operation: str, why: str, instead: str) -> LoweringError:
    """One sentence: module path, operation, why, what to use instead."""
    return LoweringError(f"{where}: {operation} cannot be certified: {why}; {instead}")


def place(meta: Mapping[str, Any], root: str) -> str:
    """The innermost module that a traced operation came from: its path and the name of its class."""
    stack = list((meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else (root, "")
    kind = kind if isinstance(kind, str) else kind.__name__
    path = path.removeprefix(root).lstrip(".")
    return f"{path or 'the model'} ({kind.rsplit('.', 1)[-1]})" if kind else path or "the model"
