"""Lies: certificates that are well-formed and whose digests are right, about numbers, programs or weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hf_lipschitz.bounds.program import Node
from tests.attacks.forging import (
    Attack,
    certificate_of,
    edit_weights,
    forge_program,
    restated,
    reweighted,
    scaled,
    state,
)


def stated_scaled(field: str, factor: float) -> Attack:
    return lambda folder: state(folder, **{field: scaled(getattr(certificate_of(folder), field), factor)})


def rounding_scaled(dtype: str, field: str, factor: float) -> Attack:
    def attack(folder: Path) -> None:
        rounding = dict(certificate_of(folder).rounding)
        lowered = dataclasses.replace(rounding[dtype], **{field: getattr(rounding[dtype], field) * factor})
        state(folder, rounding={**rounding, dtype: lowered})

    return attack


def matrix(factor: float) -> Attack:
    """Every stated norm and witness scaled."""

    def attack(folder: Path) -> None:
        matrices = certificate_of(folder).matrices
        changed = {label: dataclasses.replace(norm, value=norm.value * factor) for label, norm in matrices.items()}
        state(folder, matrices=changed)

    return attack


def witnesses(factor: float) -> Attack:
    def attack(folder: Path) -> None:
        matrices = certificate_of(folder).matrices
        state(
            folder,
            matrices={
                label: dataclasses.replace(norm, witness=norm.witness and norm.witness * factor)
                for label, norm in matrices.items()
            },
        )

    return attack


def _index(nodes: list[Node], op: str, which: int = 0) -> int:
    return [i for i, node in enumerate(nodes) if node.op == op][which]


def _replaced(kind: str, which: int = 0, /, **changes: Any) -> Attack:
    """One node with other fields."""

    def change(nodes: list[Node]) -> list[Node]:
        index = _index(nodes, kind, which)
        nodes[index] = dataclasses.replace(nodes[index], **changes)
        return nodes

    return lambda folder: forge_program(folder, change)


def _deleted(op: str, which: int = 0) -> Attack:
    """One node left out, its input in its place."""

    def change(nodes: list[Node]) -> list[Node]:
        index = _index(nodes, op, which)
        (source,) = nodes[index].inputs
        return [
            dataclasses.replace(node, inputs=tuple(source if i == index else i for i in node.inputs)) for node in nodes
        ]

    return lambda folder: forge_program(folder, change)


def _swapped_tensors(nodes: list[Node]) -> list[Node]:
    """The two channel maps of the blocks change places."""
    a, b = (
        next(
            i
            for i, n in enumerate(nodes)
            if n.tensors.get("weight") == f"lip_vit.stages.0.blocks.{k}.channel.linear.weight"
        )
        for k in (0, 1)
    )
    nodes[a], nodes[b] = (
        dataclasses.replace(nodes[a], tensors=nodes[b].tensors),
        dataclasses.replace(nodes[b], tensors=nodes[a].tensors),
    )
    return nodes


def _swapped_outputs(folder: Path) -> None:
    outputs = certificate_of(folder).program.outputs
    forge_program(folder, lambda nodes: nodes, {"features": outputs["logits"], "logits": outputs["features"]})


def _no_head(folder: Path) -> None:
    """The features passed off as logits, the head's tensors deleted."""
    edit_weights(folder, lambda tensors: [tensors.pop(f"classifier.{part}") for part in ("weight", "bias")])
    features = certificate_of(folder).program.outputs["features"]
    forge_program(folder, lambda nodes: nodes, {"features": features, "logits": features})


def _origin(folder: Path) -> None:
    old = certificate_of(folder)
    state(
        folder,
        bound=dataclasses.replace(old.bound, origin="model_input"),
        bound_features=dataclasses.replace(old.bound_features, origin="model_input"),
    )


def _norm(folder: Path) -> None:
    old = certificate_of(folder)
    state(
        folder,
        bound=dataclasses.replace(old.bound, norm="token_max"),
        bound_features=dataclasses.replace(old.bound_features, norm="token_max"),
    )


def _double_a_matrix(tensors: dict[str, Any]) -> None:
    tensors["lip_vit.neck.0.linear.weight"] *= 2.0


def _rename(tensors: dict[str, Any]) -> None:
    tensors["neck.0.linear.bias"] = tensors.pop("lip_vit.neck.0.linear.bias")


def _without_rounding(content: Any) -> None:
    content["rounding"] = {}
    content["matrices"] = [entry for entry in content["matrices"] if not entry["label"].endswith("|abs")]


