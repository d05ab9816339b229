"""A lowered program computes what the model computes, has the nodes it should have, and is bounded."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_lipschitz.bounds.engine import bound_program, evaluate_program
from hf_lipschitz.bounds.program import Node, Program
from hf_lipschitz.bounds.rule import Geometry
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import state_arrays
from hf_lipschitz.lowering.lower import check_program, lower
from hf_lipschitz.lowering.refusal import LoweringError
from tests.lowering.cases import LOWERED, REFUSED, Answer, Lowered, Refused, Written, tiny_resnet


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """All tensors random, variances positive, so that no layer is near the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return model


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The model's answer in evaluation mode and float64."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of "same" padding with an even kernel
        answer = model.double().eval()(x)
    return answer.logits if isinstance(answer, Answer) else answer


def ids(row: Any) -> str:
    return row.name


@pytest.mark.parametrize("row", LOWERED, ids=ids)
def test_the_program_is_the_model(row: Lowered) -> None:
    model = filled(row.model()).train()
    program = lower(model, torch.zeros(1, *row.shape))
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert program == program.canonical() == Program.from_json(program.to_json())
    counts = Counter(node.op.removesuffix("@1") for node in program.nodes)
    assert {op: counts[op] for op in row.counts} == row.counts
    weights = state_arrays(model)
    x = torch.randn(3, *row.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    executed = evaluate_program(program, weights, BUILT_IN, x.numpy())["logits"]
    expected = output(model, x.clone()).numpy()
    assert executed.reshape(expected.shape) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("geometry", ["l2", "token_max"])
@pytest.mark.parametrize("row", [r for r in LOWERED if r.name in ("cnn", "signals", "mixer", "resnet")], ids=ids)
def test_no_pair_of_inputs_exceeds_the_bound(row: Lowered, geometry: Geometry) -> None:
    """The Jacobian at one input, in the direction that grows the answer most in the geometry, stays below the bound."""
    model = filled(row.model())
    program = lower(model, torch.zeros(1, *row.shape))
    bound = bound_program(program, state_arrays(model), BUILT_IN, geometry=geometry).outputs["logits"].lipschitz
    model = model.double().eval()
    x = torch.randn(1, *row.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings(action="ignore"):
        jacobian = torch.autograd.functional.jacobian(lambda z: model(z)[0], x).reshape(-1, *row.shape)
    if geometry == "token_max":  # every token moves by one unit along its own gradient
        size = jacobian.norm(dim=1 if len(row.shape) == 3 else -1, keepdim=True).clamp_min(1e-30)
        reached = (jacobian / size * jacobian).flatten(1).sum(1).max().item()
    else:
        reached = torch.linalg.matrix_norm(jacobian.flatten(1), 2).item()
    assert 0.0 < reached <= bound


@pytest.mark.parametrize("row", REFUSED, ids=ids)
def test_refused(row: Refused) -> None:
    with pytest.raises(ValueError, match=row.says) as caught:
        lower(filled(row.model()), torch.zeros(1, *row.shape))
    assert "\n" not in str(caught.value) and "None" not in str(caught.value)


def test_features_are_what_the_last_linear_layer_reads() -> None:
    program = lower(tiny_resnet(), torch.zeros(1, 3, 16, 16))
    assert program.nodes[program.outputs["logits"]].op == "linear@1"
    assert program.nodes[program.outputs["features"]].op == "mean_pool@1"
    open_end = lower(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4))
    assert open_end.outputs["features"] == open_end.outputs["logits"]
    tokens = lower(nn.Linear(4, 3), torch.zeros(1, 5, 4))
    assert tokens.outputs["features"] == tokens.outputs["logits"]


def test_names_are_those_of_the_state_dict() -> None:
    model = tiny_resnet()
    names = lower(model, torch.zeros(1, 3, 16, 16)).tensor_names()
    assert names == {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_only_the_shape_of_the_example_counts(batch: int) -> None:
    model = filled(tiny_resnet())
    example = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    assert lower(model, example) == lower(model, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    model = filled(tiny_resnet()).to(dtype)
    assert lower(model, torch.zeros(1, 3, 16, 16)) == lower(tiny_resnet(), torch.zeros(1, 3, 16, 16))


def test_the_space_is_the_callers() -> None:
    given = [lower(nn.Linear(4, 3), torch.zeros(1, 4), space=space) for space in ("model_input", "pixels[0,1]")]
    assert [program.nodes[0].attrs["space"] for program in given] == ["model_input", "pixels[0,1]"]


def test_shared_tensors_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(LoweringError, match=r"parameter '1.weight' is '0.weight', which a file holds once: give each"):
        lower(model, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.zeros(1, 4, dtype=torch.int64), "the example input is torch.int64, but a distance needs real numbers"),
        ([1.0, 2.0], "the example input is list, but a distance needs real numbers: give one tensor of floats"),
        (torch.zeros(4), r"has shape \(4,\): its leading axis must be the batch"),
        (torch.zeros(0, 4), r"has shape \(0, 4\): its leading axis must be the batch"),
    ],
)
def test_examples_that_are_none(example: Any, says: str) -> None:
    with pytest.raises(LoweringError, match=says):
        lower(nn.Linear(4, 4), example)


def test_a_conv_and_its_norm_stay_apart_where_both_are_read() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.parts["conv"](x)
            return y + self.parts["norm"](y)

    counts = Counter(node.op for node in lower(filled(Both()), torch.zeros(1, 3, 5, 5)).nodes)
    assert counts["convolution@1"] == counts["batch_norm@1"] == 1 and not counts["convolution_batch_norm@1"]


@pytest.mark.parametrize("space", ["model_input", "pixels[0,1]"])
def test_another_program_is_refused(space: Any) -> None:
    """The check by execution can fail: a program that scales by a hundredth more."""
    model, factor = Written(lambda x, a: a * x, (1,)), ["tensor", "parts.0"]

    def scaled(scalar: Any) -> Program:
        nodes = (Node("input@1", (), {"shape": [4], "space": space}), Node("scale@1", (0,), {}, {}, {"factor": scalar}))
        return Program(nodes, {"features": 1, "logits": 1})

    check_program(scaled(factor), model, space=space)
    with pytest.raises(LoweringError, match=r"the answers of the program differ from the model's by 0\.0"):
        check_program(scaled(["mul", factor, 1.01]), model, space=space)


def test_answers_that_depend_on_the_rest_of_the_batch_are_refused() -> None:
    class Alone(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(x)

    nodes = (Node("input@1", (), {"shape": [4], "space": "model_input"}), Node("scale@1", (0,), {}, {}, {"factor": 3}))
    with pytest.raises(LoweringError, match="for one sample without the rest of a batch"):
        check_program(Program(nodes, {"features": 1, "logits": 1}), Alone())
    with pytest.raises(LoweringError, match="the answers of the program differ"):
        lower(Alone(), torch.zeros(1, 4))


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for row in REFUSED:
        if row.name in ("data", "failing"):
            with pytest.raises(LoweringError):
                lower(row.model(), torch.zeros(1, *row.shape))
    assert capfd.readouterr() == ("", "")


def test_random_numbers_are_left_alone() -> None:
    model = tiny_resnet()
    before, again = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    lower(model, torch.zeros(1, 3, 16, 16))
    assert torch.equal(torch.random.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], again)
