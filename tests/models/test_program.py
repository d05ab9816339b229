"""The bound program computes what the model computes, for every mixer, activation, pooling and shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_lipschitz.bounds.engine import bound_program, evaluate_program
from hf_lipschitz.bounds.program import Program
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.certify import program_of_class, state_arrays
from hf_lipschitz.models.lip_vit.configuration_lip_vit import TOKEN_MIXERS, LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification, LipViTModel
from hf_lipschitz.models.lip_vit.presets import PRESETS
from tests.models.cases import FORMS, filled, preset, tiny


def _difference(config: LipViTConfig, count: int = 2) -> float:
    """The largest difference of features and logits, relative to the largest of them."""
    model = filled(config)
    size = (count, config.num_channels, config.image_size, config.image_size)
    images = np.random.default_rng(0).random(size)
    executed = evaluate_program(model.bound_program(), state_arrays(model), BUILT_IN, images)
    model = model.double()
    with torch.no_grad():
        features = model.lip_vit(torch.from_numpy(images)).pooler_output.numpy()
        logits = model(torch.from_numpy(images)).logits.numpy()
    assert executed["features"].shape == features.shape and executed["logits"].shape == logits.shape
    pairs = ((executed["features"], features), (executed["logits"], logits))
    return max(float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max())) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_small_forms(form: str) -> None:
    assert _difference(LipViTConfig(**FORMS[form])) < 1e-10


@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_two_blocks(name: str, mixer: str) -> None:
    """Real widths, real numbers of tokens."""
    assert _difference(preset(name, mixer, 2), count=1) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
@pytest.mark.parametrize("name", PRESETS)
def test_full_presets(name: str, mixer: str) -> None:
    assert _difference(preset(name, mixer, None), count=1) < 1e-10


def test_a_wrong_program_is_found() -> None:
    """The comparison sees a bias left out, another activation, and another token order."""
    model = filled(tiny())
    images = np.random.default_rng(0).random((2, 2, 8, 8))
    program, weights = model.bound_program(), state_arrays(model)
    reference = evaluate_program(program, weights, BUILT_IN, images)["features"]
    for change in (_without_bias, _with_abs, _with_other_shift):
        other = Program(tuple(change(node) for node in program.nodes), program.outputs)
        read = {name: value for name, value in weights.items() if name in other.tensor_names()}
        executed = evaluate_program(other, read, BUILT_IN, images)["features"]
        assert np.abs(executed - reference).max() > 1e-3


def _changed(node: Any, **changes: Any) -> Any:
    return type(node)(**{**vars(node), **changes})


def _without_bias(node: Any) -> Any:
    return _changed(node, tensors={slot: name for slot, name in node.tensors.items() if slot != "bias"})


def _with_abs(node: Any) -> Any:
    return _changed(node, op="abs@1", attrs={"channels": 4}) if node.op == "maxmin@1" else node


def _with_other_shift(node: Any) -> Any:
    return _changed(node, attrs={**node.attrs, "moved": 2}) if node.op == "shift@1" else node


@pytest.mark.parametrize("form", [form for form in FORMS if "maxmin l2" in form])
def test_a_program_is_a_function_of_class_and_config(form: str) -> None:
    """Rebuilt without weights it is the same, and it does not change with them."""
    config = LipViTConfig(**FORMS[form])
    programs = {
        filled(config, 1).bound_program().canonical_bytes(),
        filled(config, 2).double().bound_program().canonical_bytes(),
        program_of_class(LipViTForImageClassification, config).canonical_bytes(),
        program_of_class(LipViTForImageClassification, LipViTConfig(**config.to_dict())).canonical_bytes(),
    }
    assert len(programs) == 1
    program = filled(config).bound_program()
    assert Program.from_json(program.to_json()) == program
    assert program.tensor_names() == set(filled(config).state_dict())


def test_the_body_alone_has_a_program() -> None:
    config = tiny()
    body = program_of_class(LipViTModel, config)
    assert body.outputs["features"] == body.outputs["logits"]
    assert body.nodes[0].op == "input@1"


@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
def test_fresh_models_are_one_lipschitz_to_the_features(mixer: str) -> None:
    """Initial weights satisfy the constraints, so the features are 1-Lipschitz on normalised input: 2 with this std."""
    config = tiny(token_mixer=mixer, image_std=[0.5, 2.0])
    model = LipViTForImageClassification(config)
    bound = bound_program(model.bound_program(), state_arrays(model), BUILT_IN)
    assert 1.9 < bound.outputs["features"].lipschitz <= 2.0
    assert bound.outputs["logits"].lipschitz <= 2.0 * 3.0**0.5
