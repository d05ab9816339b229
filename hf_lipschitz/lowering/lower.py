"""A foreign torch model as a bound program, or a refusal that names the module.

``torch.export`` traces a float64 copy in evaluation mode; each operation of the graph becomes nodes of the kernel's
vocabulary, whose tensors are named as in the state dict. Nothing is guessed: what has no rule is refused, and the
finished program is executed beside the model (agreement.py) before anyone bounds it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from hf_lipschitz.bounds.program import Program
from hf_lipschitz.lowering.agreement import check_agreement
from hf_lipschitz.lowering.builder import Builder, name_of
from hf_lipschitz.lowering.export import BATCH, ROOT, Exported, export, prepared
from hf_lipschitz.lowering.folding import fold
from hf_lipschitz.lowering.operations import OPERATIONS
from hf_lipschitz.lowering.refusal import LoweringError, place, unknown
from hf_lipschitz.lowering.values import Stored, Value

Space = Literal["model_input", "pixels[0,1]"]


def lower(model: nn.Module, example_input: torch.Tensor, *, space: Space = "model_input") -> Program:
    """The bound program of any torch model whose operations have rules.

    Args:
        model: any module that maps one tensor of floats to one tensor, or to an object with ``logits``. It is copied,
            never changed.
        example_input: (B, *sample shape); only its shape counts. The program is that of one sample of this shape.
        space: what the inputs are: ``model_input`` (anything), or ``pixels[0,1]`` if every entry lies in [0, 1].

    Returns:
        Program whose ``logits`` are the model's answer; ``features`` are what its last linear layer reads, or the
        answer itself if it ends in something else.

    Raises:
        LoweringError: a hook, a forward that cannot be traced, an operation without rule, a constant that is no
            parameter or buffer, samples of a batch that depend on each other, or a program that computes something else
            than the model.
    """
    exported = export(model, example_input)
    program = _program(exported, space)
    check_agreement(program, exported.model, space)
    return program


def check_operations(model: nn.Module, example_input: torch.Tensor) -> None:
    """Refuse a model with operations that have no rule, as ``lower`` does, whatever its weights."""
    _check_operations(export(model, example_input))


def check_program(program: Program, model: nn.Module, *, space: Space = "model_input") -> None:
    """Execute a claimed program beside a model that states none; LoweringError if they differ (tested, not proved)."""
    check_agreement(program, prepared(model), space)


def _program(exported: Exported, space: Space) -> Program:
    _check_operations(exported)
    b, sample = Builder(), tuple(int(n) for n in exported.example.meta["val"].shape[1:])
    values: dict[torch.fx.Node, Any] = {
        exported.example: b.add("input@1", shape=sample, attrs={"shape": list(sample), "space": space})
    }
    for node in exported.nodes:
        b.at = node
        values[node] = _called(b, node, values, exported)
    answer = b.activation(values[exported.output])
    answer = b.settle(answer.reshaped((BATCH, 1)) if answer.shape == (BATCH,) else answer)
    nodes = fold(b.nodes, b.shapes, dict(exported.tensors.values()), answer.node)
    last = nodes[answer.node]
    one_token = last.op == "linear@1" and len(b.shapes[last.inputs[0]]) == 1
    features = last.inputs[0] if one_token else answer.node
    return Program(tuple(nodes), {"features": features, "logits": answer.node}).canonical()


def _check_operations(exported: Exported) -> None:
    """Refuse all operations without rule at once, before anything is built."""
    missing = [
        (place(node.meta, ROOT), name_of(node))
        for node in exported.nodes
        if node.target is not operator.getitem and name_of(node) not in OPERATIONS
    ]
    if missing:
        raise unknown(missing)


def _called(b: Builder, node: torch.fx.Node, values: dict[torch.fx.Node, Any], exported: Exported) -> Any:
    """The value of one call of the graph."""

    def value(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [value(each) for each in argument]
        if not isinstance(argument, torch.fx.Node):
            return argument
        if argument in values:
            return values[argument]
        if argument.name in exported.refused:
            raise LoweringError(f"{place(node.meta, ROOT)}: {exported.refused[argument.name]}")
        return Stored(*exported.tensors[argument.name])

    if node.target is operator.getitem:
        return _item(b, value(node.args[0]), node.args[1])
    return OPERATIONS[name_of(node)](b, {key: value(each) for key, each in _arguments(node).items()})


def _item(b: Builder, results: Any, index: Any) -> Value:
    b.need(isinstance(index, int) and index < len(results), "its further results have no rule", "use the first alone")
    return results[index]


def _arguments(node: torch.fx.Node) -> Mapping[str, Any]:
    """Arguments of a call by their names in the operation's schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    named = {each.name: each.default_value for each in node.target._schema.arguments if each.has_default_value()}
    for each, argument in zip(node.target._schema.arguments, node.args, strict=False):
        named[each.name] = argument
    order = [each.name for each in node.target._schema.arguments]
    return {name: {**named, **node.kwargs}[name] for name in order}
