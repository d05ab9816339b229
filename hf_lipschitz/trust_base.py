"""What a verdict rests on beside the kernel: NumPy, its BLAS, the processor, and third-party rules chosen to trust."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from hf_lipschitz import __version__
from hf_lipschitz.bounds.errors import KernelError
from hf_lipschitz.bounds.rule import Rule
from hf_lipschitz.bounds.rules.table import BUILT_IN
from hf_lipschitz.bounds.trust import flushes_to_zero, products_are_exact
from hf_lipschitz.errors import UserError


def trust_base() -> dict[str, Any]:
    """Versions, the BLAS that NumPy was built with, processor, whether subnormals are flushed, the self-test."""
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    modules = {name: sys.modules.get(name) for name in ("torch", "transformers")}
    loaded = {name: str(getattr(module, "__version__", "unknown")) for name, module in modules.items() if module}
    return {
        "hf_lipschitz": __version__,
        **loaded,
        "numpy": np.__version__,
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "flush_to_zero": flushes_to_zero(),
        "matrix_product_self_test": "ok" if products_are_exact() else "failed",
    }


def trusted_rules(distributions: tuple[str, ...]) -> tuple[dict[str, Rule], tuple[str, ...]]:
    """The built-in rules and those that the named distributions offer as entry points ``hf_lipschitz.rules``.

    Nothing else is ever loaded. Returns the table and the names of the foreign rules in it.

    Raises:
        UserError: a distribution is not installed or offers no rules.
        KernelError: a rule's name is taken, or not of the form ``distribution::operation@version``.
    """
    rules: dict[str, Rule] = dict(BUILT_IN)
    foreign: list[str] = []
    for name in distributions:
        found = [p for p in entry_points(group="hf_lipschitz.rules") if p.dist is not None and p.dist.name == name]
        if not found:
            raise UserError(
                f"no installed distribution {name!r} offers rules for hf-lipschitz: install it or leave it out"
            )
        for point in found:
            added = tuple(point.load())
            rules = extended(rules, added)
            foreign.extend(rule.op for rule in added)
    return rules, tuple(foreign)


def extended(table: Mapping[str, Rule], rules: tuple[Rule, ...]) -> dict[str, Rule]:
    """A rule table with third-party rules added; names must be ``distribution::operation@version`` and not taken."""
    result = dict(table)
    for rule in rules:
        if "::" not in rule.op or "@" not in rule.op:
            raise KernelError(f"rule {rule.op!r}: a third-party rule is named 'distribution::operation@version'")
        if rule.op in result:
            raise KernelError(f"rule {rule.op!r} is already defined: choose another name or version")
        result[rule.op] = rule
    return result
