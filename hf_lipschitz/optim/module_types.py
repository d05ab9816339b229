"""Rules by the type of a module: "every Linear, every Embedding", written out as rules by parameter name.

A type is matched exactly, never by inheritance: a subclass may compute something else with its weight. What comes out
is the plain data of ``config.constraints``, so that whoever trains on needs neither this module nor the types.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hf_lipschitz.errors import UserError
from hf_lipschitz.optim.routing import Constraint, bare_model, claim, read_constraints, route

# transformers' Conv1D stores (in, out): its rows are inputs, so norms of rows and of blocks of rows say nothing of it.
_TRANSPOSED = ("transformers.pytorch_utils", "Conv1D")
_NORMS_OF_ROWS = ("row", "per_head")


def constraints_by_type(
    model: nn.Module,
    rules: Mapping[str | type[nn.Module], Mapping[str, Any]],
    *,
    overrides: Sequence[Constraint | Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Constraints of the weights of all modules of some types.

    Args:
        model: the model, possibly compiled or wrapped for distributed data parallelism.
        rules: from a module's class, or the class's name, to a rule without pattern, such as
            ``{"cap": "stiefel", "value": 1.0}``. It applies to the parameter ``weight``, of 2 dimensions or more, of
            the modules whose type is exactly that class. A weight that several modules share is constrained once.
        overrides: ordinary rules, by parameter name; what they match is left to them.

    Returns:
        Rules as in ``config.constraints``, ``overrides`` first. A number in a name becomes ``\\d+`` where all names
        that this matches carry the same rule; all else is escaped.

    Raises:
        UserError: no module has the type, or two classes of the model have its name; the type has no ``weight``; the
            overrides leave nothing to a rule; two rules claim one shared weight; rows of a transformers ``Conv1D`` are
            capped, which stores its weight transposed; see also ``Constraint`` and ``routing.route``.
    """
    model = bare_model(model)
    named = dict(model.named_parameters())
    own = read_constraints(overrides)
    by_name: dict[str, Constraint] = {}
    for kind, rule in _by_class(model, rules).items():
        names = _weights_of(model, kind, named)
        left = [name for name in names if claim(name, own) is None]
        if not left:
            raise UserError(f"the overrides match every weight of {kind.__name__}: leave out the rule for that type")
        for name in left:
            if name in by_name and by_name[name] != replace(rule, pattern=by_name[name].pattern):
                raise UserError(
                    f"{name!r} is shared by modules of the types {by_name[name].pattern} and {kind.__name__}, which "
                    "have different rules: give it one of its own in the overrides"
                )
            by_name[name] = rule
    found = [*own, *_with_patterns(by_name, list(named))]
    _refuse_rows_of_transposed(model, named, found)
    return [rule.to_dict() for rule in found]


def _by_class(
    model: nn.Module, rules: Mapping[str | type[nn.Module], Mapping[str, Any]]
) -> dict[type[nn.Module], Constraint]:
    """The rules by class, with the class's name for a pattern."""
    found: dict[type[nn.Module], Constraint] = {}
    for key, data in rules.items():
        kind = _class_of(model, key)
        if isinstance(data, Mapping) and "pattern" in data:
            raise UserError(f"the rule for {kind.__name__} has a pattern: leave it out, or move it to the overrides")
        if kind in found:
            raise UserError(f"two rules are given for the type {kind.__name__}: leave one out")
        if not isinstance(data, Mapping):
            raise UserError(f"the rule for {kind.__name__} is a mapping with the keys cap and value, not {data!r}")
        found[kind] = Constraint.from_dict({**data, "pattern": kind.__name__})
    return found


def _class_of(model: nn.Module, key: str | type[nn.Module]) -> type[nn.Module]:
    present = {type(module): None for module in model.modules()}
    if not isinstance(key, str):
        if key in present:
            return key
        name = getattr(key, "__name__", repr(key))
        same = [_full(kind) for kind in present if kind.__name__ == name]
        other = f"its {name} is {same[0]}: give that class, or the name" if same else _near(name, present)
        raise UserError(f"no module of the model has the type {_full(key)} itself: {other}")
    named = [kind for kind in present if kind.__name__ == key]
    if len(named) > 1:
        both = " and ".join(_full(kind) for kind in named)
        raise UserError(f"{key!r} is the name of several classes in the model, {both}: give the class instead")
    if not named:
        raise UserError(f"no module of the model has the type {key!r}: {_near(key, present)}")
    return named[0]


def _full(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '?')}.{getattr(kind, '__qualname__', kind)}"


def _near(name: str, present: Mapping[type[nn.Module], None]) -> str:
    """The types of a model whose names are like this one's, or all."""
    names = sorted({kind.__name__ for kind in present})
    alike = [other for other in names if name.lower() in other.lower()]
    alike += [other for other in difflib.get_close_matches(name, names, n=3) if other not in alike]
    if alike:
        return f"did you mean {' or '.join(alike)}"
    return f"its types are {', '.join(names)}"


def _weights_of(model: nn.Module, kind: type[nn.Module], named: Mapping[str, Tensor]) -> list[str]:
    """The names of the weights of all modules of a type, as ``model.named_parameters()`` lists them."""
    names = {id(parameter): name for name, parameter in named.items()}
    weights = [dict(m.named_parameters(recurse=False)).get("weight") for m in model.modules() if type(m) is kind]
    found = [names[id(weight)] for weight in weights if weight is not None and weight.ndim >= 2]
    if not found:
        what = (
            "no parameter called 'weight'" if all(weight is None for weight in weights) else "a weight that is a vector"
        )
        raise UserError(f"{kind.__name__} has {what}: constrain its matrices by name, in the overrides")
    return list(dict.fromkeys(found))


def _with_patterns(by_name: Mapping[str, Constraint], names: Sequence[str]) -> list[Constraint]:
    """Rules by pattern, which match exactly the names given, out of all names of the model."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for name in (name for name in names if name in by_name):
        action = replace(by_name[name], pattern=_pattern(name, any_number=True))
        alike[action].append(name)
    found: list[Constraint] = []
    for rule, members in alike.items():
        matched = [name for name in names if re.fullmatch(rule.pattern, name)]
        if len(members) > 1 and matched == members:
            found.append(rule)
        else:
            found += [replace(rule, pattern=_pattern(name, any_number=False)) for name in members]
    return found


def _pattern(name: str, *, any_number: bool) -> str:
    return r"\.".join(
        r"\d+" if any_number and part.isascii() and part.isdigit() else re.escape(part) for part in name.split(".")
    )


def _refuse_rows_of_transposed(model: nn.Module, named: Mapping[str, Tensor], rules: Sequence[Constraint]) -> None:
    """Route the rules, and refuse those that cap the rows of a weight stored as (in, out)."""
    transposed = {
        id(module.weight)
        for module in model.modules()
        if (type(module).__module__, type(module).__name__) == _TRANSPOSED
    }
    for line in route(named.items(), rules):
        rule = line.constraint
        if rule is not None and rule.norm in _NORMS_OF_ROWS and id(named[line.name]) in transposed:
            raise UserError(
                f"Conv1D stores {line.name!r} as (in, out), so its rows are inputs and the norm {rule.norm} says "
                "nothing of its heads or outputs: use the norm spectral, or replace the module by a Linear"
            )
