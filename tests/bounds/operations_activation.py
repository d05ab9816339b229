"""The meaning of pointwise activations in torch (see operations.py)."""

from __future__ import annotations

from tests.bounds.meaning import Operation

OPERATIONS: dict[str, Operation] = {}
