"""The traced graph of a foreign model: ``torch.export`` of a float64 copy in evaluation mode, without side effects.

The copy is traced at a batch of two, so that whatever depends on the batch shows in a shape, and it is kept to compare
the finished program with. In-place operations are made pure. Names of tensors are those of the state dict.
"""

from __future__ import annotations

import copy
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import ExportGraphSignature
from torch.nn.utils.parametrize import is_parametrized

from hf_lipschitz.lowering.refusal import COMPUTED, LoweringError, place, refusal

BATCH = 2
ROOT = "model"  # where the traced wrapper keeps the model


class _OneTensor(nn.Module):
    """The model with its answer reduced to one tensor: the answer itself, or its ``logits``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, ...)."""
        answer = self.model(x)
        answer = answer if isinstance(answer, torch.Tensor) else getattr(answer, "logits", answer)
        if not isinstance(answer, torch.Tensor):
            raise LoweringError(
                f"the model returns a {type(answer).__name__}, neither a tensor nor an object with logits: wrap it in "
                "a module that returns one tensor"
            )
        return answer


@dataclass(frozen=True)
class Exported:
    """A traced model.

    Attributes:
        model: the float64 copy; ``model(x)`` gives one tensor.
        nodes: calls that the output depends on, in order.
        tensors: graph input -> state-dict name and shape of a stored tensor.
        refused: graph input -> sentence, for constants that no file would hold.
        example: graph input of the example, of shape ``(2, *sample shape)``.
        output: the node that is the answer.
    """

    model: nn.Module
    nodes: tuple[torch.fx.Node, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    refused: dict[str, str]
    example: torch.fx.Node
    output: torch.fx.Node


def export(model: nn.Module, example: torch.Tensor) -> Exported:
    """Trace a model.

    Args:
        model: any module; it is copied, never changed.
        example: (B, ...) of floats; only its shape counts.

    Raises:
        LoweringError: hooks, an example that is no batch of floats, or a forward that cannot be traced.
    """
    _check_example(example)
    _check_modules(model)
    wrapped = prepared(model)
    inputs = example.detach().to(device="cpu", dtype=torch.float64)[:1]
    inputs = inputs.expand(BATCH, *inputs.shape[1:]).clone()
    try:
        with silent():
            program = torch.export.export(wrapped, (inputs,), strict=False)
            if _writes(program):
                program = program.run_decompositions({})
    except LoweringError:
        raise
    except Exception as error:  # whatever a foreign forward raises
        raise LoweringError(_untraceable(wrapped, error)) from None
    return _read(wrapped, program)


def prepared(model: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode that answers with one tensor."""
    return _OneTensor(_double(model))


def _check_example(example: Any) -> None:
    if not isinstance(example, torch.Tensor) or not example.is_floating_point():
        kind = example.dtype if isinstance(example, torch.Tensor) else type(example).__name__
        raise LoweringError(
            f"the example input is {kind}, but a distance needs real numbers: give one tensor of floats, a batch of "
            "images, signals or embeddings"
        )
    if example.ndim < 2 or 0 in example.shape:
        raise LoweringError(
            f"the example input has shape {tuple(example.shape)}: its leading axis must be the batch, with a sample "
            "of at least one entry behind it"
        )


def _check_modules(model: nn.Module) -> None:
    """Refuse what a weights file would not hold: hooks, weights computed from other tensors, and shared tensors."""
    names: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(tensor), name)
        if first != name:
            raise LoweringError(f"parameter {name!r} is {first!r}, which a file holds once: give each layer its own")
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        if is_parametrized(module):
            raise refusal(where, "a parametrized tensor", *COMPUTED)
        if module._forward_hooks or module._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            raise LoweringError(
                f"{where} has a forward hook, which no file would hold: remove it (an old-style weight or spectral "
                "norm with torch.nn.utils.remove_weight_norm or remove_spectral_norm) and certify again"
            )


def _double(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise LoweringError(f"the model cannot be copied ({first}): certify it before its tensors are traced") from None
    return copied.to(device="cpu", dtype=torch.float64).eval().requires_grad_(False)


def _writes(program: torch.export.ExportedProgram) -> bool:
    """Whether an operation changes a tensor in place, which the same graph without side effects does not."""
    targets = [node.target for node in program.graph.nodes]
    return any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets)


@contextmanager
def silent() -> Iterator[None]:
    """While this is open, nothing is logged, printed on stderr or warned of: a failure is said in our one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _untraceable(wrapped: nn.Module, error: Exception) -> str:
    """Where a forward could not be traced, and why: the innermost module on the traceback, and its line."""
    paths = {id(module): path for path, module in wrapped.named_modules()}
    where = "the model"
    for frame, line in traceback.walk_tb(error.__traceback__):
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        module = frame.f_locals.get(names[0]) if names else None
        if id(module) in paths and frame.f_code.co_name == "forward" and not isinstance(module, _OneTensor):
            found = place({"nn_module_stack": {"": (paths[id(module)], type(module).__name__)}}, ROOT)
            where = f"{found}, line {line} of {Path(frame.f_code.co_filename).name}"
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        return (
            f"{where}: the forward decides by values of its input, so it is no straight-line program: write it without "
            "such a branch"
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message").rstrip(".")
    return (
        f"{where}: the forward cannot be traced by torch.export ({type(error).__name__}: {first}): give an example "
        "that the model takes, or rewrite the forward there"
    )


def _read(wrapped: nn.Module, program: torch.export.ExportedProgram) -> Exported:
    signature = program.graph_signature
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    examples = [node for node in placeholders if node.name in signature.user_inputs]
    if signature.buffers_to_mutate:
        name = next(iter(signature.buffers_to_mutate.values())).removeprefix(f"{ROOT}.")
        raise LoweringError(f"buffer {name!r} changes in evaluation mode: the model is no function of its input alone")
    outputs = [node for node in program.graph.nodes if node.name in signature.user_outputs]
    if len(outputs) != 1:
        raise LoweringError("the model's output is a stored tensor or its input itself: there is nothing to certify")
    state, tensors, refused = program.state_dict, dict[str, tuple[str, tuple[int, ...]]](), dict[str, str]()
    for node in placeholders:
        name, reason = _stored(node.name, signature)
        if reason:
            refused[node.name] = reason
        elif name:
            tensors[node.name] = (name.removeprefix(f"{ROOT}."), tuple(state[name].shape))
    return Exported(wrapped, _reachable(outputs[0]), tensors, refused, examples[0], outputs[0])


def _stored(node: str, signature: ExportGraphSignature) -> tuple[str, str]:
    """State-dict name of a graph input, or the sentence that refuses it; neither for the example."""
    name = signature.inputs_to_parameters.get(node) or signature.inputs_to_buffers.get(node) or ""
    constant = signature.inputs_to_lifted_tensor_constants.get(node)
    if constant is not None:
        short = constant.removeprefix(f"{ROOT}.")
        return "", f"constant {short!r} is no parameter or buffer: store it with register_buffer"
    if name in signature.non_persistent_buffers:
        short = name.removeprefix(f"{ROOT}.")
        return "", f"buffer {short!r} is not saved with the weights: register it as persistent"
    return name, ""


def _reachable(output: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """The calls that an output depends on, in the graph's order."""
    found, todo = {output}, [output]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                todo.append(node)
    return tuple(node for node in output.graph.nodes if node in found and node.op != "placeholder")
