"""Normalisation layers: BatchNorm in evaluation mode, LayerNorm, RMSNorm."""

from __future__ import annotations

from ..rule import Rule

RULES: tuple[Rule, ...] = ()
