"""The meaning of forms of attention in torch (see operations.py)."""

from __future__ import annotations

from tests.bounds.meaning import Operation

OPERATIONS: dict[str, Operation] = {}
