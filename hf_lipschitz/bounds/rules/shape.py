"""Where embeddings enter, rearrangements of entries, branches and rotations."""

from __future__ import annotations

from ..rule import Rule

RULES: tuple[Rule, ...] = ()
