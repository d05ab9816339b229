"""Which tensors a norm may be asked of: entries of any tensor, everything else of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lipschitz.caps.verified_norms import NORMS
from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.routing import Constraint, route

TENSORS = {"scalar": torch.ones(()), "vector": torch.ones(3), "matrix": torch.ones(2, 3), "kernel": torch.ones(2, 1, 3)}


def rule(cap: str) -> dict[str, Any]:
    return {"pattern": ".*", "cap": cap, "value": 1.0}


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_clip_takes_tensors_of_any_shape(name: str) -> None:
    (found,) = route([(name, TENSORS[name])], [rule("clip")])
    assert found.role == "other" and found.constraint is not None
    assert found.constraint.norm == "interval"
    assert NORMS["interval"](found.constraint.capping.function(3.0 * TENSORS[name], value=0.5), None) == 0.5


@pytest.mark.parametrize("cap", ["frobenius_normalize", "spectral_hard_cap", "spectral_hammer"])
@pytest.mark.parametrize("name", ["scalar", "vector", "kernel"])
def test_other_caps_take_matrices_only(name: str, cap: str) -> None:
    with pytest.raises(UserError, match=f"{cap} needs a matrix"):
        route([(name, TENSORS[name])], [rule(cap)])


@pytest.mark.parametrize(
    ("cap", "norm", "role"),
    [
        ("frobenius_normalize", "frobenius", "other"),
        ("spectral_hard_cap", "spectral", "matrix"),
        ("spectral_hammer", "spectral", "matrix"),
    ],
)
def test_a_cap_brings_its_norm_and_role(cap: str, norm: str, role: str) -> None:
    (found,) = route([("a", TENSORS["matrix"])], [rule(cap)])
    assert found.constraint is not None
    assert (found.constraint.norm, found.role) == (norm, role)


def test_a_norm_of_another_cap_is_refused() -> None:
    with pytest.raises(UserError, match="clip enforces the norm interval, not 'spectral'"):
        Constraint.from_dict({**rule("clip"), "norm": "spectral"})


def capped(weight: Tensor) -> float:
    return NORMS["per_head"](weight, 2)


def test_the_hard_cap_also_caps_heads() -> None:
    constraint = Constraint.from_dict({**rule("spectral_hard_cap"), "norm": "per_head", "heads": 2})
    heads = 3.0 * torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    assert capped(heads.reshape(6, 6)) > 1.0
    assert capped(constraint.capping.function(heads, value=1.0).reshape(6, 6)) <= 1.0
