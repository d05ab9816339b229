"""Checks that rules state of attributes, shapes and tensors."""

from __future__ import annotations

import math
from typing import Any, cast

from ..errors import KernelError
from ..rule import Check


def integer(least: int, most: int = 2**31) -> Check:
    """Check for an integer attribute in a range."""
    return lambda value: type(value) is int and least <= value <= most


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """Check for a finite number in a range."""
    return lambda value: type(value) in (int, float) and abs(value) <= 2.0**1000 and least <= value <= most


def list_of(item: Check) -> Check:
    """Check for a non-empty list whose items pass ``item``."""

    def check(value: Any) -> bool:
        items = cast("list[Any]", value) if isinstance(value, list) else []
        return 0 < len(items) <= 65536 and all(item(each) for each in items)

    return check


def one_of(*choices: Any) -> Check:
    """Check for one of a few values of the same type."""
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def need(condition: bool, message: str) -> None:
    """Raise KernelError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise KernelError(message)
