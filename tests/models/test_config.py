"""LipViTConfig: what it derives, and one sentence for everything that cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from hf_lipschitz.models.lip_vit.configuration_lip_vit import LipViTConfig
from hf_lipschitz.models.lip_vit.modeling_lip_vit import LipViTForImageClassification
from hf_lipschitz.models.lip_vit.presets import PRESETS
from tests.models.cases import filled, tiny

_NAN, _INF = float("nan"), float("inf")
_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 7}, "stage 0 has width 7: MaxMin pairs channels"),
    ({"stages": [{"depth": 1, "width": 8}, {"depth": 0, "width": 9}]}, "stage 1 has width 9: MaxMin"),
    ({"image_size": 30, "patch_size": 4}, "patch_size 4 does not divide image_size 30"),
    ({"image_size": 12, "stages": [{"depth": 0, "width": 8}] * 2}, "grid of 3 x 3 patches cannot be halved 1 times"),
    ({"activation": "group_sort", "group_size": 3}, "width 256: GroupSort needs a multiple of group_size 3"),
    ({"token_mixer": "attention", "num_attention_heads": 3}, "width 256: not a multiple of 3 heads"),
    ({"hidden_size": 2}, "width 2: a block needs at least 4 channels"),
    ({"token_mixer": "conv"}, "token_mixer is 'conv'; choose one of shift, orthogonal, attention, hybrid"),
    ({"token_mixer": None}, "token_mixer is None; choose one of"),
    ({"activation": "relu"}, "activation is 'relu'; choose one of"),
    ({"pooling": "cls"}, "pooling is 'cls'; choose one of"),
    ({"image_size": 0}, "image_size is 0: it must be an integer from 1"),
    ({"image_size": -32}, "image_size is -32: it must be an integer"),
    ({"image_size": "32"}, "image_size is '32': it must be an integer"),
    ({"image_size": None}, "image_size is None: it must be an integer"),
    ({"patch_size": 0}, "patch_size is 0: it must be an integer"),
    ({"patch_size": 2.0}, "patch_size is 2.0: it must be an integer"),
    ({"num_channels": 0}, "num_channels is 0: it must be an integer"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0: it must be an integer"),
    ({"group_size": 1}, "group_size is 1: it must be an integer from 2"),
    ({"neck_depth": -1}, "neck_depth is -1: it must be an integer"),
    ({"neck_depth": True}, "neck_depth is True: it must be an integer"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1: it must be an integer"),
    ({"image_std": [1.0]}, "image_std has 1 entries for 3 channels"),
    ({"image_mean": [0.5] * 4}, "image_mean has 4 entries for 3 channels"),
    ({"image_std": [1.0, 0.0, 1.0]}, "image_std is .*: every entry must be positive"),
    ({"image_std": [1.0, -1.0, 1.0]}, "image_std is .*: every entry must be positive"),
    ({"image_std": [1e-9] * 3}, "image_std is .*: every entry must be positive, from 1e-6"),
    ({"image_std": [_NAN] * 3}, "image_std is .*: give a list of numbers"),
    ({"image_mean": [_INF] * 3}, "image_mean is .*: give a list of numbers"),
    ({"image_mean": 0.5}, "image_mean is 0.5: give a list of numbers"),
    ({"image_mean": ["0", "0", "0"]}, "image_mean is .*: give a list of numbers"),
    ({"shift_fraction": 0.3}, "shift_fraction is 0.3: each of four groups takes a share"),
    ({"shift_fraction": 0.0}, "shift_fraction is 0.0"),
    ({"shift_fraction": _NAN}, "shift_fraction is nan: it must be a finite number"),
    ({"abs_fraction": 1.5}, "abs_fraction is 1.5: it must lie in"),
    ({"abs_fraction": "0.5"}, "abs_fraction is '0.5': it must be a finite number"),
    ({"pool_eps": 0.0}, "pool_eps is 0.0: it must lie in"),
    ({"pool_eps": 2.0}, "pool_eps is 2.0: it must lie in"),
    ({"pool_eps": _NAN}, "pool_eps is nan: it must be a finite number"),
    ({"loss_scale": 0.0}, "loss_scale is 0.0: it must be positive"),
    ({"loss_scale": _INF}, "loss_scale is inf: it must be a finite number"),
    ({"stages": []}, "stages is empty"),
    ({"stages": 5}, "stages is 5: write it as a list"),
    ({"stages": [5]}, r"stages is \[5\]: write it as a list"),
    ({"stages": [{"depth": 1}]}, r"stages\[0\] is {'depth': 1}: write it as"),
    ({"stages": [{"depth": 1, "width": 8, "heads": 2}]}, r"stages\[0\] is .*: write it as"),
    ({"stages": [{"depth": 1.0, "width": 8}]}, r"stages\[0\] is .*: write it as"),
    ({"stages": [{"depth": -1, "width": 8}]}, r"stages\[0\] is .*: depth must be at least 0"),
    ({"stages": [{"depth": 1, "width": 0}]}, r"stages\[0\] is .*: depth must be at least 0 and width at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), _REFUSED, ids=lambda value: str(value)[:40])
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LipViTConfig(**changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=f"unknown preset 'huge'; known: {re.escape(', '.join(PRESETS))}"):
        LipViTConfig.from_preset("huge")


def test_a_classifier_of_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels is 1: a classifier needs at least 2 labels"):
        LipViTForImageClassification(tiny(num_labels=1))


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = LipViTConfig.from_preset(name, num_labels=7, token_mixer="attention")
    assert config.num_labels == 7 and config.token_mixer == "attention"
    assert config.stages is not None and config.hidden_size == config.stages[-1]["width"]
    assert config.image_size == (224 if "224" in name else 32)


def test_presets_have_the_announced_sizes() -> None:
    """nano about a million parameters, base about 84 million (counted without making them)."""
    import torch

    for name, millions in (("nano", 1), ("tiny", 4), ("small", 13), ("base", 84)):
        with torch.device("meta"):
            model = LipViTForImageClassification(LipViTConfig.from_preset(name, num_labels=10))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.15), name


def test_json_round_trip(tmp_path: Path) -> None:
    config = tiny(image_mean=[0.1, 0.2], token_mixer="hybrid")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LipViTConfig
    written, read = config.to_dict(), again.to_dict()
    assert all(read[key] == value for key, value in written.items() if key != "_name_or_path")
    assert again.grids() == [(4, 4)]


def test_every_matrix_of_a_model_has_a_constraint() -> None:
    for mixer in ("shift", "orthogonal", "hybrid"):
        model = filled(tiny(token_mixer=mixer, stages=[{"depth": 2, "width": 8}, {"depth": 0, "width": 8}]))
        rules = model.config.constraints or []
        for name, parameter in model.named_parameters():
            found = [rule for rule in rules if re.fullmatch(rule["pattern"], name)]
            assert (len(found) == 1) == (parameter.ndim == 2), name


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"pattern": "x", "cap": "stiefel", "value": -1.0}, "a cap must be a number greater than 0"),
        ({"pattern": "(", "cap": "stiefel", "value": 1.0}, "no regular expression"),
        ({"pattern": "x", "value": 1.0}, "it needs pattern, cap, value"),
        ({"pattern": "x", "cap": "stiefel", "value": 1.0, "bound": 2}, "it needs pattern, cap, value"),
    ],
)
def test_constraints_are_read_where_they_are_written(rule: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LipViTConfig(constraints=[rule])
