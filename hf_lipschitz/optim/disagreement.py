"""Where the constraints, the optimizer and the model do not speak of the same weights, in words for whoever trains.

Nothing here is an error: training goes on, and what is capped stays capped. But after a head was changed, an adapter
added, or an optimizer built too early, something that the user believes to be kept or trained is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.enforcement import inner_optimizer
from hf_lipschitz.optim.routing import Constraint, Route, bare_model, constraints_of, read_constraints, route
from hf_lipschitz.optim.spectral_muon import SpectralMuon

_LISTED = 3  # how many parameters a sentence lists

Rules = Sequence[Constraint | Mapping[str, Any]]


class ConstraintMismatchWarning(UserWarning):
    """Constraints, optimizer and model do not speak of the same weights."""


def disagreements(model: nn.Module, constraints: Rules | None, optimizer: torch.optim.Optimizer) -> list[str]:
    """What a user should know before training with these three, one sentence each; empty where all agrees.

    Args:
        model: the model, possibly compiled or wrapped for distributed data parallelism.
        constraints: the rules that are enforced, or their plain data; None takes ``model.config.constraints``.
        optimizer: the optimizer, possibly inside accelerate's wrapper.

    Frozen parameters are not mentioned.

    Raises:
        UserError: the constraints do not fit the model, see ``routing.route``.
    """
    model, optimizer = bare_model(model), inner_optimizer(optimizer)
    rules = constraints_of(model) if constraints is None else read_constraints(constraints)
    named = dict(model.named_parameters())
    routes = route(named.items(), rules)
    stored = getattr(getattr(model, "config", None), "constraints", None)
    found = _membership(routes, named, optimizer)
    if stored or hasattr(model, "bound_program"):
        found += _free_matrices(routes, named)
    if isinstance(optimizer, SpectralMuon):
        found += _roles(routes, named, optimizer)
        found += _other_rules(routes, named, getattr(optimizer, "constraints", None))
    if stored:
        found += _saved(routes, named, stored)
    return found


@dataclass(frozen=True, eq=False)  # tensors are compared by identity
class _Held:
    """A parameter of an optimizer, with the name that was recorded when it was built, if any."""

    parameter: Tensor
    name: str | None
    group: Mapping[str, Any]


def _held(optimizer: torch.optim.Optimizer) -> dict[int, _Held]:
    found: dict[int, _Held] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        found |= {id(p): _Held(p, name, group) for p, name in zip(group["params"], names, strict=True)}
    return found


def _membership(routes: Sequence[Route], named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameters that the optimizer lacks, those that are not the model's, and those that were replaced meanwhile."""
    held, kind = _held(optimizer), type(optimizer).__name__
    ours = {id(parameter) for parameter in named.values()}
    absent = [line for line in routes if named[line.name].requires_grad and id(named[line.name]) not in held]
    if absent and not ours & held.keys():
        return [f"{kind} holds no parameter of this model, so nothing of it is trained: build it from this model"]
    foreign = [one for key, one in held.items() if key not in ours]
    replaced: list[Route] = []
    for line in absent:
        former = _former(line, foreign, named)
        if former is not None:
            foreign.remove(former)
            replaced.append(line)
    missing = [line for line in absent if line not in replaced and line.constraint is not None]
    found: list[str] = []
    if replaced:
        found.append(
            f"{kind} holds other objects than the model's for {_names(replaced)}, as after a module was replaced, so "
            "the model's stay as they are: build the optimizer after changing the model"
        )
    if missing:
        found.append(
            f"no parameter group of {kind} holds the constrained {_names(missing)}, so training leaves them as they "
            "are: build the optimizer after changing the model, or freeze what is not to be trained"
        )
    if foreign:
        found.append(
            f"{kind} also updates what is not the model's, {_some([_described(one) for one in foreign])}, which no "
            "constraint reaches and no checkpoint of the model holds: take it out unless it belongs to the loss"
        )
    return found


