"""Which parameter carries which constraint: a list of rules, matched against parameter names.

No parameter may match two rules, so the order of the list means nothing. The list is stored in ``config.constraints``
and written in recipes, so it is plain data; everything that can be wrong with it is refused here, before training
starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hf_lipschitz.caps.registry import Cap, cap_named
from hf_lipschitz.errors import UserError

# A cap of the spectral norm may also act on each head's rows; other norms stand for themselves.
_NORMS_OF_CAP = {
    "spectral": ("spectral", "per_head"),
    "row": ("row",),
    "frobenius": ("frobenius",),
    "interval": ("interval",),
}
# What peft, torch.compile and DataParallel add to a parameter's name.
_ADDED = {"base_layer", "original_module", "_orig_mod", "module"}
_PEFT = ["base_model", "model"]
_KEYS = ("pattern", "cap", "norm", "value", "heads")

Role = Literal["matrix", "other"]


@dataclass(frozen=True)
class Constraint:
    """One rule: parameters whose whole name matches ``pattern`` have a norm of at most ``value``.

    Attributes:
        pattern: regular expression, matched against the full parameter name.
        cap: name of the function that enforces it (caps/registry.py).
        norm: "spectral", "per_head" (the spectral norm of each head's rows), "row", "frobenius", or "interval" (the
            largest magnitude of an entry).
        value: the largest norm allowed, in units of singular values.
        heads: number of blocks of rows; for "per_head" only. Rows are divided in order into equal blocks. A weight that
            holds the queries, keys and values of H heads of width d, of shape (3 * H * d, D), has 3 * H of them.

    Raises:
        UserError: any of these is wrong.
    """

    pattern: str
    cap: str
    norm: str
    value: float
    heads: int | None = None

    def __post_init__(self) -> None:
        where = f"constraint {self.pattern!r}"
        if not isinstance(self.pattern, str):
            raise UserError(f"{where}: the pattern must be a text, a regular expression on parameter names")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"{where}: not a regular expression ({error}); a dot is written \\.") from error
        allowed = _NORMS_OF_CAP[cap_named(self.cap).norm]
        if self.norm not in allowed:
            raise UserError(f"{where}: {self.cap} enforces the norm {' or '.join(allowed)}, not {self.norm!r}")
        number = self.value
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0.0 < number < math.inf:
            raise UserError(f"{where}: the value must be a positive number, not {number!r}")
        self._check_heads(where)

    def _check_heads(self, where: str) -> None:
        if self.norm == "per_head":
            if isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 1:
                raise UserError(f"{where}: the norm per_head needs 'heads', a whole number of at least 1")
        elif self.heads is not None:
            raise UserError(f"{where}: 'heads' belongs to the norm per_head only: leave it out or change the norm")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Constraint:
        """Read a rule from plain data; ``norm`` defaults to the cap's own.

        Raises:
            UserError: unknown or missing key, unknown cap, bad value, bad regular expression.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"a constraint is a mapping with the keys {', '.join(_KEYS)}, not {data!r}")
        where = f"constraint {data.get('pattern')!r}"
        unknown = sorted(str(key) for key in data if key not in _KEYS)
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(_KEYS)}")
        missing = [key for key in ("pattern", "cap", "value") if key not in data]
        if missing:
            raise UserError(f"{where}: the key {missing[0]!r} is missing")
        norm = data.get("norm") or cap_named(data["cap"]).norm
        return cls(data["pattern"], data["cap"], norm, data["value"], data.get("heads"))

    def to_dict(self) -> dict[str, Any]:
        """The rule as plain data, as stored in ``config.constraints``."""
        data: dict[str, Any] = {"pattern": self.pattern, "cap": self.cap, "norm": self.norm, "value": float(self.value)}
        return data if self.heads is None else {**data, "heads": self.heads}

    @property
    def capping(self) -> Cap:
        """The table's row of the cap."""
        return cap_named(self.cap)


@dataclass(frozen=True)
class Route:
    """Where one parameter goes: its constraint, if any, and the optimizer's part that updates it."""

    name: str
    shape: tuple[int, ...]
    constraint: Constraint | None
    role: Role


