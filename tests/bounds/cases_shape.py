"""Rows for embeddings, reshapes, branches and rotations."""

from __future__ import annotations

from tests.bounds.row import Row

ROWS: tuple[Row, ...] = ()