def _former(line: Route, foreign: Sequence[_Held], named: Mapping[str, Tensor]) -> _Held | None:
    """What the optimizer holds in a parameter's place: by the name recorded, else by the shape."""
    by_name = [one for one in foreign if one.name == line.name]
    nameless = [one for one in foreign if one.name is None or one.name not in named]
    by_shape = [one for one in nameless if tuple(one.parameter.shape) == line.shape]
    return next(iter(by_name + by_shape), None)


def _free_matrices(routes: Sequence[Route], named: Mapping[str, Tensor]) -> list[str]:
    """Trainable matrices without a constraint: a new head, an adapter."""
    free = [line for line in routes if line.constraint is None and len(line.shape) >= 2]
    free = [line for line in free if named[line.name].requires_grad]
    if not free:
        return []
    return [
        f"no constraint caps the trainable {_names(free)}, so nothing keeps the norm there from growing: add a rule to "
        "the constraints, or freeze what is not to be trained"
    ]


def _roles(routes: Sequence[Route], named: Mapping[str, Tensor], optimizer: SpectralMuon) -> list[str]:
    """Matrices in the wrong part of SpectralMuon."""
    roles = {key: one.group.get("role") for key, one in _held(optimizer).items()}
    trained = [(line, roles.get(id(named[line.name]))) for line in routes if named[line.name].requires_grad]
    by_adamw = [line for line, role in trained if line.role == "matrix" and role == "other"]
    uncapped = [line for line, role in trained if line.constraint is None and role == "matrix"]
    remedy = "build it with SpectralMuon.from_model and the constraints enforced"
    found: list[str] = []
    if by_adamw:
        found.append(
            f"SpectralMuon has {_names(by_adamw)} in a group of the role 'other', although the spectral norm is capped "
            f"there, so AdamW updates them and lr does not bound their steps: {remedy}"
        )
    if uncapped:
        found.append(
            f"SpectralMuon has {_names(uncapped)} in a group of the role 'matrix', although no constraint caps the "
            f"norm there: add a rule, or {remedy}"
        )
    return found


def _other_rules(routes: Sequence[Route], named: Mapping[str, Tensor], recorded: Any) -> list[str]:
    """The optimizer was built for other rules than those enforced."""
    if recorded is None:
        return []
    difference = _difference(routes, named, recorded)
    if difference is None:
        return []
    return [
        f"SpectralMuon was built for other constraints than those enforced ({difference}): give both the "
        "same, so that its steps suit the caps"
    ]


def _saved(routes: Sequence[Route], named: Mapping[str, Tensor], stored: Any) -> list[str]:
    """The model's config, which is that of its checkpoint, states other rules than those enforced."""
    difference = _difference(routes, named, stored)
    if difference is None:
        return []
    return [
        f"config.constraints differ from the constraints given ({difference}): those given are enforced, and saved in "
        "the config of the next checkpoint"
    ]


def _difference(routes: Sequence[Route], named: Mapping[str, Tensor], others: Any) -> str | None:
    """The first parameter that other rules treat in another way, in words; None where both do the same.

    Patterns do not matter, only what they do to the parameters.
    """
    try:
        there = {line.name: _action(line.constraint) for line in route(named.items(), read_constraints(others))}
    except (UserError, TypeError):  # a list of something else, or for the model before it was changed
        return "the rules there do not fit the model"
    for line in routes:
        here = _action(line.constraint)
        if there[line.name] != here:
            return f"{line.name!r} has {there[line.name]} there and {here} here"
    return None


def _action(rule: Constraint | None) -> str:
    if rule is None:
        return "no cap"
    norm = rule.norm if rule.heads is None else f"{rule.norm} of {rule.heads}"
    return f"{rule.cap}, {norm}, at most {float(rule.value)!r}"


def _described(one: _Held) -> str:
    return repr(one.name) if one.name else f"a parameter of shape {' x '.join(map(str, one.parameter.shape)) or '()'}"


def _names(lines: Sequence[Route]) -> str:
    return _some([repr(line.name) for line in lines])


def _some(texts: Sequence[str]) -> str:
    """All of a few; of many how many there are, and the first."""
    if len(texts) <= _LISTED:
        return " and ".join(texts)
    return f"{len(texts)} parameters ({', '.join(texts[:_LISTED])} and others)"