def route(
    named_parameters: Iterable[tuple[str, Tensor]], constraints: Sequence[Constraint | Mapping[str, Any]]
) -> list[Route]:
    """Give each parameter the rule that matches its full name.

    Args:
        named_parameters: as of ``model.named_parameters()``.
        constraints: rules, or their plain data, in any order.

    Returns:
        One Route a parameter, in the order given. The role is "matrix" where a cap of the spectral norm applies.

    Raises:
        UserError: a rule matches no parameter at all, no parameter is constrained, two rules match one parameter, a
            rule matches a parameter that is not a matrix, or rows do not divide into heads.
    """
    rules = read_constraints(constraints)
    named = [(name, tuple(parameter.shape)) for name, parameter in named_parameters]
    if not rules:
        raise UserError(
            "no constraint is given, so nothing would be bounded: list at least one rule in the constraints"
        )
    for rule in rules:
        if not any(re.fullmatch(rule.pattern, name) for name, _ in named):
            examples = ", ".join(name for name, _ in named[:3]) or "none"
            raise UserError(
                f"constraint {rule.pattern!r} matches no parameter: it must match a whole name, the first of which are "
                f"{examples}{_hint(rule.pattern, [name for name, _ in named])}"
            )
    return [_route_one(name, shape, rules) for name, shape in named]


def claim(name: str, rules: Sequence[Constraint]) -> Constraint | None:
    """The rule that matches a parameter's full name, if any.

    Raises:
        UserError: two rules do.
    """
    found = [rule for rule in rules if re.fullmatch(rule.pattern, name)]
    if len(found) > 1:
        first, second = (rule.pattern for rule in found[:2])
        raise UserError(
            f"two constraints, {first!r} and {second!r}, claim the parameter {name!r}: narrow one of the patterns, so "
            "that only one matches"
        )
    return found[0] if found else None


def _hint(pattern: str, names: Sequence[str]) -> str:
    """What to add where a pattern fits a name but for what a wrapper added to it; known additions first."""
    split = [name.split(".") for name in names]
    known = [(parts, [place for place in range(len(parts)) if _is_added(parts, place)]) for parts in split]
    single = [(parts, [place]) for parts in split for place in range(len(parts) - 1)]
    for parts, added in (*known, *single):
        rest = [part for place, part in enumerate(parts) if place not in added]
        if len(rest) > 1 and re.fullmatch(pattern, ".".join(rest)):
            extra = " and ".join(repr(parts[place]) for place in added)
            return (
                f"; it would match {'.'.join(parts)!r} without {extra}, and LoRA and other wrappers add such parts to "
                "the names of what they wrap, so write them into the pattern"
            )
    return ""


def _is_added(parts: Sequence[str], place: int) -> bool:
    return parts[place] in _ADDED or (place < len(_PEFT) and parts[: len(_PEFT)] == _PEFT)


def _route_one(name: str, shape: tuple[int, ...], rules: Sequence[Constraint]) -> Route:
    rule = claim(name, rules)
    if rule is None:
        return Route(name, shape, None, "other")
    if len(shape) != 2 and rule.norm != "interval":
        raise UserError(
            f"constraint {rule.pattern!r} matches {name!r} of shape {shape}, and {rule.cap} needs a matrix: narrow the "
            "pattern"
        )
    if rule.heads is not None and shape[0] % rule.heads:
        raise UserError(
            f"constraint {rule.pattern!r}: the {shape[0]} rows of {name!r} do not divide into {rule.heads} heads"
        )
    return Route(name, shape, rule, "matrix" if rule.capping.norm == "spectral" else "other")


def read_constraints(constraints: Sequence[Constraint | Mapping[str, Any]]) -> list[Constraint]:
    """Rules from rules or their plain data.

    Raises:
        UserError: see Constraint.
    """
    return [rule if isinstance(rule, Constraint) else Constraint.from_dict(rule) for rule in constraints]


def constraints_of(model: nn.Module) -> list[Constraint]:
    """The rules in a model's ``config.constraints``.

    Raises:
        UserError: the model has no such list.
    """
    stored = getattr(getattr(bare_model(model), "config", None), "constraints", None)
    if not stored:
        raise UserError(
            f"{type(model).__name__} has no config.constraints: pass constraints=[...] with a rule for each weight"
        )
    return read_constraints(stored)


def bare_model(model: nn.Module) -> nn.Module:
    """The module whose parameter names are the checkpoint's: inside ``torch.compile`` and DistributedDataParallel."""
    while True:
        if hasattr(model, "_orig_mod"):
            inner = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def routing_table(routes: Sequence[Route]) -> str:
    """The routes as text to print: one line a parameter."""
    header = ("parameter", "shape", "updated as", "cap", "norm", "at most")
    lines = [header, *(_table_line(line) for line in routes)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _table_line(route: Route) -> tuple[str, ...]:
    shape = " x ".join(map(str, route.shape)) or "scalar"
    rule = route.constraint
    if rule is None:
        return (route.name, shape, route.role, "-", "-", "-")
    norm = rule.norm if rule.heads is None else f"{rule.norm} ({rule.heads})"
    return (route.name, shape, route.role, rule.cap, norm, f"{rule.value:g}")
