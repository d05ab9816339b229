"""Convolutions: their meaning, bound and rounding."""

from __future__ import annotations

from ..rule import Rule

RULES: tuple[Rule, ...] = ()