# name, attack, the claim that fails, a part of the reason
LIES: list[tuple[str, Attack, str, str]] = [
    # lies in numbers
    ("bound lowered", stated_scaled("bound", 0.999), "bound", "bound to logits is .* above the claimed"),
    ("bound lowered a little", stated_scaled("bound", 1.0 - 3e-9), "bound", "bound to logits is .* above the claimed"),
    (
        "features bound lowered",
        stated_scaled("bound_features", 0.5),
        "bound",
        "bound to features is .* above the claimed",
    ),
    ("float32 error lowered", rounding_scaled("float32", "features_error", 0.9), "rounding", "float32 is smaller than"),
    ("float64 error lowered", rounding_scaled("float64", "logits_error", 0.9), "rounding", "float64 is smaller than"),
    (
        "norm of features lowered",
        rounding_scaled("float32", "features_norm", 0.9),
        "rounding",
        "float32 is smaller than",
    ),
    ("error zero", rounding_scaled("float64", "features_error", 0.0), "rounding", "float64 is smaller than"),
    ("norms lowered", matrix(0.9), "bound", "matrix .*above the stated"),
    ("witnesses raised", witnesses(1.5), "bound", "matrix .*above the stated"),
    ("norms deleted", lambda f: state(f, matrices={}), "bound", "matrix .*used but not stated"),
    (
        "norm invented",
        restated(lambda c: c["matrices"].insert(0, {**c["matrices"][0], "label": "a"})),
        "bound",
        "a norm is stated for it that is not used",
    ),
    ("another norm", _norm, "bound", "above the claimed|smaller than"),
    ("another origin", _origin, "bound", "speaks of l2 from 'model_input', the program does not"),
    (
        "bfloat16 claimed",
        restated(lambda c: c["rounding"].update(bfloat16=c["rounding"]["float32"])),
        "rounding",
        "bfloat16 is smaller",
    ),
    ("rounding left out", restated(_without_rounding), "rounding", "states no rounding allowance for any dtype"),
    # other programs, certified correctly
    ("activation deleted", _deleted("maxmin@1"), "program", "node 4 is .*offset@1.* expected .*maxmin@1"),
    ("activation replaced", _replaced("maxmin@1", op="abs@1", attrs={"channels": 4}), "program", "node 4 is .*abs@1"),
    ("activation grouped", _replaced("maxmin@1", 1, op="group_sort@1", attrs={"group": 2}), "program", "group_sort@1"),
    ("mixer deleted", _deleted("shift@1"), "program", "node .* expected .*shift@1"),
    ("shift shortened", _replaced("shift@1", attrs={"height": 4, "width": 4, "moved": 2}), "program", "shift@1"),
    (
        "residual weight fixed",
        _replaced("residual@1", scalars={"weight": ["mul", 0, ["tensor", "lip_vit.stages.0.blocks.1.mixer.residual"]]}),
        "program",
        "residual@1",
    ),
    ("normaliser changed", _replaced("scale@1", scalars={"factor": 1e-3}), "program", "scale@1"),
    (
        "normalisation changed",
        _replaced("normalize@1", attrs={"mean": [0.5] * 3, "std": [100.0] * 3}),
        "program",
        "normalize@1",
    ),
    ("pooling replaced", _replaced("l2_pool@1", op="sum_pool@1", attrs={}), "program", "sum_pool@1"),
    ("roles swapped", lambda f: forge_program(f, _swapped_tensors), "program", "node .* expected"),
    (
        "input renamed",
        _replaced("input@1", attrs={"shape": [3, 8, 8], "space": "model_input"}),
        "program",
        "model_input",
    ),
    ("outputs swapped", _swapped_outputs, "program", "outputs"),
    ("head left out", _no_head, "program", "node|outputs"),
    ("head's eps", _replaced("normalized_linear@1", attrs={"eps": 1.0}), "program", "normalized_linear@1"),
    # programs that the kernel does not accept
    ("node deleted", restated(lambda c: c["program"]["nodes"].pop(4)), "bound", "program"),
    (
        "operation unknown",
        restated(lambda c: c["program"]["nodes"][4].update(op="hardshrink@1")),
        "bound",
        "no rule named 'hardshrink@1'",
    ),
    (
        "foreign operation",
        restated(lambda c: c["program"]["nodes"][4].update(op="acme::x@1")),
        "bound",
        "no rule named 'acme::x@1'",
    ),
    ("forward reference", restated(lambda c: c["program"]["nodes"][4].update(inputs=[9])), "bound", "node 4 .*inputs"),
    (
        "role without tensor",
        restated(lambda c: c["program"]["nodes"][3]["tensors"].update(weight="w")),
        "bound",
        "'w' is read by the program but missing|norm stated",
    ),
    (
        "bias left out",
        restated(lambda c: c["program"]["nodes"][3]["tensors"].pop("bias")),
        "bound",
        "linear.bias' is stored but not covered",
    ),
    # weights
    ("weights doubled", reweighted(_double_a_matrix), "bound", "above the claimed"),
    (
        "weights with NaN",
        reweighted(lambda t: t["classifier.bias"].fill(np.nan)),
        "bound",
        "'classifier.bias' contains NaN",
    ),
    (
        "extra tensor",
        reweighted(lambda t: t.update(extra=np.zeros(3, np.float32))),
        "bound",
        "'extra' is stored but not covered",
    ),
    (
        "extra counter",
        reweighted(lambda t: t.update({"x.num_batches_tracked": np.zeros(1, np.int64)})),
        "program",
        "unexpected_keys",
    ),
    (
        "tensor missing",
        reweighted(lambda t: t.pop("classifier.bias")),
        "bound",
        "'classifier.bias' is read by the program but missing",
    ),
    ("tensor renamed", reweighted(_rename), "bound", "missing from the weights"),
    (
        "head with another row",
        reweighted(lambda t: t.update({"classifier.weight": np.vstack([t["classifier.weight"]] * 2)})),
        "bound",
        "classifier",
    ),
]
